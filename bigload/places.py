"""From a device map in any spelling, and budgets, to a place for every tensor."""

from __future__ import annotations

import gc
import os
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import nn

from . import formats
from .budgets import free_bytes, free_disk_bytes
from .devices import CPU, Device, DeviceMap, Place, as_place, default_device, is_strategy
from .errors import PlacementError, counted, listed
from .formats import FourBit, Plain
from .inference import DoesNotFitError, Item, OffPlace, Rules, infer
from .memory import parse_size, show
from .modules import ModelTensor
from .offload import OffloadConfig
from .placement import PlannedTensor
from .plan import Account, PlacedUnit
from .units import GPU_BYTES, Unit, bytes_of, units_of

_P = TypeVar("_P", bound=Place)
_SMALLER = {name: FourBit("nf4", 64, name == "nf4-dq", torch.uint8) for name in ("nf4", "nf4-dq")}


@dataclass(frozen=True)
class Wishes:
    """What the caller said of places.

    Attributes:
        device_map: in any spelling.
        budgets: from `resolve_budgets`.
        no_split_module_classes: names of classes that one device must hold whole, or None.
        offload: how what is offloaded is kept.
        offload_folder: where "disk" is; None allows no disk that the device map does not name.
        fp32_on_cpu: what rests on the CPU, in a map that also names a GPU, is computed there in float32.
        reserve: bytes of each GPU that are kept free.
        host_ring: bytes of the buffer that files are read through on their way to a GPU.
        must_exist: whether devices must be this machine's: a plan may be for another.
    """

    device_map: DeviceMap = None
    budgets: Mapping[Place, int] = field(default_factory=dict)
    no_split_module_classes: Collection[str] | None = None
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    offload_folder: str | os.PathLike[str] | None = None
    fp32_on_cpu: bool = False
    reserve: int = 0
    host_ring: int = 0
    must_exist: bool = True


@dataclass(frozen=True)
class Placement:
    """Where everything goes.

    Attributes:
        device_map: block path -> where its weights rest.
        devices: block path -> the device that computes it.
        units: placed, in the order of the model.
        budgets: what each place may give, as far as it is known.
    """

    device_map: Mapping[str, Place]
    devices: Mapping[str, torch.device]
    units: tuple[PlacedUnit, ...]
    budgets: Mapping[Place, int]


def resolve_budgets(max_memory: Mapping[Device, int | str] | None, *, must_exist: bool = True) -> dict[Place, int]:
    """Take the caller's `max_memory`: {device in any spelling, or "disk": bytes in any spelling}.

    Args:
        max_memory: what the caller gave.
        must_exist: whether devices must be this machine's.

    Raises:
        PlacementError: no such device, not a size, or one device twice.
    """
    if max_memory is not None and not isinstance(max_memory, Mapping):
        raise PlacementError(f"max_memory must be {{device: bytes or '10GiB'}}, but it is {max_memory!r}")
    sizes = {device: parse_size(size) for device, size in (max_memory or {}).items()}
    budgets: dict[Place, int] = {}
    for device, size in sizes.items():
        try:
            place = as_place(device, must_exist=must_exist)
        except PlacementError as error:
            raise PlacementError(f"max_memory: {error}") from error
        if place in budgets:
            raise PlacementError(f"max_memory names {place} twice; give each device one budget")
        budgets[place] = size
    return budgets


def check_map(
    device_map: DeviceMap,
    tensors: Sequence[ModelTensor],
    module_names: Collection[str],
    *,
    must_exist: bool = True,
) -> None:
    """Refuse a device map that names what is not there, or leaves out what is.

    Raises:
        PlacementError: unknown blocks or devices, or tensors left out.
    """
    if device_map is None or is_strategy(device_map):
        return
    if not isinstance(device_map, Mapping):
        as_place(device_map, must_exist=must_exist)
        return
    for place in device_map.values():
        as_place(place, must_exist=must_exist)
    names = {name for tensor in tensors for name in tensor.names}
    unknown = [path for path in device_map if path and path not in names and path not in module_names]
    if unknown:
        raise PlacementError(f"device_map names {listed(unknown)}, which are no modules or parameters of the model")
    homeless = [tensor.name for tensor in tensors if longest_match(tensor.name, device_map) is None]
    if homeless:
        raise PlacementError(
            f"device_map leaves out {counted(len(homeless), 'tensor')}: {listed(homeless)}; add their blocks, or '' "
            "for the rest"
        )


def longest_match(name: str, paths: Collection[str]) -> str | None:
    """Find the longest of some paths that leads to a tensor."""
    path = name
    while path not in paths:
        if not path:
            return None
        path = path.rpartition(".")[0]
    return path


def only_device(wishes: Wishes) -> torch.device | None:
    """Give the device that all of a model goes to, or may go to where a strategy decides; None where there are more."""
    device_map = wishes.device_map
    if is_strategy(device_map):
        devices = _computing(wishes.budgets)
        return devices[0] if len(devices) == 1 else None
    if device_map is None:
        return default_device()
    places = set(_places_of(device_map, wishes).values())
    (place,) = places if len(places) == 1 else (None,)
    return None if place == "disk" else place


def place_whole(tensors: Sequence[PlannedTensor], device: torch.device, wishes: Wishes) -> Placement | None:
    """Place all of a model on one device; None where a strategy must look further, since it does not fit there.

    Args:
        tensors: all of it, on that device already.
        device: from `only_device`.
        wishes: what the caller said.
    """
    on_gpu = device.type == "cuda"
    needed = bytes_of(tensors, GPU_BYTES if on_gpu else 1) + (wishes.reserve if on_gpu else 0)
    budgets: dict[Place, int] = dict(wishes.budgets)
    is_free = is_strategy(wishes.device_map)
    if wishes.must_exist or is_free:
        budgets[device] = _budget(device, wishes, needed)
        if is_free and needed > budgets[device]:
            return None
    paths = wishes.device_map if isinstance(wishes.device_map, Mapping) else ("",)
    places = dict.fromkeys(paths, device)
    return Placement(places, places, (), budgets)


def _places_of(device_map: Device | Mapping[str, Device], wishes: Wishes) -> dict[str, Place]:
    given = device_map if isinstance(device_map, Mapping) else {"": device_map}
    return {path: as_place(place, must_exist=wishes.must_exist) for path, place in given.items()}


def place_units(model: nn.Module, tensors: Sequence[PlannedTensor], wishes: Wishes) -> Placement:
    """Give every unit of a model its place.

    Args:
        model: read only.
        tensors: all of it, with their formats.
        wishes: what the caller said; its device map has been checked.

    Raises:
        PlacementError: it cannot be met.
    """
    units = units_of(model, tensors, wishes.no_split_module_classes)
    device_map = wishes.device_map
    if is_strategy(device_map):
        return _inferred(units, str(device_map), wishes)
    if device_map is None:
        device_map = default_device()
    return _given(units, _places_of(device_map, wishes), wishes)


def place_tensors(
    tensors: Sequence[PlannedTensor], units: Sequence[PlacedUnit], *, is_mixed: bool
) -> list[PlannedTensor]:
    """Give tensors the places of their units.

    Args:
        tensors: in the order that they shall keep.
        units: placed.
        is_mixed: GPUs compute too, so that what the CPU computes is float32 there.
    """
    found: dict[int, PlannedTensor] = {}
    for placed in units:
        leaving = {id(planned) for planned in placed.unit.offloaded} if placed.home is not None else set()
        for planned in placed.unit.tensors:
            home = placed.home if id(planned) in leaving else None
            if placed.device == CPU and is_mixed:
                found[id(planned)] = planned.on_cpu()
            else:
                found[id(planned)] = replace(planned, device=placed.device, home=home)
    return [found[id(planned)] for planned in tensors]


def _inferred(units: Sequence[Unit], strategy: str, wishes: Wishes) -> Placement:
    devices = _computing(wishes.budgets)
    on_gpu = devices[0].type == "cuda"
    reserve = wishes.reserve if on_gpu else 0
    needed = sum(unit.gpu_bytes for unit in units) + reserve
    budgets: dict[Place, int] = {device: _budget(device, wishes, needed) for device in devices}
    # A GPU that others have filled, or that the caller gives nothing of, is none.
    devices = [device for device in devices if budgets[device] > reserve] or devices
    homes: dict[OffPlace, int] = {}
    if on_gpu:
        budgets[CPU] = _budget(CPU, wishes, needed)
        homes["cpu"] = max(0, budgets[CPU] - wishes.host_ring)
    if wishes.offload_folder is not None:
        free = free_disk_bytes(wishes.offload_folder)
        budgets["disk"] = homes["disk"] = wishes.budgets.get("disk", free)
    fp32 = wishes.fp32_on_cpu and on_gpu
    if fp32:
        homes.pop("disk", None)
    items = [_item(unit, on_gpu=on_gpu, fp32=fp32) for unit in units]
    rules = Rules(strategy, wishes.offload.slots, from_end=fp32)
    try:
        assigned = infer(items, [budgets[device] - reserve for device in devices], homes, rules)
    except DoesNotFitError as error:
        raise _explained(error, units, devices, reserve, may_use_disk=not fp32 and "disk" not in homes) from None
    placed = tuple(
        PlacedUnit(unit, CPU)
        if fp32 and one.away
        else PlacedUnit(unit, devices[one.device], None if one.away is None else as_place(one.away))
        for unit, one in zip(units, assigned, strict=True)
    )
    return _as_placement(placed, budgets)


def _as_placement(placed: tuple[PlacedUnit, ...], budgets: Mapping[Place, int]) -> Placement:
    by_path = {path: one for one in placed for path in one.unit.paths}
    devices = _shortened({path: one.device for path, one in by_path.items()})
    rests = _shortened({path: one.home or one.device for path, one in by_path.items()})
    return Placement(rests, devices, placed, budgets)


def _shortened(places: Mapping[str, _P]) -> dict[str, _P]:
    return {"": next(iter(places.values()))} if len(set(places.values())) == 1 else dict(places)


def _computing(budgets: Mapping[Place, int]) -> list[torch.device]:
    """List the devices that compute: GPUs that the budgets name, all if they name no device, or else the CPU."""
    named = [place for place in budgets if isinstance(place, torch.device)]
    gpus = sorted((place for place in named if place.type == "cuda"), key=lambda place: place.index)
    if gpus:
        return gpus
    if named or not torch.cuda.is_available():
        return [CPU]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def _budget(device: torch.device, wishes: Wishes, needed: int) -> int:
    """Give what the caller allows of a device, or else what can be had now."""
    if device in wishes.budgets:
        return wishes.budgets[device]
    free = free_bytes(device)
    if free < needed:
        gc.collect()  # a model that was let go of may be there still: bitsandbytes' layers refer to themselves
        free = free_bytes(device)
    return free


def _item(unit: Unit, *, on_gpu: bool, fp32: bool) -> Item:
    resident = unit.gpu_bytes if on_gpu else unit.nbytes
    if not unit.has_parameters:
        return Item(resident, resident, 0, 0, is_block=False, is_first=True)
    if fp32:
        return Item(resident, 0, unit.fp32_bytes, 0, is_block=unit.is_block)
    return Item(resident, unit.staying_bytes, unit.group_bytes, unit.streamed_bytes, is_block=unit.is_block)


def _explained(
    error: DoesNotFitError,
    units: Sequence[Unit],
    devices: Sequence[torch.device],
    reserve: int,
    *,
    may_use_disk: bool,
) -> PlacementError:
    """Say by how much it does not fit, where, and what would help."""
    is_device = isinstance(error.place, int)
    place = devices[error.place] if isinstance(error.place, int) else error.place
    if error.item is not None:
        unit, allowed = units[error.item], error.allowed
        what = f"'{unit.name}' alone" if unit.name else "the model"
        needed = f"{what} needs {show(error.needed)} on {place}"
    else:
        allowed = error.allowed
        needed = f"what must be there needs {show(error.needed)} on {place}"
    extra = f", beside {show(reserve)} kept for activations" if is_device and reserve else ""
    helps = [] if error.item is not None else _smaller_modes(units)
    if may_use_disk and error.item is None:
        helps.append("an offload_folder, so that blocks may rest on a disk")
    helps.append(f"a budget {show(error.needed - max(allowed, 0))} larger")
    return PlacementError(
        f"{needed}, where {show(max(allowed, 0))} may be used{extra}: "
        f"{show(error.needed - max(allowed, 0))} too little; what would help: {', '.join(helps)}"
    )


def _smaller_modes(units: Sequence[Unit]) -> list[str]:
    """Name modes in which the layers that are quantized would take less, with what the whole model would."""
    tensors = {id(planned): planned for unit in units for planned in unit.tensors}.values()
    total, found = sum(planned.nbytes for planned in tensors), []
    for mode, fmt in _SMALLER.items():
        made = sum(
            planned.nbytes if isinstance(planned.format, Plain) else formats.nbytes(fmt, planned.shape)
            for planned in tensors
        )
        if made < total:
            found.append(f"{mode} ({show(made)} in all, not {show(total)})")
    return found


def check_accounts(accounts: Sequence[Account]) -> None:
    """Refuse a plan that needs more of a place than it may have.

    Raises:
        PlacementError: names the place, what the plan needs there, and what it may have.
    """
    for account in accounts:
        if account.free is not None and account.free < 0:
            beside = f" (of it {show(account.reserve)} kept for activations)" if account.reserve else ""
            raise PlacementError(
                f"the model needs {show(account.needed)}{beside} on {account.place}, max_memory allows "
                f"{show(account.budget or 0)}, {show(-account.free)} too little; choose a smaller mode, another "
                "device_map or a larger budget"
            )


def _given(units: Sequence[Unit], places: Mapping[str, Place], wishes: Wishes) -> Placement:
    gpus = list(dict.fromkeys(p for p in places.values() if p != "disk" and p.type == "cuda"))
    computing = gpus or [CPU]
    on_cpu = bool(gpus) and wishes.fp32_on_cpu
    placed: list[PlacedUnit] = []
    turn = 0
    for unit in units:
        found = _places_in(unit, places)
        devices = [place for place in found if isinstance(place, torch.device) and (place.type == "cuda" or not gpus)]
        away = [place for place in found if place not in devices]
        if len(devices) > 1 or len(away) > 1 or (devices and away and (on_cpu or unit.looks_up)):
            raise _cut(unit, places, found)
        if not away:
            placed.append(PlacedUnit(unit, devices[0]))
        elif on_cpu and away[0] == CPU:
            placed.append(PlacedUnit(unit, CPU))
        else:
            device = devices[0] if devices else computing[turn % len(computing)]
            turn += not devices
            part = _part(unit, away[0], places)
            placed.append(PlacedUnit(part, device, away[0]) if part.offloaded else PlacedUnit(unit, device))
    used = {one.device for one in placed} | {CPU for one in placed if one.home == CPU}
    budgets: dict[Place, int] = dict(wishes.budgets)
    if wishes.must_exist:
        for device in used:
            needed = sum(one.unit.gpu_bytes for one in placed if one.device == device) + wishes.reserve
            budgets[device] = _budget(device, wishes, needed)
    made = replace(_as_placement(tuple(placed), budgets), device_map=dict(places))
    if used == set(places.values()) and len(used) == 1:
        return replace(made, devices=dict.fromkeys(places, computing[0]))
    return made


def _places_in(unit: Unit, places: Mapping[str, Place]) -> list[Place]:
    """List the places that a map gives a unit's tensors."""
    found: dict[Place, None] = {}
    for planned in unit.tensors:
        for name in planned.tensor.names:
            path = longest_match(name, places)
            if path is not None:
                found[places[path]] = None
    return list(found)


def _part(unit: Unit, away: Place, places: Mapping[str, Place]) -> Unit:
    """Give a unit of which only what the map says is offloaded."""
    leaving = [
        planned for planned in unit.offloaded if places[longest_match(planned.tensor.name, places) or ""] == away
    ]
    return replace(unit, offloaded=tuple(leaving))


def _cut(unit: Unit, places: Mapping[str, Place], found: Sequence[Place]) -> PlacementError:
    by_place: dict[Place, list[str]] = defaultdict(list)
    for path, place in places.items():
        if any(longest_match(name, places) == path for planned in unit.tensors for name in planned.tensor.names):
            by_place[place].append(path)
    said = "; ".join(f"{listed(by_place[place], 3)} on {place}" for place in found)
    what = f"what shares a weight: {listed(unit.paths)}"
    if len(unit.paths) == 1:
        what = f"the block '{unit.name}'" if unit.is_block else f"the module '{unit.name}'"
    return PlacementError(f"device_map divides {what} ({said}): one device must hold it whole")
