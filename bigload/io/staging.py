"""Buffers on a GPU in which tensors are gathered before its default stream works on them, and the copies into them."""

from __future__ import annotations

import time

import torch

from .extents import ExtentSlice, ReadTask
from .timeline import plain_event

# The size of a buffer.
BUFFER_BYTES = 48 * 2**20
# Where tensors begin in a buffer, in bytes: as in memory of their own.
_ALIGNMENT = 512


class Copies:
    """Copies of an extent's bytes to a GPU, begun together, and of neighbours to neighbours as one.

    While another thread computes, each call of torch may wait for the interpreter's lock.
    """

    def __init__(self, filled: torch.Tensor, nbytes: int) -> None:
        """Copy out of a slot.

        Args:
            filled: the extent's bytes, (nbytes,), uint8.
            nbytes: their number.
        """
        self._filled, self._nbytes = filled, nbytes
        self._targets: list[torch.Tensor] = []
        self._sources: list[torch.Tensor] = []
        self._run: tuple[torch.Tensor, int, int, int] | None = None

    def add(self, target: torch.Tensor, begin: int, nbytes: int) -> None:
        """Copy bytes from `begin` on to `target`, which has as many."""
        self._targets.append(target)
        is_all = nbytes == self._nbytes
        self._sources.append(self._filled if is_all else self._filled[begin : begin + nbytes])

    def add_run(self, memory: torch.Tensor, at: int, begin: int, nbytes: int) -> None:
        """Copy bytes from `begin` on to where `memory` has them from `at` on."""
        if self._run is not None:
            known, known_at, known_begin, count = self._run
            if known is memory and known_at + count == at and known_begin + count == begin:
                self._run = known, known_at, known_begin, count + nbytes
                return
            self._end_run()
        self._run = memory, at, begin, nbytes

    def _end_run(self) -> None:
        if self._run is not None:
            memory, at, begin, nbytes = self._run
            self.add(memory[at : at + nbytes], begin, nbytes)
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
        begun: the value of `time.perf_counter` when the first of them came.
        copied: recorded when all of them have been copied.
        worked: recorded when they have been worked on.
    """

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.empty(BUFFER_BYTES, dtype=torch.uint8, device=device)
        self.parts: list[ExtentSlice] = []
        self.begun = 0.0
        self.copied, self.worked = plain_event(), plain_event()
        self._views: dict[torch.dtype, torch.Tensor] = {}

    def values_of(self, part: ExtentSlice) -> torch.Tensor:
        """Return the values of one of its pieces, (count,), in the stored dtype."""
        dtype = part.task.tensor.dtype
        view = self._views.get(dtype)
        if view is None:
            view = self._views[dtype] = self.memory.view(dtype)
        first = part.at // dtype.itemsize
        return view[first : first + part.count]

    def take(self, task: ReadTask, begin: int, nbytes: int) -> tuple[int, int] | None:
        """Make room for a tensor's bytes from `begin` on, after those that it holds already.

        A tensor that fits into a buffer is not divided.

        Returns:
            Where in the memory they go, and how many of `nbytes` fit there; None if this needs another buffer.
        """
        itemsize = task.tensor.dtype.itemsize
        room = BUFFER_BYTES // itemsize // task.values_per_scale * task.values_per_scale * itemsize  # for whole scales
        last = self.parts[-1] if self.parts else None
        if last is None or last.task is not task or last.begin * itemsize + last.nbytes != begin:
            free = 0 if last is None else -(-(last.at + last.nbytes) // _ALIGNMENT) * _ALIGNMENT
            if last is None:
                self.begun = time.perf_counter()
            elif free + task.tensor.nbytes > BUFFER_BYTES:
                return None
            last = ExtentSlice(task, begin // itemsize, 0, free, 0)
            self.parts.append(last)
        elif last.nbytes >= room:
            return None
        at, count = last.at + last.nbytes, min(nbytes, room - last.nbytes)
        last.nbytes += count
        last.count += count // itemsize
        return at, count
