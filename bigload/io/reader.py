"""Reads extents before they are needed, into the slots of a ring or straight into tensors."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from queue import SimpleQueue

import torch

from ..errors import CheckpointError
from .async_reads import Read, Reads
from .extents import Extent
from .ring import Ring, as_bytes, reader_threads
from .timeline import Timeline


class Reader(AbstractContextManager["Reader"]):
    """Prefetches extents, for one thread that iterates over it. The end of the `with` block waits for all reads."""

    def __init__(
        self, extents: Sequence[Extent], ring: Ring, *, copied: int = 0, timeline: Timeline | None = None
    ) -> None:
        """Prepare the reads; the first begin with the iteration.

        Args:
            extents: in the order in which they are read and returned.
            ring: the slots to read into.
            copied: slots that are not prefetched into, because their contents are being copied to a GPU.
            timeline: gets the times of waiting for reads.
        """
        self._extents, self._ring, self._timeline = extents, ring, timeline or Timeline()
        self._last_of_file = {*{extent.file: index for index, extent in enumerate(extents)}.values()}
        self._ahead = max(1, ring.count - copied)
        self._reads = Reads(reader_threads())
        self._going: deque[tuple[Read, int | None]] = deque()
        self._free: SimpleQueue[tuple[int, torch.cuda.Event | None] | None] = SimpleQueue()
        for slot in range(ring.count):
            self._free.put((slot, None))

    @property
    def is_done(self) -> bool:
        """Whether no read is running any more."""
        return self._reads.is_done

    def __iter__(self) -> Iterator[tuple[Extent, int | None, torch.Tensor | None]]:
        """Yield each extent when it has been read, with the number of its slot and its bytes there.

        Both are None for an extent that was read straight into tensors.

        Raises:
            CheckpointError: a file cannot be read, or ends before a tensor does.
        """
        begun = 0
        for index, extent in enumerate(self._extents):
            while begun < min(len(self._extents), index + self._ahead):
                if not self._begin(self._extents[begun]):
                    return
                begun += 1
            read, slot = self._going.popleft()
            waited = time.perf_counter()
            self._finish(extent, read)
            self._timeline.add("read", extent.device, waited)
            if index in self._last_of_file:
                self._reads.close(extent.file)
            yield extent, slot, None if slot is None else self._ring.filled(slot, extent.nbytes)

    def release(self, slot: int | None, copied: torch.cuda.Event | None) -> None:
        """Let a slot be reused, once the event has happened."""
        if slot is not None:
            self._free.put((slot, copied))

    def stop(self) -> None:
        """Begin no further reads, and end the wait for a free slot."""
        self._free.put(None)

    def _begin(self, extent: Extent) -> bool:
        slot = None
        if extent.is_direct:
            memory = [as_bytes(home) for part in extent.parts if (home := part.home) is not None]
        else:
            freed = self._free.get()
            if freed is None:
                return False
            slot, copied = freed
            if copied is not None:
                copied.synchronize()
            memory = [self._ring.buffers[slot][: extent.nbytes]]
        begun = time.perf_counter()
        try:
            read = self._reads.begin(extent.file, memory, extent.offset)
        except OSError as error:
            raise _failed(extent, error) from error
        if read.is_small:  # and was read at once
            self._timeline.add("read", extent.device, begun)
        self._going.append((read, slot))
        return True

    def _finish(self, extent: Extent, read: Read) -> None:
        try:
            received = self._reads.finish(read)
        except OSError as error:
            raise _failed(extent, error) from error
        if received < extent.nbytes:
            name = extent.name_at(extent.offset + received)
            raise CheckpointError(f"'{extent.file}' ended while '{name}' was read: it was truncated meanwhile")

    def __exit__(self, *raised: object) -> None:
        self.stop()
        try:
            while not self._free.empty():
                freed = self._free.get()
                if freed is not None and freed[1] is not None:
                    freed[1].synchronize()  # a copy may still read the slot
        finally:
            self._reads.__exit__(*raised)


def _failed(extent: Extent, error: OSError) -> CheckpointError:
    return CheckpointError(f"reading '{extent.name_at(extent.offset)}' from '{extent.file}' failed: {error}")
