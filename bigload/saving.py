"""A quantized model on disk: saved so that bigload, and for its own classes transformers, loads it bit for bit."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint.folders import new_folder
from .checkpoint.record import RECORD_NAME, Record
from .checkpoint.writer import Entry, ShardWriter, write_json
from .config import BnbQuantizationConfig
from .errors import ConfigError, QuantizationError, listed
from .model import transformers_facts
from .model.quantizable import plain_linears
from .model.tree import leaves, modules_by_path
from .pipeline.attributes import skip_list
from .quantization.formats import dominant_dtype
from .quantization.layers import config_of_layer, quantized_layers, require_whole_layers, source_class
from .sizes import parse_size

logger = logging.getLogger(__name__)


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
    max_shard_bytes = shard_bytes(max_shard_size)
    model = getattr(model, "_orig_mod", model)  # of torch.compile: what it compiled
    layers = quantized_layers(model)
    config = _config(model, layers)
    state, ties = _stored_once(model, layers)
    kept = [path for path in plain_linears(model) if path not in layers]
    with new_folder(folder, overwrite=overwrite) as made:
        write_configs(model, made, config, kept, layers, getattr(model, "dtype", None))
        writer = ShardWriter(made, [Entry(n, t.dtype, tuple(t.shape)) for n, t in state.items()], max_shard_bytes)
        try:
            for name, tensor in state.items():
                writer.write(name, tensor)
            writer.finish()
        finally:
            writer.close()
        write_json(made / RECORD_NAME, Record(writer.layout, config, tuple(layers), tuple(kept), tuple(ties)).to_dict())


def shard_bytes(size: int | str) -> int:
    """Read a `max_shard_size`.

    Raises:
        ConfigError: not a size, or none at all.
    """
    try:
        nbytes = parse_size(size)
    except ValueError as error:
        raise ConfigError(f"max_shard_size is {size!r}; expected bytes, or a size such as '5GB'") from error
    if not nbytes:
        raise ConfigError("max_shard_size is 0; expected bytes, or a size such as '5GB'")
    return nbytes


def write_configs(
    model: Any,
    folder: Path,
    config: BnbQuantizationConfig,
    kept: Iterable[str],
    layers: Mapping[str, nn.Module],
    dtype: Any,
) -> None:
    """Write the configs by which transformers makes the same layers, of a model of its own; warn where it cannot."""
    if not transformers_facts.is_pretrained(model):
        return
    quantization = config.to_transformers()
    quantization.llm_int8_skip_modules = skip_list(kept, layers)
    transformers_facts.save_configs(model, folder, quantization, dtype)
    classes = dict.fromkeys(map(source_class, layers.values()))
    unknown = [
        cls.__name__ for cls in classes if not transformers_facts.is_quantized_by_transformers(cls, quantization)
    ]
    if unknown:
        logger.warning(
            "from_pretrained will not read what is saved of this %s: transformers %s makes no quantized layers of "
            "subclasses of nn.Linear, which %s is; load it with load_and_quantize_model(model, None, folder)",
            type(model).__name__,
            transformers_facts.import_transformers().__version__,
            listed(unknown),
        )


def _config(model: nn.Module, layers: Mapping[str, Any]) -> BnbQuantizationConfig:
    """Return the config that makes such layers of plain ones; its `torch_dtype` is what most other weights are in."""
    if not layers:
        raise ConfigError(
            f"this {type(model).__name__} has no layer that bitsandbytes quantized; save it as any other model"
        )
    require_whole_layers(model, layers)
    modules = modules_by_path(model)
    tensors = {**leaves(modules, "_parameters"), **leaves(modules, "_buffers")}
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise QuantizationError(f"{listed(empty)}: on meta, so there is nothing to save; load the weights first")
    ways: dict[tuple[Any, ...], str] = {}
    for path, layer in layers.items():
        ways.setdefault(tuple(config_of_layer(layer).items()), path)
    if len(ways) > 1:
        raise QuantizationError(
            f"{listed(ways.values())} are quantized, or compute, each in another way: a checkpoint has one"
        )
    quantized = {id(parameter) for layer in layers.values() for parameter in layer.parameters(recurse=False)}
    others = [parameter for parameter in model.parameters() if id(parameter) not in quantized]
    floating = [(parameter.dtype, parameter.nbytes) for parameter in others if parameter.is_floating_point()]
    return BnbQuantizationConfig(**dict(next(iter(ways))), torch_dtype=dominant_dtype(floating) if floating else "auto")


def _stored_once(model: nn.Module, layers: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], list[tuple[str, ...]]]:
    """Return the model's state_dict, of tied parameters only the first, and the names of those that are tied."""
    state: dict[str, torch.Tensor] = model.state_dict()
    strange = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise QuantizationError(f"{listed(strange)}: extra state that is no tensor, which safetensors cannot hold")
    groups: defaultdict[tuple[Any, ...], list[str]] = defaultdict(list)
    modules = modules_by_path(model)
    for name, parameter in leaves(modules, "_parameters").items():
        if name in state and parameter.numel():
            groups[parameter.data_ptr(), parameter.dtype, parameter.shape, parameter.stride()].append(name)
    ties = [tuple(names) for names in groups.values() if len(names) > 1]
    untied = [
        (one, other)
        for one, other in transformers_facts.tied_pairs(model)
        if one in state and other in state and not any({one, other} <= set(names) for names in ties)
    ]
    if untied:
        raise QuantizationError(
            f"{listed(untied[0])} are tied in models of this class, and here they are not: set "
            "config.tie_word_embeddings to False, so that they are not tied again"
        )
    quantized = set(layers.values())
    shared = {f"{path}.weight".lstrip(".") for path, module in modules.items() if module in quantized}
    gone = {name for _, *others in ties for name in others}
    for name in gone & shared:  # with all the parts of a quantized weight
        around = {f"{name.removesuffix('weight')}{part}" for part in ("SCB", "weight_format")}
        gone |= {key for key in state if key in around or key.startswith(f"{name}.")}
    return {name: tensor for name, tensor in state.items() if name not in gone}, ties
