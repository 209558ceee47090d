"""From a model, a checkpoint and a config to the Plan: every decision of a load, before a byte is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from . import hf
from .checkpoint import Checkpoint
from .config import BnbQuantizationConfig, as_config
from .errors import CheckpointError, listed
from .formats import dominant_dtype
from .keys import KeyMapping, Source, sources_in_checkpoint
from .modules import ModelTensor, layers_recorded, layers_stored_quantized, layers_to_quantize, tensors_of
from .placement import DeviceMap, Plan, make_plan, resolve_device_map
from .prequantized import QuantizedTensor, config_of
from .record import Record
from .tree import leaves, modules_by_path


def config_for(given: BnbQuantizationConfig | None, checkpoint: Checkpoint | None) -> BnbQuantizationConfig:
    """Give the caller's config or, where None is given, that of a checkpoint which is quantized already.

    Raises:
        CheckpointError: the checkpoint's weights are quantized in more than one way.
        ConfigError: None for a checkpoint that is not quantized, or a config that contradicts one that is.
    """
    if checkpoint is not None and checkpoint.is_quantized:
        return config_of(checkpoint, given)
    if checkpoint is not None and checkpoint.record is not None and given is None:
        return checkpoint.record.config
    return as_config(given)


def plan_load(
    model: nn.Module,
    config: BnbQuantizationConfig,
    checkpoint: Checkpoint | None,
    device_map: DeviceMap,
    *,
    key_mapping: KeyMapping | None = None,
    tied_parameters: Sequence[tuple[str, str]] | None = None,
    quantizable: Sequence[type[nn.Linear]] = (),
    strict: bool = False,
) -> Plan:
    """Decide for every tensor of a model where it comes from, what it becomes and where it goes.

    Args:
        model: read only.
        config: from `config_for`.
        checkpoint: where the weights are; None means the model's own.
        device_map, key_mapping, tied_parameters, quantizable, strict: as `load_and_quantize_model` takes them.

    Raises:
        ConfigError: an argument cannot mean anything.
        CheckpointError: the checkpoint does not fit the model.
        PlacementError: the device map cannot be met.
    """
    record = None if checkpoint is None else checkpoint.record
    tensors = tensors_of(model, _ties(model, record) if tied_parameters is None else tied_parameters)
    devices = resolve_device_map(device_map, tensors, modules_by_path(model))
    if checkpoint is None:
        sources, dtype = _own_weights(tensors)
        resolved, class_dtypes = config.resolved(dtype), None  # a real model has the dtypes it was given
    else:
        resolved = config.resolved(checkpoint.dominant_dtype)
        class_dtypes = hf.class_dtypes(model, resolved.landing_dtype)
        sources = sources_in_checkpoint(
            tensors,
            checkpoint,
            key_mapping=key_mapping,
            conversion=hf.key_conversion(model),
            ignores_key=lambda key: hf.ignores_key(model, key),
            class_dtypes=class_dtypes,
            rebuilt_buffers=lambda: hf.rebuilt_buffers(model, resolved.landing_dtype),
            strict=strict,
        )
    if record is not None:
        quantizable = quantizable or _classes(model, record)
        if config is record.config or config.torch_dtype == "auto":  # what was saved comes back as it was
            class_dtypes = {name: pieces[0].tensor.dtype for name, pieces in sources.items() if pieces}
    if checkpoint is not None and checkpoint.is_quantized:
        stored = [name for name, pieces in sources.items() if isinstance(pieces[0].tensor, QuantizedTensor)]
        layers = layers_stored_quantized(model, resolved, tensors, stored, quantizable)
    elif record is not None and config is record.config:
        layers = layers_recorded(model, record.layers, quantizable)
    else:
        layers = layers_to_quantize(model, resolved, tensors, quantizable)
    return make_plan(model, resolved, tensors, layers, sources, devices, class_dtypes)


def _ties(model: Any, record: Record | None) -> list[tuple[str, str]]:
    """Give the ties that a saved model had, as far as this one has both ends: made on meta it may have lost them."""
    if record is None or not isinstance(model, nn.Module):
        return []
    names = leaves(modules_by_path(model), "_parameters")
    pairs = [(first, other) for first, *others in record.ties for other in others]
    return [(a, b) for a, b in pairs if a in names and b in names and names[a].shape == names[b].shape]


def _classes(model: nn.Module, record: Record) -> list[type[nn.Linear]]:
    """Give the subclasses of Linear whose layers were quantized when the model was saved."""
    modules = modules_by_path(model)
    classes = {type(modules[path]) for path in record.layers if path in modules}
    return [cls for cls in classes if issubclass(cls, nn.Linear) and cls is not nn.Linear]


def _own_weights(tensors: Sequence[ModelTensor]) -> tuple[Mapping[str, tuple[Source, ...]], torch.dtype]:
    empty = [tensor.name for tensor in tensors if tensor.value.is_meta]
    if empty:
        raise CheckpointError(
            f"weights_location is None, but {len(empty)} tensors of the model are on meta: {listed(empty)}; say where "
            "the weights are",
            missing_keys=empty,
        )
    # Persistent floating buffers are cast with the weights, as those of a checkpoint are.
    own = [t for t in tensors if t.is_parameter or (t.persistent and t.value.is_floating_point())]
    dtype = dominant_dtype((t.value.dtype, t.value.nbytes) for t in own if t.is_parameter)
    return {tensor.name: (Source(tensor.value),) for tensor in own}, dtype
