"""Makes the `Plan` of a load from a model, a checkpoint and a config, before any weight is read."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..checkpoint.bitsandbytes import QuantizedTensor
from ..checkpoint.checkpoint import Checkpoint, WeightsLocation
from ..config import BnbQuantizationConfig
from ..errors import CheckpointError, ConfigError, PlacementError, listed
from ..hardware.devices import CPU, Device, DeviceMap, on_cpu_unless_named
from ..io.transfer import WINDOW_BYTES
from ..model import diffusers_facts, transformers_facts, twins
from ..model.initialization import rebuilt_by_owners, seems_unwritten
from ..model.quantizable import layers_recorded, layers_stored_quantized, layers_to_quantize, plain_because_read
from ..model.quantizable_experts import (
    ChosenExperts,
    experts_stored_quantized,
    experts_to_quantize,
)
from ..model.tensors import ModelTensor, tensors_of
from ..model.view import ModelView
from ..notation import show
from ..quantization.formats import dominant_dtype
from .advice import check_accounts
from .leftover import warn_of_leftover
from .load_rules import LoadRules
from .missing import new_values
from .offload_config import OffloadConfig
from .placement import Placement, place_tensors, place_units, place_whole
from .placing.accounts import accounts_of
from .placing.cpu_or_gpu import experts_are_faster_on_cpu, is_faster_on_cpu
from .placing.expert_caches import warn_of_unused_cache
from .plan import AfterLoad, Plan
from .planned_tensors import PlannedTensor, compute_dtype_of, dequantized_bytes, formatted_tensors, scratch_bytes
from .request import LoadRequest, PlacementRequest, check_map, load_request, only_device
from .sources import KeyMapping, Source, sources_in_checkpoint

logger = logging.getLogger(__name__)


def plan_load(view: ModelView, request: LoadRequest) -> Plan:
    """Decide the source, the format and the place of every tensor of a model.

    Raises:
        ConfigError: an argument is invalid.
        CheckpointError: the checkpoint does not fit the model.
        PlacementError: the device map or the budgets cannot be met.
    """
    placement = request.placement
    ties = _saved_ties(view, request.checkpoint) if request.tied_parameters is None else request.tied_parameters
    tensors = tensors_of(view, ties)
    check_map(placement.device_map, tensors, view.modules, must_exist=placement.must_exist)
    config, sources, class_dtypes, rules = _sources(view, request, tensors)
    after = AfterLoad() if rules is None else rules.after
    tensors = tensors if rules is None else list(rules.fitted(tensors))
    quantizable = _quantizable(view, request)
    read = plain_because_read(view, config, quantizable)
    layers, experts = _quantized(view, request, config, tensors, sources, quantizable, read)
    device = only_device(placement) if placement.must_exist else None  # a plan to be inspected lists its units
    _require_extra_state_kept(layers, after)
    planned = formatted_tensors(view, config, tensors, layers, sources, class_dtypes, device or CPU, experts.quantized)
    reserve = placement.offload.reserve_bytes(dequantized_bytes(planned, config))
    transfers = WINDOW_BYTES + scratch_bytes(planned, config)
    placement = replace(placement, reserve=max(reserve, transfers))
    if placement.select is not None:
        planned = placement.select(view, planned)
    placed = None if device is None else place_whole(planned, device, placement)
    visited = transformers_facts.experts_per_token(view.model) if experts.quantized else None
    placed = placed or _placement(view, planned, placement, visited, compute_dtype_of(config))
    plan = _placed(planned, layers, experts, config, placed, placement)
    _require_scripts_at_hand(view, plan)
    warn_of_unused_cache(plan.offloaded, placement.offload)
    is_asked = placement.offload.reserve is not None
    if is_asked and reserve < transfers and plan.is_mixed:
        logger.warning(
            "reserve is %s, but the transfers of the load need %s: that is kept free instead",
            show(reserve),
            show(transfers),
        )
    read = {path: what for path, what in read.items() if path not in layers}
    return replace(plan, after=after, read_weights=read, experts_per_token=visited)


_Sources = Mapping[str, tuple[Source, ...]]


_Found = tuple[BnbQuantizationConfig, _Sources, Mapping[str, torch.dtype] | None, LoadRules | None]


def _sources(view: ModelView, request: LoadRequest, tensors: Sequence[ModelTensor]) -> _Found:
    """Find where the values of each tensor come from.

    Returns:
        The config with every "auto" resolved; sources by each tensor's first name; the dtype of each tensor in the
        model's class, or in the saved model; and the modules' own rules, if they have been applied.
    """
    model, checkpoint = view.model, request.checkpoint
    if checkpoint is None:
        return _own_sources(view, request, tensors)
    config = request.config.resolved(checkpoint.dominant_dtype)
    class_dtypes = twins.class_dtypes(model, config.load_dtype)
    rules = LoadRules(view, checkpoint)
    sources = sources_in_checkpoint(
        tensors,
        checkpoint,
        key_mapping=request.key_mapping,
        conversion=transformers_facts.key_conversion(model),
        ignores_key=partial(transformers_facts.ignores_key, model),
        class_dtypes=class_dtypes,
        rebuilt_buffers=partial(twins.rebuilt_buffers, model, config.load_dtype),
        rebuilt_by_owners=partial(rebuilt_by_owners, view),
        seems_unwritten=partial(seems_unwritten, view),
        rules=rules,
        absent=partial(
            new_values,
            view,
            request.initialize_missing,
            strict=request.strict,
            is_executed=request.placement.must_exist,
        ),
        strict=request.strict,
    )
    is_auto = request.config.torch_dtype == "auto"
    # diffusers stores no dtype beside the weights, and what its class keeps in float32 may be most of what is plain.
    has_no_other = checkpoint.is_quantized and diffusers_facts.is_diffusers(model)
    if (checkpoint.record is not None and (request.as_saved or is_auto)) or (has_no_other and is_auto):
        class_dtypes = {name: pieces[0].tensor.dtype for name, pieces in sources.items() if pieces}
    return config, sources, class_dtypes, rules


def _own_sources(view: ModelView, request: LoadRequest, tensors: Sequence[ModelTensor]) -> _Found:
    """Use the model's own weights. They may be on meta only if the plan is not executed."""
    sources, dtype = _own_weights(tensors, may_be_empty=not request.placement.must_exist)
    if request.placement.must_exist:
        return request.config.resolved(dtype), sources, None, None
    config = request.config.resolved(transformers_facts.config_dtype(view.model) or dtype)
    return config, sources, twins.class_dtypes(view.model, config.load_dtype), None


def _quantized(
    view: ModelView,
    request: LoadRequest,
    config: BnbQuantizationConfig,
    tensors: Sequence[ModelTensor],
    sources: _Sources,
    quantizable: Sequence[type[nn.Linear]],
    read: Mapping[str, str],
) -> tuple[dict[str, nn.Module], ChosenExperts]:
    """Return the layers and the fused experts that are quantized, by path."""
    checkpoint = request.checkpoint
    record = None if checkpoint is None else checkpoint.record
    if checkpoint is not None and checkpoint.is_quantized:
        stored = {
            name: tensor.shape
            for name, pieces in sources.items()
            if isinstance(tensor := pieces[0].tensor, QuantizedTensor)
        }
        recorded = () if record is None else record.experts
        experts = ChosenExperts(experts_stored_quantized(view, config, tensors, stored, recorded))
        others = [name for name in stored if name not in experts.weights]
        return layers_stored_quantized(view, config, tensors, others, quantizable), experts
    if record is not None and request.as_saved:
        return layers_recorded(view, record.layers, quantizable), ChosenExperts()  # the main weights of int8 training
    experts = experts_to_quantize(view, config, tensors)
    layers = layers_to_quantize(view, config, tensors, quantizable, read)
    if checkpoint is not None and (layers or experts.quantized):  # what it does not hold is new, to be trained
        new = {name for name, pieces in sources.items() if pieces and isinstance(pieces[0].tensor, torch.Tensor)}
        layers = {path: layer for path, layer in layers.items() if f"{path}.weight".lstrip(".") not in new}
        lacking = [path for name, (path, _) in experts.weights.items() if name in new]
        experts = experts.without(lacking, "the checkpoint does not hold them, so that they are new")
    warn_of_leftover(view, config, tensors, layers, read, experts)
    return layers, experts


def _require_extra_state_kept(layers: Mapping[str, nn.Module], after: AfterLoad) -> None:
    lost = [path for path in layers if path in after.extra_states]
    if lost:
        raise CheckpointError(
            f"{listed(lost)}: their extra state is in the checkpoint, and a quantized layer has none: add them to "
            "skip_modules"
        )


def _placement(
    view: ModelView,
    tensors: Sequence[PlannedTensor],
    request: PlacementRequest,
    visited: int | None,
    compute_dtype: torch.dtype,
) -> Placement:
    """Place the units. `execute="auto"` lets the CPU compute what is offloaded to it where that is faster.

    Args:
        view: of the model.
        tensors: all of the model's, with their formats.
        request: with a device map that `check_map` has accepted.
        visited: how many experts of each module a token visits, if known.
        compute_dtype: that quantized layers and experts compute in.
    """
    placement = place_units(view, tensors, request)
    if request.offload.execute != "auto" or request.fp32_on_cpu:
        return placement
    by_cpu = replace(request, fp32_on_cpu=True, offload=replace(request.offload, execute="cpu"), warns=False)
    if any(placed.is_by_expert for placed in placement.units):
        with suppress(PlacementError):
            other = place_units(view, tensors, by_cpu)
            if experts_are_faster_on_cpu(placement.units, other.units, visited, compute_dtype):
                return other
    elif not any(map(_is_quantized, tensors)) and is_faster_on_cpu(placement.units):
        with suppress(PlacementError):  # no room for float32
            return place_units(view, tensors, by_cpu)
    return placement


def _placed(
    tensors: Sequence[PlannedTensor],
    layers: Mapping[str, nn.Module],
    experts: ChosenExperts,
    config: BnbQuantizationConfig,
    placement: Placement,
    request: PlacementRequest,
) -> Plan:
    is_mixed = any(placed.device.type == "cuda" for placed in placement.units)
    made = place_tensors(tensors, placement.units, is_mixed=is_mixed)
    if config.llm_int8_has_fp16_weight and any(placed.home is not None for placed in placement.units):
        raise ConfigError(
            "int8-training trains its weights, which must be on the device that computes: offload none of them"
        )
    homeless = [p.tensor.name for p in made if p.home == "disk" and p.stored_as_is is None]
    if homeless and request.offload_folder is None:
        raise PlacementError(
            f"{listed(homeless, 3)}: offloaded to the disk, but not stored in the checkpoint in the form needed: "
            "name an offload_folder"
        )
    quantized = [
        planned.tensor.name for planned in made if is_mixed and planned.device == CPU and _is_quantized(planned)
    ]
    if quantized:
        raise CheckpointError(
            f"{listed(quantized)}: stored quantized, but to be computed on the CPU in float32: use the original "
            "checkpoint, or drop llm_int8_enable_fp32_cpu_offload and execute='cpu', so that they are streamed"
        )
    if is_mixed:  # the CPU computes in float32, without bitsandbytes
        on_cpu = {name for planned in made if planned.device == CPU for name in planned.tensor.names}
        layers = {path: layer for path, layer in layers.items() if f"{path}.weight".lstrip(".") not in on_cpu}
        away = [path for name, (path, _) in experts.weights.items() if name in on_cpu]
        experts = experts.without(away, "the CPU computes them, in float32")
    accounts = accounts_of(
        made,
        placement.units,
        placement.budgets,
        slots=request.offload.slots,
        reserve=request.reserve,
        host_ring=request.host_ring,
    )
    check_accounts(accounts, request.budgets)
    return Plan(
        tuple(made),
        layers,
        placement.device_map,
        config,
        placement.devices,
        placement.units,
        accounts,
        experts=experts.quantized,
        plain_experts=experts.plain,
    )


def _require_scripts_at_hand(view: ModelView, plan: Plan) -> None:
    """Refuse to offload weights of a scripted module: its compiled code would not wait for them."""
    if not plan.offloaded or not any(isinstance(module, torch.jit.ScriptModule) for module in view.modules.values()):
        return
    away = [planned.tensor.name for planned in plan.tensors if planned.home is not None]
    scripted = [name for name in away if isinstance(view.owner(name), torch.jit.ScriptModule)]
    if scripted:
        raise PlacementError(
            f"{listed(scripted)}: of a scripted module, whose compiled code cannot stream its weights: keep it on the "
            "device that computes, by name in device_map"
        )


def _is_quantized(planned: PlannedTensor) -> bool:
    return any(isinstance(source.tensor, QuantizedTensor) for source in planned.sources)


@on_cpu_unless_named()
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
    initialize_missing: Sequence[str] = (),
) -> Plan:
    """Plan a load without loading: the place of every tensor, and the exact bytes needed on each device.

    Args:
        model: on meta or with weights; not changed.
        bnb_quantization_config: as for `load_and_quantize_model`.
        weights_location: the checkpoint; None plans from the model alone, as if a checkpoint held all of its tensors.
        device_map: as for `load_and_quantize_model`; the devices need not exist here.
        no_split_module_classes: as for `load_and_quantize_model`.
        max_memory: as for `load_and_quantize_model`.
        offload_folder: as for `load_and_quantize_model`.
        offload: as for `load_and_quantize_model`.
        key_mapping: as for `load_and_quantize_model`.
        tied_parameters: as for `load_and_quantize_model`.
        quantizable: as for `load_and_quantize_model`.
        initialize_missing: as for `load_and_quantize_model`.

    Returns:
        The plan. `accounts` holds the bytes needed on each device and on the disk, `device_map` and `units` the places,
        `streamed_bytes` the traffic of each forward. Printing it shows a table.

    Raises:
        ConfigError: the config or an argument is invalid.
        CheckpointError: the checkpoint is damaged, or does not fit the model.
        PlacementError: the device map or the budgets cannot be met.

    Examples:
        >>> import bigload
        >>> from torch import nn
        >>> with bigload.init_empty_weights():
        ...     model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 8))
        >>> plan = bigload.plan_device_map(model, "nf4", device_map="cuda:0")
        >>> plan.device_bytes
        {device(type='cuda', index=0): 626784}
    """
    request = load_request(
        bnb_quantization_config,
        weights_location,
        device_map,
        no_split_module_classes,
        max_memory,
        offload_folder,
        offload,
        key_mapping=key_mapping,
        tied_parameters=tied_parameters,
        quantizable=quantizable,
        initialize_missing=initialize_missing,
        must_exist=False,
    )
    with torch.inference_mode(False), torch.no_grad():
        return plan_load(ModelView(model), request)


def _saved_ties(view: ModelView, checkpoint: Checkpoint | None) -> list[tuple[str, str]]:
    """Return the recorded ties of a saved model whose names this model has: it may lose ties when built on meta."""
    if checkpoint is None or checkpoint.record is None:
        return []
    names = view.parameters
    pairs = [(first, other) for first, *others in checkpoint.record.ties for other in others]
    return [(a, b) for a, b in pairs if a in names and b in names and names[a].shape == names[b].shape]


def _quantizable(view: ModelView, request: LoadRequest) -> Sequence[type[nn.Linear]]:
    """Return the subclasses of nn.Linear that are named, else those whose layers were quantized when it was saved."""
    record = None if request.checkpoint is None else request.checkpoint.record
    if request.quantizable or record is None:
        return request.quantizable
    classes = {type(view.modules[path]) for path in record.layers if path in view.modules}
    return [cls for cls in classes if issubclass(cls, nn.Linear) and cls is not nn.Linear]


def _own_weights(
    tensors: Sequence[ModelTensor], *, may_be_empty: bool = False
) -> tuple[Mapping[str, tuple[Source, ...]], torch.dtype]:
    empty = [tensor.name for tensor in tensors if tensor.value.is_meta]
    if empty and not may_be_empty:
        raise CheckpointError(
            f"weights_location is None, but {len(empty)} tensors of the model are on meta: {listed(empty)}; pass the "
            "weights_location",
            missing_keys=empty,
        )
    # Persistent floating-point buffers are cast like the weights, as when they come from a checkpoint.
    own = [t for t in tensors if t.is_parameter or (t.persistent and t.value.is_floating_point())]
    dtype = dominant_dtype((t.value.dtype, t.value.nbytes) for t in own if t.is_parameter)
    return {tensor.name: (Source(tensor.value),) for tensor in own}, dtype
