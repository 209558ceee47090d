"""What to read and where it goes, cut into the runs of bytes that are read at once. Pure; touches no file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .tensors import StoredTensor

# Buffers that one call of preadv fills on every system.
_MAX_SLICES = 1000


@dataclass(eq=False)
class ReadTask:
    """One stored tensor on its way.

    Attributes:
        tensor: where it is read from.
        device: where its values go.
        take: is given its values piece by piece, in order, each on the device and in the stored dtype, and the index
            of the first of them; not called for what arrives in `home` by itself.
        home: the bytes where its values lie in the end, flat, uint8, where they can be copied there as they are.
        values_per_scale: values that must stay together in one piece, except at the end.
        arrived: is told how many values have arrived, whichever way.
    """

    tensor: StoredTensor
    device: torch.device
    take: Callable[[torch.Tensor, int], None]
    home: torch.Tensor | None = None
    values_per_scale: int = 1
    arrived: Callable[[int], None] = lambda count: None


@dataclass(eq=False)
class ExtentSlice:
    """A piece of a tensor within an extent.

    Attributes:
        task: the tensor.
        begin: index of its first value.
        count: values.
        at: the byte of the extent where it begins.
        nbytes: bytes of the piece.
    """

    task: ReadTask
    begin: int
    count: int
    at: int
    nbytes: int

    @property
    def home(self) -> torch.Tensor | None:
        """The piece's bytes in their final memory, if they can be copied there as they are."""
        home = self.task.home
        if home is None or self.nbytes == self.task.tensor.nbytes:
            return home
        begin = self.begin * self.task.tensor.dtype.itemsize
        return home[begin : begin + self.nbytes]

    def bytes_in(self, slot: torch.Tensor) -> torch.Tensor:
        """Cut the piece out of an extent's bytes."""
        return slot[self.at : self.at + self.nbytes]

    def values_in(self, slot: torch.Tensor) -> torch.Tensor:
        """Cut the piece out of an extent's bytes, in the stored dtype."""
        return self.bytes_in(slot).view(self.task.tensor.dtype)


@dataclass(eq=False)
class Extent:
    """A run of bytes of one file, which go to one device.

    Attributes:
        file: the file.
        offset: its first byte there.
        device: where its values go.
        is_direct: it is read straight into its parts' homes, past the slots.
        parts: pieces of tensors, which fill it without gaps.
        nbytes: its length.
    """

    file: Path
    offset: int
    device: torch.device
    is_direct: bool
    parts: list[ExtentSlice] = field(default_factory=list)
    nbytes: int = 0

    def continues_with(self, task: ReadTask, offset: int) -> bool:
        """Whether a tensor's bytes from `offset` of its file on may be read with this extent."""
        return (
            self.file == task.tensor.file
            and self.offset + self.nbytes == offset
            and self.device == task.device
            and self.is_direct == _is_direct(task)
            and len(self.parts) < _MAX_SLICES
            # What lies in a slot is seen in its dtype, which must be aligned.
            and (self.is_direct or self.nbytes % task.tensor.dtype.itemsize == 0)
        )

    def name_at(self, offset: int) -> str:
        """Name the tensor that a byte of the file belongs to."""
        ends = ((part.at + part.nbytes, part.task.tensor.name) for part in self.parts)
        return next(name for end, name in ends if offset - self.offset < end)

    def append(self, task: ReadTask, begin: int, room: int) -> int:
        """Take on values of a tensor, as many as there is room for.

        Returns:
            How many.
        """
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
    """Cut what is read into extents: large tensors are divided, small neighbours read together.

    Args:
        tasks: in the order of reading; values that stay together must fit the room.
        room: the most bytes of an extent.
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
            count = extent.append(task, begin, room)
            begin += count
            if not count:
                extent = None  # full
    return extents


def _is_direct(task: ReadTask) -> bool:
    return task.home is not None and task.device.type == "cpu"
