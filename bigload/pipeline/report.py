"""The figures of a load: bytes, seconds and peak memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from ..sizes import show


@dataclass(frozen=True)
class LoadReport:
    """The figures of one load.

    Attributes:
        mode: the quantization mode's short name.
        bytes_read: bytes of the weights that were loaded, from the checkpoint or from the model itself.
        elapsed_s: seconds that the call took, without the import of bitsandbytes.
        device_bytes: bytes of the loaded model on each device.
        peak_bytes: the peak memory of the load on each device, including the model: for a GPU what torch allocated,
            for "cpu" the resident memory. A device is left out if the process had used more of it before the load.
    """

    mode: str
    bytes_read: int
    elapsed_s: float
    device_bytes: dict[torch.device, int] = field(default_factory=dict)
    peak_bytes: dict[torch.device, int] = field(default_factory=dict)
    source: Path | None = None

    @property
    def gb_per_s(self) -> float:
        """Checkpoint bytes per second, in units of 10^9."""
        return self.bytes_read / self.elapsed_s / 1e9

    @property
    def nbytes(self) -> int:
        """Bytes of the loaded model on all devices."""
        return sum(self.device_bytes.values())

    def __str__(self) -> str:
        placed = ", ".join(f"{show(count)} on {device}" for device, count in self.device_bytes.items())
        speed = f"read {self.bytes_read / 1e9:.3f} GB in {self.elapsed_s:.2f} s at {self.gb_per_s:.2f} GB/s"
        peaks = ", ".join(f"{show(count)} on {device}" for device, count in self.peak_bytes.items())
        return f"{speed} into {placed} as {self.mode}" + (f", at most {peaks} on the way" if peaks else "")


class PeakMemory:
    """The peak memory of devices from its creation on, measured without resetting torch's statistics."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        """Begin to watch the devices, and the CPU in any case."""
        watched = dict.fromkeys([*devices, torch.device("cpu")])
        self._before = {device: _used_and_highest(device) for device in watched}

    def since(self) -> dict[torch.device, int]:
        """Return the peak of each device in bytes, above what was in use at the start.

        A device is left out if its peak since then is below an earlier peak of the process.
        """
        peaks = {}
        for device, (used, highest) in self._before.items():
            now = _used_and_highest(device)[1]
            if now > highest:
                peaks[device] = max(0, now - used)
        return peaks


def _used_and_highest(device: torch.device) -> tuple[int, int]:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return psutil.Process().memory_info().rss, highest * (1 if sys.platform == "darwin" else 1024)
