"""The config that a stored checkpoint was quantized with, from its weights and the files beside them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config import FLOATS, BnbQuantizationConfig, warn_of_float32
from ..errors import CheckpointError, ConfigError
from ..quantization.formats import FourBit, Int8
from .bitsandbytes import QuantizedTensor
from .checkpoint import Checkpoint


def config_of(checkpoint: Checkpoint, given: BnbQuantizationConfig | None) -> BnbQuantizationConfig:
    """Return the config of a checkpoint that is stored quantized.

    Args:
        checkpoint: the weights. What they do not say comes from bigload.json or transformers' config.json beside them.
        given: the caller's config, which may choose what the weights do not say: compute dtype, threshold, torch_dtype.

    Raises:
        CheckpointError: the weights are quantized in more than one way.
        ConfigError: `given` contradicts the weights.
    """
    quantized = [tensor for tensor in checkpoint.tensors.values() if isinstance(tensor, QuantizedTensor)]
    layers = {tensor.format for tensor in quantized if len(tensor.shape) < 3}
    # Experts that were joined of several weights have float32 scales, beside layers with double quantization.
    formats = {t.format: t for t in quantized if t.format in layers or _doubled(t.format) not in layers}
    if len(formats) > 1:
        one, other = list(formats.values())[:2]
        raise CheckpointError(
            f"'{one.name}' is stored as {one.format}, '{other.name}' as {other.format}: a model has one of them"
        )
    (fmt,) = formats
    fields: dict[str, Any] = {"load_in_8bit": isinstance(fmt, Int8), "load_in_4bit": isinstance(fmt, FourBit)}
    if isinstance(fmt, FourBit):
        fields["bnb_4bit_quant_type"] = fmt.quant_type
        fields["bnb_4bit_use_double_quant"] = fmt.double_quant
        fields["bnb_4bit_blocksize"] = fmt.blocksize
        fields["bnb_4bit_quant_storage"] = fmt.quant_storage
    if given is None:
        if checkpoint.record is None:
            made = BnbQuantizationConfig(**fields, **_config_json_fields(checkpoint.location))
            if made.load_in_4bit and made.bnb_4bit_compute_dtype == torch.float32:
                fast = f"BnbQuantizationConfig.from_mode({made.mode!r}, bnb_4bit_compute_dtype=torch.bfloat16)"
                warn_of_float32(f"pass {fast} instead of None")
            return made
        given = checkpoint.record.config
    fields["llm_int8_has_fp16_weight"] = False
    if given.mode == "none":
        raise ConfigError(
            f"'{checkpoint.location}' is quantized already, which 'none' cannot undo: pass None for the checkpoint's "
            "own config, or give the original checkpoint"
        )
    asked = {name: getattr(given, name) for name in fields}
    wrong = [f"{name}={asked[name]}, not {value}" for name, value in fields.items() if asked[name] != value]
    if wrong:
        raise ConfigError(
            f"'{checkpoint.location}' is quantized already, not as the config says ({'; '.join(wrong)}): pass "
            "None for the checkpoint's own config, or give the original checkpoint"
        )
    return given


def _doubled(fmt: FourBit | Int8) -> FourBit | Int8:
    return replace(fmt, double_quant=True) if isinstance(fmt, FourBit) else fmt


def _config_json_fields(location: Path) -> dict[str, Any]:
    """Return the fields that the weights do not say, as far as a config.json beside them does."""
    fields: dict[str, Any] = {"torch_dtype": "auto", "bnb_4bit_compute_dtype": "auto"}
    try:
        model = json.loads((location.parent / "config.json").read_text())
        config = model["quantization_config"]
        threshold, compute_dtype = config.get("llm_int8_threshold"), config.get("bnb_4bit_compute_dtype")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return fields  # no such file, or not one of a quantized model
    # The dominant dtype may differ: transformers keeps parts of some models in float32.
    dtype = model.get("dtype", model.get("torch_dtype"))
    if isinstance(dtype, str) and dtype in FLOATS:
        fields["torch_dtype"] = dtype
    if isinstance(compute_dtype, str) and compute_dtype in FLOATS:
        fields["bnb_4bit_compute_dtype"] = compute_dtype
    if isinstance(threshold, (int, float)) and not isinstance(threshold, bool) and threshold >= 0:
        fields["llm_int8_threshold"] = float(threshold)
    return fields
