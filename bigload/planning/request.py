"""What a caller says of places: a device map in any spelling, budgets, what may not be cut."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..config import OffloadConfig
from ..errors import PlacementError, counted, listed
from ..hardware.devices import CPU, Device, DeviceMap, Place, as_place, default_device, is_strategy
from ..model.tensors import ModelTensor
from ..sizes import parse_size


@dataclass(frozen=True)
class PlacementRequest:
    """What the caller said of places.

    Attributes:
        device_map: in any spelling.
        budgets: from `resolve_budgets`.
        no_split_module_classes: names of classes that one device must hold whole, or None.
        offload: how what is offloaded is kept.
        offload_folder: where "disk" is; None allows no disk that the device map does not name.
        fp32_on_cpu: what rests on the CPU, in a map that also names a GPU, is computed there in float32.
        reserve: bytes of each GPU that are kept free, which follow from `offload` and the model.
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
    for path, place in device_map.items():
        try:
            as_place(place, must_exist=must_exist)
        except PlacementError as error:
            raise PlacementError(f"device_map[{path!r}]: {error}") from error
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


def only_device(request: PlacementRequest) -> torch.device | None:
    """Return the device that all of a model goes to, or may go to by a strategy; None where there are more."""
    device_map = request.device_map
    if is_strategy(device_map):
        devices = computing_devices(request.budgets)
        return devices[0] if len(devices) == 1 else None
    if device_map is None:
        return default_device()
    places = set(places_of(device_map, request).values())
    (place,) = places if len(places) == 1 else (None,)
    return None if place == "disk" else place


def places_of(device_map: Device | Mapping[str, Device], request: PlacementRequest) -> dict[str, Place]:
    """Return the place that each path of a map has, or "" where there is one for all.

    Raises:
        PlacementError: no such device.
    """
    given = device_map if isinstance(device_map, Mapping) else {"": device_map}
    return {path: as_place(place, must_exist=request.must_exist) for path, place in given.items()}


def computing_devices(budgets: Mapping[Place, int]) -> list[torch.device]:
    """List the devices that compute: GPUs that the budgets name, all if they name no device, or else the CPU."""
    named = [place for place in budgets if isinstance(place, torch.device)]
    gpus = sorted((place for place in named if place.type == "cuda"), key=lambda place: place.index)
    if gpus:
        return gpus
    if named or not torch.cuda.is_available():
        return [CPU]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
