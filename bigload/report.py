"""What a load did, in figures."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .memory import show


@dataclass(frozen=True)
class LoadReport:
    """The figures of one load.

    Attributes:
        mode: the quantization mode's short name.
        bytes_read: bytes of the weights that went in: the checkpoint's, or the model's own.
        elapsed_s: seconds of the call, without the import of bitsandbytes.
        device_bytes: bytes of the loaded model on each device.
    """

    mode: str
    bytes_read: int
    elapsed_s: float
    device_bytes: dict[torch.device, int] = field(default_factory=dict)

    @property
    def gb_per_s(self) -> float:
        """Checkpoint bytes per second, in units of 10^9."""
        return self.bytes_read / self.elapsed_s / 1e9

    @property
    def nbytes(self) -> int:
        """Bytes of the loaded model on all devices."""
        return sum(self.device_bytes.values())

    def __str__(self) -> str:
        homes = ", ".join(f"{show(count)} on {device}" for device, count in self.device_bytes.items())
        speed = f"read {self.bytes_read / 1e9:.3f} GB in {self.elapsed_s:.2f} s at {self.gb_per_s:.2f} GB/s"
        return f"{speed} into {homes} as {self.mode}"
