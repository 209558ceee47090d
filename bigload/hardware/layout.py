"""Several tensors in one block of memory, at aligned offsets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

Shape = tuple[int, ...]

# Bytes that each tensor's offset is a multiple of: CUDA's kernels and copies are fastest so.
ALIGNMENT = 256


class TensorSpec(NamedTuple):
    """The dtype and shape of a tensor that does not exist yet."""

    dtype: torch.dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Bytes of the values, without the allocator's rounding."""
        return math.prod(self.shape) * self.dtype.itemsize


class Layout:
    """The offsets of a group's tensors in one block of memory, the same on the host and on the device.

    Attributes:
        parts: dtype and shape of each tensor, by name.
        offsets: bytes from the beginning of the block, by name.
        nbytes: size of the block.
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
        """Return the tensors as views of a block of memory: (nbytes or more,), uint8."""
        return {
            name: memory[self.offsets[name] : self.offsets[name] + part.nbytes].view(part.dtype).view(part.shape)
            for name, part in self.parts.items()
        }


def aligned(nbytes: int) -> int:
    """Round up to the next offset at which a tensor may begin."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def in_mapping(mapping: Any, dtype: torch.dtype, offset: int, shape: Shape) -> torch.Tensor:
    """Return a view of a mapping, or of another buffer, which it keeps alive.

    Args:
        mapping: writable; anything that supports the buffer protocol.
        dtype: of the view.
        offset: in bytes.
        shape: of the view.
    """
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(mapping, dtype=dtype, count=count, offset=offset).view(shape)
