"""Which bytes are read together, and where they go. Pure: no file is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .tensors import StoredTensor

# Every system's preadv takes this many buffers.
_MAX_SLICES = 1000


@dataclass(eq=False, slots=True)
class ReadTask:
    """One stored tensor to read, and where its values go.

    Attributes:
        tensor: where it is stored.
        device: where its values go.
        take: called with each piece of the values, in order, and the index of its first value. A piece is flat, in
            the stored dtype and on the device; its memory is reused after the call, in the order of the device's
            default stream. Not called for a task with a home.
        home: the tensor's final memory, (nbytes,), uint8, if the stored bytes are copied there unchanged.
        values_per_scale: every piece but the last holds a multiple of this many values.
        arrived: called with the number of values of each piece, after it was taken or copied home.
    """

    tensor: StoredTensor
    device: torch.device
    take: Callable[[torch.Tensor, int], None]
    home: torch.Tensor | None = None
    values_per_scale: int = 1
    arrived: Callable[[int], None] = lambda count: None


@dataclass(eq=False, slots=True)
class ExtentSlice:
    """A piece of one tensor in an extent.

    Attributes:
        task: the tensor.
        begin: index in the tensor of the piece's first value.
        count: number of values.
        at: offset in the extent, in bytes.
        nbytes: size of the piece.
    """

    task: ReadTask
    begin: int
    count: int
    at: int
    nbytes: int

    @property
    def home(self) -> torch.Tensor | None:
        """The piece's part of the task's home, if that has one."""
        home = self.task.home
        if home is None or self.nbytes == self.task.tensor.nbytes:
            return home
        begin = self.begin * self.task.tensor.dtype.itemsize
        return home[begin : begin + self.nbytes]

    def bytes_in(self, slot: torch.Tensor) -> torch.Tensor:
        """Return the piece's bytes as a view of the extent's, (nbytes,), uint8."""
        return slot[self.at : self.at + self.nbytes]

    def values_in(self, slot: torch.Tensor) -> torch.Tensor:
        """Return the piece's values as a view of the extent's bytes, (count,), in the stored dtype."""
        return self.bytes_in(slot).view(self.task.tensor.dtype)


@dataclass(eq=False)
class Extent:
    """A run of bytes of one file, read at once and sent to one device.

    Attributes:
        file: where it is read from.
        offset: of its first byte in the file.
        device: where its values go.
        is_direct: whether it is read straight into the homes of its parts, instead of into a slot of the ring.
        parts: pieces of tensors, without gaps between them.
        nbytes: its length.
    """

    file: Path
    offset: int
    device: torch.device
    is_direct: bool
    parts: list[ExtentSlice] = field(default_factory=list)
    nbytes: int = 0

    def continues_with(self, task: ReadTask, offset: int) -> bool:
        """Whether a tensor's bytes, from `offset` in its file on, can be appended to this extent."""
        return (
            (self.file is task.tensor.file or self.file == task.tensor.file)  # paths are slow to compare
            and self.offset + self.nbytes == offset
            and self.device == task.device
            and self.is_direct == _is_direct(task)
            and len(self.parts) < _MAX_SLICES
            # In a slot, a view in the stored dtype must be aligned.
            and (self.is_direct or self.nbytes % task.tensor.dtype.itemsize == 0)
        )

    def name_at(self, offset: int) -> str:
        """Return the name of the tensor that the file's byte at `offset` belongs to."""
        ends = ((part.at + part.nbytes, part.task.tensor.name) for part in self.parts)
        return next(name for end, name in ends if offset - self.offset < end)

    def append(self, task: ReadTask, begin: int, room: int) -> int:
        """Append a tensor's values from `begin` on, as many as fit into `room` bytes; return their number."""
        itemsize = task.tensor.dtype.itemsize
        left = task.tensor.nbytes // itemsize - begin
        count = min(left, (room - self.nbytes) // itemsize)
        if count < left:
            count -= count % task.values_per_scale
        if count:
            self.parts.append(ExtentSlice(task, begin, count, self.nbytes, count * itemsize))
            self.nbytes += count * itemsize
        return count


def cut(tasks: Sequence[ReadTask], room: int) -> list[Extent]:
    """Return the extents to read: large tensors are divided, small neighbours are read together.

    Args:
        tasks: in the order of reading. `values_per_scale` values of each must fit into `room`.
        room: the maximum size of an extent, in bytes.
    """
    extents: list[Extent] = []
    extent: Extent | None = None
    for task in tasks:
        itemsize, offset = task.tensor.dtype.itemsize, task.tensor.offset
        begin, total = 0, task.tensor.nbytes // itemsize
        while begin < total:
            if extent is None or not extent.continues_with(task, offset + begin * itemsize):
                file, device = task.tensor.file, task.device
                extent = Extent(file, offset + begin * itemsize, device, _is_direct(task))
                extents.append(extent)
            begin += extent.append(task, begin, room)
            if begin < total:
                extent = None  # full
    return extents


def _is_direct(task: ReadTask) -> bool:
    return task.home is not None and task.device.type == "cpu"
