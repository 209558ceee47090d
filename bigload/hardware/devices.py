"""Devices in every spelling that a device map allows, as `torch.device`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch

from ..errors import PlacementError

Device = int | str | torch.device
DeviceMap = Device | Mapping[str, Device] | None
# Where weights are kept: in a device's memory or in files.
Place = torch.device | Literal["disk"]

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
CPU = torch.device("cpu")


@contextmanager
def on_cpu_unless_named() -> Iterator[None]:
    """Make tensors on the CPU where no device is named, whatever `torch.set_default_device` or a context says."""
    is_cpu = torch.get_default_device().type == "cpu"
    with nullcontext() if is_cpu else CPU:  # each call of torch is slower within a device's context
        yield


def current_gpu(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one. It almost always is: to ask takes a tenth of the time."""
    return nullcontext() if torch.cuda.current_device() == device.index else torch.cuda.device(device)


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream of a device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def is_strategy(device_map: DeviceMap) -> bool:
    """Whether a device map names a strategy, such as "auto", instead of devices."""
    return isinstance(device_map, str) and device_map in STRATEGIES


def as_device(device: Device, *, must_exist: bool = True) -> torch.device:
    """Parse a device; "cuda" is the current GPU.

    Args:
        device: 0, "cuda", "cuda:0", "cpu" or a `torch.device`.
        must_exist: whether this machine must have it; a plan may be for another machine.

    Raises:
        PlacementError: not a device, a type that bigload does not support, or a GPU that does not exist.
    """
    try:
        parsed = torch.device(f"cuda:{device}" if isinstance(device, int) or str(device).isdigit() else device)
    except (RuntimeError, TypeError) as error:
        raise PlacementError(
            f"{device!r} is not a device; expected 'cpu', 'disk', a GPU's number, or 'cuda:N' (or, as a whole "
            "device_map, 'auto' or a dict of block path: device)"
        ) from error
    if parsed.type == "cpu":
        return CPU
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
    return as_device("cuda") if torch.cuda.is_available() else CPU


def named_devices(device_map: DeviceMap) -> list[torch.device]:
    """Return the devices that a device map names, in its order; the default device for None or a strategy.

    Raises:
        PlacementError: one of them does not exist.
    """
    if device_map is None or is_strategy(device_map):
        return [default_device()]
    named = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    return [as_device(device) for device in named if device != "disk"]


def as_place(place: Device, *, must_exist: bool = True) -> Place:
    """Parse a device as `as_device` does, or "disk".

    Raises:
        PlacementError: as `as_device`.
    """
    return "disk" if isinstance(place, str) and place == "disk" else as_device(place, must_exist=must_exist)
