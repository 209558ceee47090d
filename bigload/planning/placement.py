"""Chooses a place for every tensor, from the device map and the memory budgets."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from ..errors import listed
from ..hardware.devices import CPU, Place, as_place, default_device, is_strategy
from ..hardware.free_memory import free_bytes, free_disk_bytes
from ..hardware.interrupts import interruptible
from ..model.view import ModelView
from ..notation import show
from .advice import ONLY_LEAVES_LEAVE, does_not_fit_error, split_unit_error
from .placing.accounts import PlacedUnit
from .placing.expert_caches import place_by_expert, with_caches
from .placing.solver import DoesNotFitError, Item, OffPlace, Rules, solve_placement
from .planned_tensors import PlannedTensor
from .request import PlacementRequest, computing_devices, longest_match, places_of
from .units import GPU_BYTES, RESIDENT_BYTES, Unit, bytes_of, units_of, whole_model

logger = logging.getLogger(__name__)

_P = TypeVar("_P", bound=Place)

_ANY_DISK = 2**62  # bytes of a disk that nobody has named yet


@dataclass(frozen=True)
class Placement:
    """The place of every unit.

    Attributes:
        device_map: block path -> the place that stores its weights.
        devices: block path -> the device that computes it.
        units: in the order of the model.
        budgets: bytes that may be used of each place, where known.
    """

    device_map: Mapping[str, Place]
    devices: Mapping[str, torch.device]
    units: tuple[PlacedUnit, ...]
    budgets: Mapping[Place, int]


def place_whole(tensors: Sequence[PlannedTensor], device: torch.device, request: PlacementRequest) -> Placement | None:
    """Place the whole model on one device; None if a strategy was asked for and the model does not fit there.

    Args:
        tensors: all of the model's, with that device.
        device: from `only_device`.
        request: the arguments that concern placement.
    """
    on_gpu = device.type == "cuda"
    needed = bytes_of(tensors, GPU_BYTES if on_gpu else 1) + (request.reserve if on_gpu else 0)
    budgets: dict[Place, int] = dict(request.budgets)
    is_free = is_strategy(request.device_map)
    if request.must_exist or is_free:
        budgets[device] = _budget(device, request, needed)
        if is_free and needed > budgets[device]:
            return None
    paths = request.device_map if isinstance(request.device_map, Mapping) else ("",)
    places = dict.fromkeys(paths, device)
    return Placement(places, places, (PlacedUnit(whole_model(tensors), device),), budgets)


def place_units(view: ModelView, tensors: Sequence[PlannedTensor], request: PlacementRequest) -> Placement:
    """Choose a place for every unit of a model.

    Args:
        view: of the model.
        tensors: all of the model's, with their formats.
        request: with a device map that `check_map` has accepted.

    Raises:
        PlacementError: the device map or the budgets cannot be met.
    """
    units = units_of(view, tensors, request.no_split_module_classes, warns=request.warns)
    device_map = request.device_map
    if is_strategy(device_map):
        return _place_by_strategy(units, str(device_map), request)
    if device_map is None:
        device_map = default_device()
    return _place_by_map(units, places_of(device_map, request), request)


def place_tensors(
    tensors: Sequence[PlannedTensor], units: Sequence[PlacedUnit], *, is_mixed: bool
) -> list[PlannedTensor]:
    """Return the tensors, in the same order, with the places of their units.

    Args:
        tensors: all of the model's.
        units: of these tensors.
        is_mixed: GPUs compute too, so the units that the CPU computes are in float32.
    """
    found: dict[int, PlannedTensor] = {}
    for placed in units:
        leaving = {id(planned) for planned in placed.unit.offloaded} if placed.home is not None else set()
        for planned in interruptible(placed.unit.tensors):
            home = placed.home if id(planned) in leaving else None
            if placed.device == CPU and is_mixed:
                found[id(planned)] = planned.on_cpu()
            elif (planned.device, planned.home) == (placed.device, home):
                found[id(planned)] = planned
            else:
                found[id(planned)] = replace(planned, device=placed.device, home=home)
    return [found[id(planned)] for planned in tensors]


def _place_by_strategy(units: Sequence[Unit], strategy: str, request: PlacementRequest) -> Placement:
    devices = computing_devices(request.budgets)
    on_gpu = devices[0].type == "cuda"
    reserve = request.reserve if on_gpu else 0
    needed = sum(unit.gpu_bytes for unit in units) + reserve
    budgets: dict[Place, int] = {device: _budget(device, request, needed) for device in devices}
    # Leave out GPUs that other processes have filled, or whose budget is zero.
    devices = [device for device in devices if budgets[device] > reserve] or devices
    homes: dict[OffPlace, int] = {}
    if on_gpu:
        budgets[CPU] = _budget(CPU, request, needed)
        homes["cpu"] = max(0, budgets[CPU] - request.host_ring)
    if request.offload_folder is not None:
        free = free_disk_bytes(request.offload_folder)
        budgets["disk"] = homes["disk"] = request.budgets.get("disk", free)
    elif "disk" in request.budgets and request.warns:
        logger.warning("max_memory has a budget for 'disk', which nothing goes to: name an offload_folder too")
    fp32 = request.fp32_on_cpu and on_gpu
    if fp32:
        homes.pop("disk", None)
    if not request.may_offload:
        homes.clear()
    items = [_item(unit, on_gpu=on_gpu, fp32=fp32) for unit in units]
    rules = Rules(strategy, request.offload.slots, from_end=fp32)
    room = [budgets[device] - reserve for device in devices]
    try:
        # Before the CPU gets whole blocks in float32, which for their experts takes eight times as much.
        first = fp32 and request.offload.execute == "cpu" and not _fits(items, room, {}, rules)
        by_expert = place_by_expert(units, items, devices, room, homes, rules, request.offload) if first else None
        assigned = [] if by_expert is not None else solve_placement(items, room, homes, rules)
        if on_gpu and any(one.away and item.streamed for one, item in zip(assigned, items, strict=False)):
            by_expert = place_by_expert(units, items, devices, room, homes, rules, request.offload)
        if by_expert is not None:
            return _as_placement(tuple(by_expert), budgets)
    except DoesNotFitError as error:
        if error.place == "cpu":
            error.allowed = budgets[CPU] - request.host_ring  # negative if not even the ring fits
        raise does_not_fit_error(
            error,
            units,
            devices,
            reserve,
            may_use_disk=not fp32
            and request.may_offload
            and "disk" not in homes
            and _fits(items, room, homes | {"disk": request.budgets.get("disk", _ANY_DISK)}, rules),
            may_leave_out=_fits_without(error.place, items, room, homes, rules),
        ) from None
    placed = tuple(
        PlacedUnit(unit, CPU)
        if fp32 and one.away
        else PlacedUnit(unit, devices[one.device], None if one.away is None else as_place(one.away))
        for unit, one in zip(units, assigned, strict=True)
    )
    return _as_placement(placed, budgets)


def _fits_without(
    place: int | OffPlace, items: Sequence[Item], room: Sequence[int], homes: dict[OffPlace, int], rules: Rules
) -> bool:
    """Whether the model fits without a device: streamed units take turns even on a device too small for slots."""
    if not isinstance(place, int) or len(room) < 2:
        return False
    return _fits(items, [bytes_ for number, bytes_ in enumerate(room) if number != place], homes, rules)


def _fits(items: Sequence[Item], room: Sequence[int], homes: dict[OffPlace, int], rules: Rules) -> bool:
    with suppress(DoesNotFitError):
        solve_placement(items, room, homes, rules)
        return True
    return False


def _as_placement(placed: tuple[PlacedUnit, ...], budgets: Mapping[Place, int]) -> Placement:
    by_path = {path: one for one in placed for path in one.unit.paths}
    devices = _shortened({path: one.device for path, one in by_path.items()})
    places: dict[str, Place] = {}
    for path, one in by_path.items():
        stays = one.home is None or (one.is_by_expert and path not in one.unit.fused)
        places[path] = one.device if stays else one.home or one.device
        if one.home is not None and stays:
            places |= dict.fromkeys(one.unit.fused, one.home)
    device_map = _shortened(places)
    return Placement(device_map, devices, placed, budgets)


def _shortened(places: Mapping[str, _P]) -> dict[str, _P]:
    return {"": next(iter(places.values()))} if len(set(places.values())) == 1 else dict(places)


def _budget(device: torch.device, request: PlacementRequest, needed: int) -> int:
    """Return the bytes that the caller allows on a device, by default those that are free now."""
    if device in request.budgets:
        return request.budgets[device]
    free = free_bytes(device)
    if free < needed:
        gc.collect()  # bitsandbytes' layers are reference cycles: a deleted model may still hold memory
        free = free_bytes(device)
    return free


def _item(unit: Unit, *, on_gpu: bool, fp32: bool) -> Item:
    resident = unit.gpu_bytes if on_gpu else unit.nbytes
    if not unit.has_parameters:
        return Item(resident, resident, 0, 0, is_block=False, is_first=True)
    if fp32:
        return Item(resident, 0, unit.fp32_bytes, 0, is_block=unit.is_block)
    return Item(resident, unit.staying_bytes, unit.group_bytes, unit.streamed_bytes, is_block=unit.is_block)


def _place_by_map(units: Sequence[Unit], places: Mapping[str, Place], request: PlacementRequest) -> Placement:
    gpus = list(dict.fromkeys(p for p in places.values() if p != "disk" and p.type == "cuda"))
    computing = gpus or [CPU]
    on_cpu = bool(gpus) and request.fp32_on_cpu
    placed: list[PlacedUnit] = []
    staying: dict[str, list[str]] = {"small": [], "shared": []}
    turn = 0
    for unit in units:
        found = _places_in(unit, places)
        devices = [place for place in found if isinstance(place, torch.device) and (place.type == "cuda" or not gpus)]
        away = [place for place in found if place not in devices]
        part = (
            _unit_offloading(unit, away[0], places) if devices and away and request.offload.execute == "cpu" else None
        )
        by_cpu = part is not None and away == [CPU] and part.is_by_expert and part.can_stay_with_cpu
        if len(devices) > 1 or len(away) > 1 or (devices and away and (unit.is_embedding or (on_cpu and not by_cpu))):
            raise split_unit_error(unit, places, found)
        if not away:
            placed.append(PlacedUnit(unit, devices[0]))
        elif by_cpu and part is not None:
            placed.append(PlacedUnit(part, devices[0], CPU, by_cpu=True))
            _note_staying(part, CPU, places, staying)
        elif on_cpu and away[0] == CPU:
            placed.append(PlacedUnit(unit, CPU))
        else:
            device = devices[0] if devices else computing[turn % len(computing)]
            turn += not devices
            mapped = _unit_offloading(unit, away[0], places)
            placed.append(PlacedUnit(mapped, device, away[0]) if mapped.offloaded else PlacedUnit(unit, device))
            _note_staying(mapped, away[0], places, staying)
    if request.warns:
        _warn_of_staying(staying)
    used = {one.device for one in placed} | {CPU for one in placed if one.home == CPU}
    budgets: dict[Place, int] = dict(request.budgets)
    if request.must_exist:
        for device in used:
            needed = sum(one.unit.gpu_bytes for one in placed if one.device == device) + request.reserve
            budgets[device] = _budget(device, request, needed)
    placed = with_caches(placed, budgets, request)
    made = replace(_as_placement(tuple(placed), budgets), device_map=dict(places))
    if used == set(places.values()) and len(used) == 1:
        return replace(made, devices=dict.fromkeys(places, computing[0]))
    return made


def _note_staying(unit: Unit, away: Place, places: Mapping[str, Place], staying: Mapping[str, list[str]]) -> None:
    """Note what a map sends away and stays: large tensors, and a unit of small ones only.

    The biases of experts stay beside their cache, which is no surprise.
    """
    leaving = set(map(id, unit.offloaded))
    sent = [
        planned
        for planned in unit.tensors
        if id(planned) not in leaving
        and places[longest_match(planned.tensor.name, places) or ""] == away
        and not (unit.is_by_expert and planned.tensor.name.rpartition(".")[0] in unit.fused)
    ]
    large = [planned.tensor.name for planned in sent if planned.nbytes >= RESIDENT_BYTES]
    staying["shared"] += large
    if sent and not leaving and not large:
        staying["small"].append(unit.name)


def _warn_of_staying(staying: Mapping[str, list[str]]) -> None:
    if staying["small"]:
        logger.warning(
            "device_map offloads %s, which stay on the device that computes: their tensors are all below %s",
            listed(staying["small"]),
            show(RESIDENT_BYTES),
        )
    if staying["shared"]:
        logger.warning(
            "device_map offloads %s, which stay on the device that computes: %s",
            listed(staying["shared"]),
            ONLY_LEAVES_LEAVE,
        )


def _places_in(unit: Unit, places: Mapping[str, Place]) -> list[Place]:
    """List the places of a unit's tensors in a device map."""
    found: dict[Place, None] = {}
    for planned in unit.tensors:
        for name in planned.tensor.names:
            path = longest_match(name, places)
            if path is not None:
                found[places[path]] = None
    return list(found)


def _unit_offloading(unit: Unit, away: Place, places: Mapping[str, Place]) -> Unit:
    """Return the unit with only those tensors offloaded that the map puts on `away`."""
    leaving = [
        planned for planned in unit.offloaded if places[longest_match(planned.tensor.name, places) or ""] == away
    ]
    mapped = replace(unit, offloaded=tuple(leaving))
    biases = [p.tensor.name for p in leaving if p.tensor.name.rpartition(".")[0] in mapped.fused]
    return mapped.by_expert() if len(biases) == len(leaving) else mapped  # the biases of experts stay with their cache
