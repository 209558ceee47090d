"""From a model, a checkpoint and a config to the Plan: every decision of a load, before a byte is read."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..checkpoint.bitsandbytes import QuantizedTensor
from ..checkpoint.checkpoint import Checkpoint, WeightsLocation, open_checkpoint
from ..checkpoint.record import Record
from ..checkpoint.stored_config import config_of
from ..config import BnbQuantizationConfig, OffloadConfig, as_config, as_offload_config
from ..errors import CheckpointError, ConfigError, PlacementError, listed
from ..hardware.devices import CPU, Device, DeviceMap
from ..io.ring import ring_bytes
from ..io.transfer import WINDOW_BYTES
from ..model import transformers_facts
from ..model.tensors import ModelTensor, layers_recorded, layers_stored_quantized, layers_to_quantize, tensors_of
from ..model.tree import leaves, modules_by_path, walked_once
from ..quantization.formats import FourBit, dominant_dtype
from .advice import check_accounts
from .cpu_or_gpu import is_faster_on_cpu
from .leftover import warn_of_leftover
from .placement import Placement, place_tensors, place_units, place_whole
from .plan import Plan, accounts_of
from .planned_tensors import PlannedTensor, formatted_tensors
from .request import PlacementRequest, check_map, only_device, resolve_budgets
from .sources import KeyMapping, Source, sources_in_checkpoint


def config_for(given: BnbQuantizationConfig | None, checkpoint: Checkpoint | None) -> BnbQuantizationConfig:
    """Return the caller's config or, where None is given, that of a checkpoint which is quantized already.

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
    request: PlacementRequest,
    *,
    key_mapping: KeyMapping | None = None,
    tied_parameters: Sequence[tuple[str, str]] | None = None,
    quantizable: Sequence[type[nn.Linear]] = (),
    strict: bool = False,
    is_hypothetical: bool = False,
) -> Plan:
    """Decide for every tensor of a model where it comes from, what it becomes and where it goes.

    Args:
        model: read only.
        config: from `config_for`.
        checkpoint: where the weights are; None means the model's own.
        request: what the caller said of places.
        key_mapping, tied_parameters, quantizable, strict: as `load_and_quantize_model` takes them.
        is_hypothetical: the model's own weights may be on meta, as if a checkpoint held them.

    Raises:
        ConfigError: an argument cannot mean anything.
        CheckpointError: the checkpoint does not fit the model.
        PlacementError: the device map or the budgets cannot be met.
    """
    record = None if checkpoint is None else checkpoint.record
    tensors = tensors_of(model, _ties(model, record) if tied_parameters is None else tied_parameters)
    check_map(request.device_map, tensors, modules_by_path(model), must_exist=request.must_exist)
    if checkpoint is None:
        sources, dtype = _own_weights(tensors, may_be_empty=is_hypothetical)
        dtype = (transformers_facts.config_dtype(model) or dtype) if is_hypothetical else dtype
        resolved, class_dtypes = config.resolved(dtype), None  # a real model has the dtypes it was given
        if is_hypothetical:
            class_dtypes = transformers_facts.class_dtypes(model, resolved.load_dtype)
    else:
        resolved = config.resolved(checkpoint.dominant_dtype)
        class_dtypes = transformers_facts.class_dtypes(model, resolved.load_dtype)
        sources = sources_in_checkpoint(
            tensors,
            checkpoint,
            key_mapping=key_mapping,
            conversion=transformers_facts.key_conversion(model),
            ignores_key=lambda key: transformers_facts.ignores_key(model, key),
            class_dtypes=class_dtypes,
            rebuilt_buffers=lambda: transformers_facts.rebuilt_buffers(model, resolved.load_dtype),
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
        warn_of_leftover(model, resolved, tensors, layers)
    device = None if is_hypothetical else only_device(request)  # a plan that is looked at has its units
    planned = formatted_tensors(model, resolved, tensors, layers, sources, class_dtypes, device or CPU)
    kept = request.offload.reserve_bytes(_dequantized_bytes(planned, resolved))
    request = replace(request, reserve=max(kept, WINDOW_BYTES))
    placement = None if device is None else place_whole(planned, device, request)
    placement = placement or _placement(model, planned, request)
    return _placed(planned, layers, resolved, placement, request)


def _dequantized_bytes(tensors: Sequence[PlannedTensor], config: BnbQuantizationConfig) -> int:
    """Tell what the largest 4-bit layer takes when bitsandbytes dequantizes it."""
    in_4bit = (math.prod(planned.shape) for planned in tensors if isinstance(planned.format, FourBit))
    computed = config.bnb_4bit_compute_dtype
    return max(in_4bit, default=0) * (computed if isinstance(computed, torch.dtype) else config.load_dtype).itemsize


def _placement(model: nn.Module, tensors: Sequence[PlannedTensor], request: PlacementRequest) -> Placement:
    """Place a model's units; "auto" lets the CPU compute what rests there if that is faster, and possible."""
    placement = place_units(model, tensors, request)
    may_choose = request.offload.execute == "auto" and not request.fp32_on_cpu
    if may_choose and not any(map(_is_quantized, tensors)) and is_faster_on_cpu(placement.units):
        with suppress(PlacementError):  # no room for float32
            return place_units(model, tensors, replace(request, fp32_on_cpu=True))
    return placement


def _placed(
    tensors: Sequence[PlannedTensor],
    layers: Mapping[str, nn.Module],
    config: BnbQuantizationConfig,
    placement: Placement,
    request: PlacementRequest,
) -> Plan:
    is_mixed = any(placed.device.type == "cuda" for placed in placement.units)
    made = place_tensors(tensors, placement.units, is_mixed=is_mixed) if placement.units else list(tensors)
    if config.llm_int8_has_fp16_weight and any(placed.home is not None for placed in placement.units):
        raise ConfigError(
            "int8-training trains its weights, which must be on the device that computes: leave none off it"
        )
    homeless = [p.tensor.name for p in made if p.home == "disk" and p.stored_as_is is None]
    if homeless and request.offload_folder is None:
        raise PlacementError(
            f"{listed(homeless)}: to rest on the disk, and not as the checkpoint has them: name an offload_folder"
        )
    quantized = [
        planned.tensor.name for planned in made if is_mixed and planned.device == CPU and _is_quantized(planned)
    ]
    if quantized:
        raise CheckpointError(
            f"{listed(quantized)}: stored quantized, but to be computed on the CPU in float32: give the original "
            "checkpoint, or leave llm_int8_enable_fp32_cpu_offload and execute='cpu' out, so that they are streamed"
        )
    if is_mixed:  # the CPU computes in float32, without bitsandbytes
        on_cpu = {name for planned in made if planned.device == CPU for name in planned.tensor.names}
        layers = {path: layer for path, layer in layers.items() if f"{path}.weight".lstrip(".") not in on_cpu}
    accounts = accounts_of(
        made,
        placement.units,
        placement.budgets,
        slots=request.offload.slots,
        reserve=request.reserve,
        host_ring=request.host_ring,
    )
    check_accounts(accounts, request.budgets)
    return Plan(tuple(made), layers, placement.device_map, config, placement.devices, placement.units, accounts)


def _is_quantized(planned: PlannedTensor) -> bool:
    return any(isinstance(source.tensor, QuantizedTensor) for source in planned.sources)


def plan_device_map(
    model: nn.Module,
    bnb_quantization_config: Any,
    weights_location: WeightsLocation | None = None,
    device_map: DeviceMap = "auto",
    no_split_module_classes: Sequence[str] | None = None,
    max_memory: Mapping[Device, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    *,
    offload: OffloadConfig | None = None,
    key_mapping: KeyMapping | None = None,
    tied_parameters: Sequence[tuple[str, str]] | None = None,
    quantizable: Sequence[type[nn.Linear]] = (),
) -> Plan:
    """Plan a load without loading: where every tensor would go, and what it would take of each place, to the byte.

    Args:
        model: empty or real; never changed.
        bnb_quantization_config: as `load_and_quantize_model` takes it.
        weights_location: the checkpoint; None plans from the model alone, as if a checkpoint held all that it has.
        device_map, no_split_module_classes, max_memory, offload_folder, offload, key_mapping, tied_parameters,
            quantizable: as `load_and_quantize_model` takes them. Devices that this machine does not have may be named.

    Returns:
        The plan, whose `accounts`, `device_map`, `units` and `streamed_bytes` say what it comes to; printed it is a
        table.

    Raises:
        ConfigError, CheckpointError, PlacementError: as `load_and_quantize_model` raises them.
    """
    given = None if bnb_quantization_config is None else as_config(bnb_quantization_config)
    checkpoint = None if weights_location is None else open_checkpoint(weights_location)
    config = config_for(given, checkpoint)
    request = placement_request(
        config,
        device_map,
        no_split_module_classes,
        max_memory,
        offload_folder,
        offload,
        must_exist=False,
    )
    with torch.inference_mode(False), torch.no_grad(), walked_once(model):
        return plan_load(
            model,
            config,
            checkpoint,
            request,
            key_mapping=key_mapping,
            tied_parameters=tied_parameters,
            quantizable=quantizable,
            is_hypothetical=True,
        )


def placement_request(
    config: BnbQuantizationConfig,
    device_map: DeviceMap,
    no_split_module_classes: Sequence[str] | None = None,
    max_memory: Mapping[Device, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    offload: OffloadConfig | None = None,
    *,
    must_exist: bool = True,
) -> PlacementRequest:
    """Gather what a caller said of places.

    Raises:
        ConfigError: `offload`, `offload_folder` or `no_split_module_classes` is not what it should be.
        PlacementError: `max_memory` is not.
    """
    if isinstance(no_split_module_classes, str) or not all(
        isinstance(name, str) for name in no_split_module_classes or ()
    ):
        raise ConfigError(
            f"no_split_module_classes must be a list of names of classes, but it is {no_split_module_classes!r}"
        )
    if offload_folder is not None and (not isinstance(offload_folder, (str, os.PathLike)) or not str(offload_folder)):
        raise ConfigError(f"offload_folder is {offload_folder!r}; expected the path of a folder, or None")
    kept = as_offload_config(offload)
    return PlacementRequest(
        device_map,
        resolve_budgets(max_memory, must_exist=must_exist),
        no_split_module_classes,
        kept,
        offload_folder,
        fp32_on_cpu=config.llm_int8_enable_fp32_cpu_offload or kept.execute == "cpu",
        host_ring=ring_bytes(),
        must_exist=must_exist,
    )


def _ties(model: Any, record: Record | None) -> list[tuple[str, str]]:
    """Return the ties that a saved model had, as far as this one has both ends: made on meta it may have lost them."""
    if record is None or not isinstance(model, nn.Module):
        return []
    names = leaves(modules_by_path(model), "_parameters")
    pairs = [(first, other) for first, *others in record.ties for other in others]
    return [(a, b) for a, b in pairs if a in names and b in names and names[a].shape == names[b].shape]


def _classes(model: nn.Module, record: Record) -> list[type[nn.Linear]]:
    """Return the subclasses of Linear whose layers were quantized when the model was saved."""
    modules = modules_by_path(model)
    classes = {type(modules[path]) for path in record.layers if path in modules}
    return [cls for cls in classes if issubclass(cls, nn.Linear) and cls is not nn.Linear]


def _own_weights(
    tensors: Sequence[ModelTensor], *, may_be_empty: bool = False
) -> tuple[Mapping[str, tuple[Source, ...]], torch.dtype]:
    empty = [tensor.name for tensor in tensors if tensor.value.is_meta]
    if empty and not may_be_empty:
        raise CheckpointError(
            f"weights_location is None, but {len(empty)} tensors of the model are on meta: {listed(empty)}; say where "
            "the weights are",
            missing_keys=empty,
        )
    # Persistent floating buffers are cast with the weights, as those of a checkpoint are.
    own = [t for t in tensors if t.is_parameter or (t.persistent and t.value.is_floating_point())]
    dtype = dominant_dtype((t.value.dtype, t.value.nbytes) for t in own if t.is_parameter)
    return {tensor.name: (Source(tensor.value),) for tensor in own}, dtype
