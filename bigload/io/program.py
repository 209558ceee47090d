"""What a load reads and where it goes, laid out as flat tables before the first byte. Pure: no file is read."""

from __future__ import annotations

import itertools
from array import array
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from ..hardware.interrupts import interruptible
from .tensors import StoredTensor

# Where pieces begin in a window, in bytes: as in memory of their own.
_ALIGNMENT = 512


@dataclass(eq=False, slots=True)
class ReadTask:
    """One stored tensor to read, and where its values go.

    Attributes:
        tensor: where it is stored.
        device: where its values go.
        take: called with each piece of the values, in order, and the index of its first value. A piece is flat, in
            the stored dtype and on the device; its memory is reused after the call, in the order of the device's
            default stream. Not called for a task with a home.
        home: the tensor's final memory, contiguous and of any dtype, if the stored bytes are copied there unchanged.
        values_per_scale: every piece but the last holds a multiple of this many values.
        arrived: called with the number of values of each piece, after it was taken or copied home.
    """

    tensor: StoredTensor
    device: torch.device
    take: Callable[[torch.Tensor, int], None]
    home: torch.Tensor | None = None
    values_per_scale: int = 1
    arrived: Callable[[int], None] = lambda count: None


def not_taken(values: torch.Tensor, begin: int) -> None:
    """Do nothing, as the `take` of a task with a home, which is not called."""


class Piece(NamedTuple):
    """Values of one tensor that arrive together.

    Attributes:
        task: the tensor.
        begin: index in the tensor of the first value.
        numel: number of values.
        at: offset in the window, in bytes; None if they go to the task's home.
    """

    task: ReadTask
    begin: int
    numel: int
    at: int | None


@dataclass(eq=False, slots=True)
class Batch:
    """What is worked on at once: pieces for one device.

    Attributes:
        device: where they go.
        pieces: in the order of reading.
        nbytes: of all of them.
        used: bytes in the window; 0 if all pieces go home.
        after: the last batch that had any of its memory in the window, which must have been worked on.
        number: in the program.
    """

    device: torch.device
    pieces: list[Piece] = field(default_factory=list)
    nbytes: int = 0
    used: int = 0
    after: Batch | None = None
    number: int = -1


class Window:
    """Memory on a device that batches use in turns, round and round."""

    def __init__(self, address: int, nbytes: int, batch_bytes: int) -> None:
        """Begin with all of it free.

        Args:
            address: where it begins.
            nbytes: its size; 0 if everything goes home.
            batch_bytes: the most that a batch takes of it.
        """
        self.address, self.nbytes, self.batch_bytes = address, nbytes, batch_bytes
        self._at = 0
        self._passed: Batch | None = None  # the last one whose memory has been given to another
        self._live: deque[tuple[int, int, Batch]] = deque()  # begin and end, in the order of their use

    def take(self, nbytes: int, batch: Batch) -> int:
        """Return where bytes of a batch may lie, and have the batch wait for those that lay there."""
        begins = [self._at] if self._at + nbytes <= self.nbytes else [self._at, 0]
        begin = begins[-1]
        passed = [(self._at, self.nbytes), (0, nbytes)] if len(begins) == 2 else [(begin, begin + nbytes)]
        while self._live and any(self._live[0][0] < end and first < self._live[0][1] for first, end in passed):
            self._passed = self._live.popleft()[2]
            assert self._passed is not batch, "a batch is larger than its window"
        batch.after = self._passed  # another batch may have got the first part of that memory: this one waits too
        self._live.append((begin, begin + nbytes, batch))
        self._at = -(-(begin + nbytes) // _ALIGNMENT) * _ALIGNMENT
        return begin


@dataclass
class Program:
    """Everything that is read, in order.

    Attributes:
        files: that are read.
        batches: in the order in which they are worked on.
        pieces: of all batches.
        spans: what each piece needs, five numbers: the file's, the offset in it, nbytes, the address, the batch's.
    """

    files: list[Path]
    batches: list[Batch]
    pieces: list[Piece]
    spans: array[int]


def lay_out(tasks: Sequence[ReadTask], windows: Mapping[torch.device, Window]) -> Program:
    """Lay out what tasks read.

    Args:
        tasks: in the order of reading.
        windows: of each device.

    Returns:
        Batches of the devices in turns: each device has its own link, and all shall be busy.
    """
    of_device: dict[torch.device, list[ReadTask]] = defaultdict(list)
    for task in interruptible(tasks):
        of_device[task.device].append(task)
    each = [_batches(own, windows[device]) for device, own in of_device.items()]
    batches = [batch for turn in itertools.zip_longest(*each) for batch in turn if batch is not None]
    numbers = {file: number for number, file in enumerate(dict.fromkeys(task.tensor.file for task in tasks))}
    spans, file, of_file = array("q"), None, 0
    for number, batch in enumerate(batches):
        batch.number, address = number, windows[batch.device].address
        for piece in interruptible(batch.pieces):
            task, begin, numel, at = piece
            tensor, itemsize = task.tensor, task.tensor.dtype.itemsize
            to = address + at if at is not None else task.home.data_ptr() + begin * itemsize
            if tensor.file is not file:  # else the same as before: a path takes long to look up
                file, of_file = tensor.file, numbers[tensor.file]
            spans.extend((of_file, tensor.offset + begin * itemsize, numel * itemsize, to, number))
    return Program(list(numbers), batches, [piece for batch in batches for piece in batch.pieces], spans)


def _batches(tasks: Iterable[ReadTask], window: Window) -> list[Batch]:
    found: list[Batch] = []
    batch: Batch | None = None
    for task in interruptible(tasks):
        itemsize, begin = task.tensor.dtype.itemsize, 0
        total = task.tensor.nbytes // itemsize
        while begin < total:
            room = window.batch_bytes - (0 if batch is None else max(batch.nbytes, batch.used))
            count = _fitting(task, total - begin, room, is_first=begin == 0, limit=window.batch_bytes)
            if batch is None or not count:
                batch = Batch(task.device)
                found.append(batch)
                count = _fitting(task, total - begin, window.batch_bytes, is_first=False, limit=window.batch_bytes)
            nbytes = count * itemsize
            at = None if task.home is not None else window.take(nbytes, batch)
            batch.pieces.append(Piece(task, begin, count, at))
            batch.nbytes += nbytes
            batch.used += 0 if at is None else -(-nbytes // _ALIGNMENT) * _ALIGNMENT
            begin += count
            if max(batch.nbytes, batch.used) >= window.batch_bytes:
                batch = None
    return found


def _fitting(task: ReadTask, left: int, room: int, *, is_first: bool, limit: int) -> int:
    """Return how many of a tensor's values go on in a batch: whole scales, and what fits into one is not divided."""
    itemsize = task.tensor.dtype.itemsize
    count = min(left, room // itemsize)
    if count == left:
        return count
    if is_first and task.home is None and left * itemsize <= limit:
        return 0
    return count - count % (1 if task.home is not None else task.values_per_scale)
