"""Buffers on a GPU in which tensors are gathered before its default stream works on them, and the copies into them."""

from __future__ import annotations

import torch

from .extents import ExtentSlice, ReadTask
from .timeline import timed_event

# The size of a buffer.
BUFFER_BYTES = 48 * 2**20
# Where tensors begin in a buffer, in bytes: as in memory of their own.
_ALIGNMENT = 512


class Copies:
    """Copies of an extent's bytes to a GPU, begun together, and of neighbours to neighbours as one.

    While another thread computes, each call of torch may wait for the interpreter's lock.
    """

    def __init__(self, filled: torch.Tensor) -> None:
        self._filled = filled
        self._targets: list[torch.Tensor] = []
        self._sources: list[torch.Tensor] = []
        self._run: tuple[torch.Tensor, int, int, int] | None = None

    def add(self, target: torch.Tensor, begin: int) -> None:
        """Copy as many bytes as `target` has, from `begin` on."""
        self._targets.append(target)
        self._sources.append(self._filled[begin : begin + len(target)])

    def add_run(self, memory: torch.Tensor, at: int, begin: int, nbytes: int) -> None:
        """Copy bytes from `begin` on to where `memory` has them from `at` on."""
        if self._run is not None:
            known, known_at, known_begin, count = self._run
            if known is memory and (known_at + count, known_begin + count) == (at, begin):
                self._run = known, known_at, known_begin, count + nbytes
                return
            self._end_run()
        self._run = memory, at, begin, nbytes

    def _end_run(self) -> None:
        if self._run is not None:
            memory, at, begin, nbytes = self._run
            self.add(memory[at : at + nbytes], begin)
            self._run = None

    def begin(self) -> None:
        """Begin what was added, on the current stream."""
        self._end_run()
        if self._targets:
            torch._foreach_copy_(self._targets, self._sources, non_blocking=True)
        self._targets, self._sources = [], []


class StagingBuffer:
    """A staging buffer on a GPU.

    Attributes:
        parts: the pieces of tensors that it holds, each aligned as kernels want it.
        copied: recorded when all of them have been copied.
        worked: recorded when they have been worked on.
    """

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.empty(BUFFER_BYTES, dtype=torch.uint8, device=device)
        self.parts: list[ExtentSlice] = []
        self.copied, self.worked = timed_event(), timed_event()
        self._views: dict[torch.dtype, torch.Tensor] = {}

    def values_of(self, part: ExtentSlice) -> torch.Tensor:
        """Return the values of one of its pieces, (count,), in the stored dtype."""
        dtype = part.task.tensor.dtype
        view = self._views.get(dtype)
        if view is None:
            view = self._views[dtype] = self.memory.view(dtype)
        first = part.at // dtype.itemsize
        return view[first : first + part.count]

    @property
    def _free_at(self) -> int:
        end = self.parts[-1].at + self.parts[-1].nbytes if self.parts else 0
        return -(-end // _ALIGNMENT) * _ALIGNMENT

    def has_room_for(self, task: ReadTask, begin: int) -> bool:
        """Whether a tensor's bytes from `begin` on can go on here: a tensor that fits into a buffer is not divided."""
        if self._continues(task, begin):
            return self.parts[-1].nbytes < self._room(task)
        return not self.parts or self._free_at + task.tensor.nbytes <= BUFFER_BYTES

    def take(self, task: ReadTask, begin: int, nbytes: int) -> tuple[int, int]:
        """Return where in the memory a tensor's bytes from `begin` on go, and how many of `nbytes` fit there."""
        itemsize = task.tensor.dtype.itemsize
        if not self._continues(task, begin):
            self.parts.append(ExtentSlice(task, begin // itemsize, 0, self._free_at, 0))
        part = self.parts[-1]
        count = min(nbytes, self._room(task) - part.nbytes)
        at = part.at + part.nbytes
        part.nbytes += count
        part.count += count // itemsize
        return at, count

    def _continues(self, task: ReadTask, begin: int) -> bool:
        """Whether the last piece is of this tensor and ends there."""
        last = self.parts[-1] if self.parts else None
        return last is not None and last.task is task and last.begin * task.tensor.dtype.itemsize + last.nbytes == begin

    def _room(self, task: ReadTask) -> int:
        """Return the size of a tensor's piece at most: it ends with a scale."""
        itemsize = task.tensor.dtype.itemsize
        return BUFFER_BYTES // itemsize // task.values_per_scale * task.values_per_scale * itemsize
