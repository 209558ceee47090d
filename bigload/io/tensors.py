"""A tensor of a checkpoint: where it is stored, and how it is read at once."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..errors import CheckpointError
from ..hardware.interrupts import interruptible
from ..hardware.layout import in_mapping

# Inode, size and modification time of a file: they change when it is replaced or written to.
Stamp = tuple[int, int, int]


def stamp_of(stat: os.stat_result) -> Stamp:
    """Return what tells a file from the one that it was."""
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint: `nbytes` contiguous bytes of `file`, from `offset` on."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def follows(last: StoredTensor, other: StoredTensor) -> bool:
    """Whether the bytes of a tensor lie in a file, right after those of another one of the same dtype."""
    are_stored = type(last) is type(other) is StoredTensor
    return are_stored and (last.file, last.dtype, last.offset + last.nbytes) == (other.file, other.dtype, other.offset)


def joined(parts: Sequence[StoredTensor]) -> StoredTensor:
    """Return tensors that follow each other as one, flat."""
    first, nbytes = parts[0], sum(part.nbytes for part in parts)
    name, shape = joined_name(first.name, parts[-1].name), (nbytes // first.dtype.itemsize,)
    return StoredTensor(name, first.file, first.dtype, shape, first.offset, nbytes)


def joined_name(first: str, last: str) -> str:
    """Return what several are called in messages; parts of one tensor have one name."""
    return first if first == last else f"{first} to {last}"


@dataclass(frozen=True)
class LazyTensor(StoredTensor):
    """A tensor that is not stored as plain bytes: pickled, or computed from others. Its offset is its rank in the file.

    Attributes:
        load: returns the values, on the CPU; the caller copies them, since they may view a mapped file.
    """

    load: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class ComputedTensor(LazyTensor):
    """A tensor that a module's own code computes from others: what it is depends on that code too."""


@dataclass(frozen=True)
class StoredObject(StoredTensor):
    """The extra state of a module, pickled, if it is no tensor.

    Attributes:
        value: the object.
    """

    value: Any


class State(dict[str, StoredTensor]):
    """The tensors of a file by name, with the metadata of a state_dict.

    Attributes:
        metadata: module path -> what the module's `_load_from_state_dict` is told, such as its version.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor] = MappingProxyType({}), metadata: Any = None) -> None:
        super().__init__(tensors)
        self.metadata: dict[str, Any] = dict(metadata) if isinstance(metadata, Mapping) else {}


def read_whole(tensor: StoredTensor) -> torch.Tensor:
    """Read one tensor into host memory.

    Raises:
        CheckpointError: the file ends before the tensor does.
        OSError: the file cannot be read.
    """
    (found,) = read_each([tensor])
    return found


def read_each(tensors: Iterable[StoredTensor]) -> Iterator[torch.Tensor]:
    """Read tensors into host memory, one after the other; a file is opened once for those that follow each other.

    Raises:
        CheckpointError: a file ends before a tensor does.
        OSError: a file cannot be read.
    """
    for (file, is_lazy), some in itertools.groupby(
        tensors, lambda tensor: (tensor.file, isinstance(tensor, LazyTensor))
    ):
        if is_lazy:
            yield from (tensor.load() for tensor in some if isinstance(tensor, LazyTensor))
            continue
        with _opened(file) as descriptor:
            for tensor in interruptible(some):
                raw = read_at(descriptor, tensor.offset, tensor.nbytes)
                if len(raw) < tensor.nbytes:
                    raise CheckpointError(f"'{file}' ended while '{tensor.name}' was read: it was truncated meanwhile")
                yield in_mapping(raw, tensor.dtype, 0, tensor.shape)


def read_bytes(file: Path, offset: int, nbytes: int) -> bytearray:
    """Read bytes of a file, in several steps where the system gives less than was asked for (Linux: at most 2 GiB).

    Returns:
        `nbytes` bytes, or those up to the end of the file.

    Raises:
        OSError: the file cannot be read.
    """
    with _opened(file) as descriptor:
        return read_at(descriptor, offset, nbytes)


@contextmanager
def _opened(file: Path) -> Iterator[int]:
    descriptor = os.open(file, os.O_RDONLY)  # several times faster than a file object: there are thousands of reads
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_at(descriptor: int, offset: int, nbytes: int) -> bytearray:
    """Read bytes of an open file, as `read_bytes`."""
    raw = bytearray()
    while len(raw) < nbytes and (more := os.pread(descriptor, nbytes - len(raw), offset + len(raw))):
        raw += more
    return raw
