"""The config that a checkpoint was quantized by, as its weights and what lies beside them say it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config import FLOATS, BnbQuantizationConfig
from ..errors import CheckpointError, ConfigError
from ..quantization.formats import FourBit, Int8
from .bitsandbytes import QuantizedTensor
from .checkpoint import Checkpoint


def config_of(checkpoint: Checkpoint, given: BnbQuantizationConfig | None) -> BnbQuantizationConfig:
    """Return the config of a checkpoint that is quantized already.

    Args:
        checkpoint: its weights and, beside it, perhaps a config.json with a `quantization_config`.
        given: the caller's, which may choose what is not in the weights: compute dtype, threshold, torch_dtype.

    Raises:
        CheckpointError: its weights are quantized in more than one way.
        ConfigError: `given` asks for another way.
    """
    formats = {tensor.format: tensor for tensor in checkpoint.tensors.values() if isinstance(tensor, QuantizedTensor)}
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
            return BnbQuantizationConfig(**fields, **_said_beside(checkpoint.location))
        given = checkpoint.record.config
    fields["llm_int8_has_fp16_weight"] = False
    asked = {name: getattr(given, name) for name in fields}
    wrong = [f"{name}={asked[name]}, not {value}" for name, value in fields.items() if asked[name] != value]
    if wrong:
        raise ConfigError(
            f"'{checkpoint.location}' is quantized already, otherwise than the config says ({'; '.join(wrong)}): pass "
            "None for the checkpoint's own config, or give the original checkpoint"
        )
    return given


def _said_beside(location: Path) -> dict[str, Any]:
    """Return what a config.json beside the weights says of how they compute, which the weights do not."""
    said: dict[str, Any] = {"torch_dtype": "auto", "bnb_4bit_compute_dtype": "auto"}
    try:
        model = json.loads((location.parent / "config.json").read_text())
        config = model["quantization_config"]
        threshold, compute_dtype = config.get("llm_int8_threshold"), config.get("bnb_4bit_compute_dtype")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return said  # no such file, or of another model's
    # Where a model of transformers is kept in float32 in part, most bytes may be float32.
    dtype = model.get("dtype", model.get("torch_dtype"))
    if isinstance(dtype, str) and dtype in FLOATS:
        said["torch_dtype"] = dtype
    if isinstance(compute_dtype, str) and compute_dtype in FLOATS:
        said["bnb_4bit_compute_dtype"] = compute_dtype
    if isinstance(threshold, (int, float)) and not isinstance(threshold, bool) and threshold >= 0:
        said["llm_int8_threshold"] = float(threshold)
    return said
