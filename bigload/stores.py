"""Homes for bytes. In this version one: the memory of the device that computes."""

from __future__ import annotations

import torch


class DeviceStore:
    """Weights in the memory of the device that computes with them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Make room for one tensor, uninitialized.

        Raises:
            torch.OutOfMemoryError: the device has no room.
        """
        return torch.empty(shape, dtype=dtype, device=self.device)
