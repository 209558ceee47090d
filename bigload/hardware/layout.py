"""Tensors in one piece of memory: what they are, where each of them lies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

Shape = tuple[int, ...]

# Where a part of a group may begin: what CUDA's kernels and copies like best.
ALIGNMENT = 256


class TensorSpec(NamedTuple):
    """The dtype and shape of a tensor that is to be made."""

    dtype: torch.dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Bytes of its values, without the allocator's rounding."""
        return math.prod(self.shape) * self.dtype.itemsize


class Layout:
    """Where the parts of a group lie in one piece of memory, the same on the host and on the device.

    Attributes:
        parts: what they are, by name.
        offsets: where they begin, in bytes.
        nbytes: of the whole.
    """

    def __init__(self, parts: Mapping[str, TensorSpec]) -> None:
        self.parts = dict(parts)
        self.offsets: dict[str, int] = {}
        self.nbytes = 0
        for name, part in parts.items():
            self.offsets[name] = aligned(self.nbytes)
            self.nbytes = self.offsets[name] + part.nbytes

    @torch.inference_mode(False)
    def views(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the parts as tensors in a piece of memory.

        Args:
            memory: (nbytes or more,), uint8.
        """
        return {
            name: memory[self.offsets[name] : self.offsets[name] + part.nbytes].view(part.dtype).view(part.shape)
            for name, part in self.parts.items()
        }


def aligned(nbytes: int) -> int:
    """Round up to where the next part may begin."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def in_mapping(mapping: Any, dtype: torch.dtype, offset: int, shape: Shape) -> torch.Tensor:
    """Return a tensor in a mapping, or another buffer, which stays as long as it is viewed."""
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mapping, dtype=dtype, count=count, offset=offset).view(shape)
