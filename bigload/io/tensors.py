"""One tensor of a checkpoint: where its bytes lie."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import CheckpointError


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint: `nbytes` contiguous bytes at `offset` of `file`."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class LazyTensor(StoredTensor):
    """A tensor whose bytes do not lie in a file as they are: pickled, or computed from others. Offset is its rank.

    Attributes:
        load: gives the values, on the CPU; they may be mapped, so they are copied and not kept.
    """

    load: Callable[[], torch.Tensor]


def read_whole(tensor: StoredTensor) -> torch.Tensor:
    """Read one tensor into memory, all at once."""
    if isinstance(tensor, LazyTensor):
        return tensor.load()
    descriptor = os.open(tensor.file, os.O_RDONLY)  # several times faster than a file object: there are thousands
    try:
        raw = bytearray(os.pread(descriptor, tensor.nbytes, tensor.offset))
    finally:
        os.close(descriptor)
    if len(raw) < tensor.nbytes:
        raise CheckpointError(f"'{tensor.file}' ended while '{tensor.name}' was read: it was cut meanwhile")
    return (
        torch.frombuffer(raw, dtype=tensor.dtype).view(tensor.shape)
        if raw
        else torch.empty(tensor.shape, dtype=tensor.dtype)
    )
