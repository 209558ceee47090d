"""Devices and places in every spelling: which of this machine's are meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from ..errors import PlacementError

Device = int | str | torch.device
DeviceMap = Device | Mapping[str, Device] | None
# Where weights rest: in the memory of a device, or in files.
Place = torch.device | Literal["disk"]

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
CPU = torch.device("cpu")


def is_strategy(device_map: DeviceMap) -> bool:
    """Whether a device map leaves it to bigload where blocks go."""
    return isinstance(device_map, str) and device_map in STRATEGIES


def as_device(device: Device, *, must_exist: bool = True) -> torch.device:
    """Take a device in any spelling and check that it exists: 0, "cuda", "cuda:0", "cpu", a `torch.device`.

    Args:
        device: in any spelling.
        must_exist: whether it must be one of this machine's; a plan may be for another.

    Raises:
        PlacementError: not a device, not one of this machine, or one that bigload does not run on.
    """
    try:
        parsed = torch.device(f"cuda:{device}" if isinstance(device, int) or str(device).isdigit() else device)
    except (RuntimeError, TypeError) as error:
        raise PlacementError(
            f"{device!r} is not a device; expected 'cpu', 'disk', a GPU's number, or 'cuda:N' (or, as a whole "
            "device_map, 'auto' or a dict of block path: device)"
        ) from error
    if parsed.type == "cpu":
        return torch.device("cpu")
    if parsed.type != "cuda":
        raise PlacementError(f"device '{parsed}' is of a kind bigload does not load onto; use 'cpu' or 'cuda:N'")
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if parsed.index is None and count else parsed.index or 0
    if must_exist and index >= count:
        have = f"{count} CUDA device(s), 0 to {count - 1}" if count else "no CUDA device"
        raise PlacementError(f"device '{parsed}' does not exist: this machine has {have}")
    return torch.device("cuda", index)


def default_device() -> torch.device:
    """Return the current GPU, or the CPU where there is none."""
    return as_device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def named_devices(device_map: DeviceMap) -> list[torch.device]:
    """List the devices that a device map names, in its order.

    Raises:
        PlacementError: one of them does not exist.
    """
    if device_map is None or is_strategy(device_map):
        return [default_device()]
    named = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    return [as_device(device) for device in named if device != "disk"]


def as_place(place: Device, *, must_exist: bool = True) -> Place:
    """Take a device in any spelling, or "disk".

    Args:
        place: in any spelling.
        must_exist: as for `as_device`.

    Raises:
        PlacementError: as `as_device`.
    """
    return "disk" if isinstance(place, str) and place == "disk" else as_device(place, must_exist=must_exist)
