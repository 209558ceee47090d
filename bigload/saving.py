"""A quantized model on disk: saved so that bigload, and for its own classes transformers, loads it bit for bit."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import hf
from .config import BnbQuantizationConfig
from .errors import ConfigError, QuantizationError, listed
from .formats import dominant_dtype
from .interop import skip_list
from .layers import config_of_layer, quantized_layers
from .memory import parse_size
from .modules import plain_linears
from .record import RECORD_NAME, Record
from .shards import INDEX_NAME, Entry, ShardWriter, new_folder, write_json

# What all layers of a checkpoint must have in common.
_SAME = (
    "load_in_4bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_blocksize",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_quant_storage",
)


def save_quantized_model(
    model: nn.Module,
    folder: str | os.PathLike[str],
    max_shard_size: int | str = "5GB",
    *,
    overwrite: bool = False,
) -> None:
    """Save a model whose layers are quantized, as safetensors that are read without quantizing again.

    `load_and_quantize_model(empty, None, folder)` gives it back with the same bits, layers and dtypes. Of a model of
    transformers there is also the config.json by which `from_pretrained(folder)` does. Tied weights are stored once.
    The folder is there when all of it is, and not before.

    Args:
        model: loaded by bigload, or any other with layers of bitsandbytes.
        folder: where to; made if need be.
        max_shard_size: of the tensors in one file, in bytes or as "5GB"; one that is larger has a file of its own.
        overwrite: replace a folder that is not empty.

    Raises:
        CheckpointError: the folder is not empty, or cannot be written; what was there is there still.
        ConfigError: an argument cannot mean anything, or the model has no quantized layer.
        QuantizationError: the model cannot be given back as it is: weights on meta, layers of several formats, weights
            that bitsandbytes has packed for the CPU.
    """
    most = _shard_bytes(max_shard_size)
    layers = quantized_layers(model)
    _require_whole(model, layers)
    state, ties = _stored_once(model)
    config = _config(layers, state)
    kept = [path for path in plain_linears(model) if path not in layers]
    with new_folder(Path(folder), overwrite=overwrite) as made:
        writer = ShardWriter(made, [Entry(n, t.dtype, tuple(t.shape)) for n, t in state.items()], most)
        try:
            for name, tensor in state.items():
                writer.write(name, tensor)
            writer.finish()
        finally:
            writer.close()
        weights = INDEX_NAME if (made / INDEX_NAME).exists() else "model.safetensors"
        if hf.is_pretrained(model):
            quantization = config.to_transformers()
            quantization.llm_int8_skip_modules = skip_list(kept, layers)
            hf.save_configs(model, made, quantization)
        write_json(made / RECORD_NAME, Record(weights, config, tuple(layers), tuple(kept), tuple(ties)).to_dict())


def _shard_bytes(size: int | str) -> int:
    try:
        nbytes = parse_size(size)
    except ValueError as error:
        raise ConfigError(f"max_shard_size is {size!r}; expected bytes, or a size such as '5GB'") from error
    if not nbytes:
        raise ConfigError("max_shard_size is 0; expected bytes, or a size such as '5GB'")
    return nbytes


def _require_whole(model: nn.Module, layers: Mapping[str, Any]) -> None:
    if not layers:
        raise ConfigError(
            f"this {type(model).__name__} has no layer that bitsandbytes quantized; save it as any other model"
        )
    packed = [
        path
        for path, layer in layers.items()
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False)
    ]
    if packed:
        raise QuantizationError(
            f"{listed(packed)}: packed by bitsandbytes for this CPU when it ran, which rounds the scales for good; "
            "load the model anew (with bigload it may run before it is saved)"
        )
    empty = [name for name, tensor in _all_tensors(model).items() if tensor.is_meta]
    if empty:
        raise QuantizationError(f"{listed(empty)}: on meta, so there is nothing to save; load the weights first")
    kinds: dict[tuple[Any, ...], str] = {}
    for path, layer in layers.items():
        fields = config_of_layer(layer)
        kinds.setdefault(tuple(fields.get(name) for name in _SAME), path)
    if len(kinds) > 1:
        raise QuantizationError(
            f"{listed(kinds.values())} are quantized each in another way: a checkpoint holds one format"
        )


def _all_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _stored_once(model: nn.Module) -> tuple[dict[str, torch.Tensor], list[tuple[str, ...]]]:
    """Give the model's state_dict, of tied parameters only the first, and the names of those that are tied."""
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    groups: defaultdict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in state and parameter.numel():
            groups[parameter.data_ptr(), parameter.dtype, parameter.shape, parameter.stride()].append(name)
    ties = [tuple(names) for names in groups.values() if len(names) > 1]
    for _, *others in ties:
        for name in others:
            del state[name]
    return state, ties


def _config(layers: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> BnbQuantizationConfig:
    """Give the config that makes such layers of plain ones; its `torch_dtype` is what most other weights are in."""
    quantized = {_weight(path) for path in layers}
    plain = [tensor for name, tensor in state.items() if not _prefixes(name) & quantized]
    floating = [(tensor.dtype, tensor.nbytes) for tensor in plain if tensor.is_floating_point()]
    fields = config_of_layer(next(iter(layers.values())))
    return BnbQuantizationConfig(**fields, torch_dtype=dominant_dtype(floating) if floating else "auto")


def _weight(path: str) -> str:
    return f"{path}.weight".lstrip(".")


def _prefixes(name: str) -> set[str]:
    """Give a name and all that it lies under: a part of a weight lies under the weight's."""
    parts = name.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
