"""The one edge to files and devices: threads read ahead into a ring of slots, from there bytes go where they belong.

Extents are read by several threads (one cannot keep a link busy: 6.7 GB/s against 44 with sixteen, on the machine that
the design was measured on), but handed out in their order, and copied by the caller's thread on the default stream of
the device. A slot is filled again when the copy out of it is done; nothing else holds the readers back, and nothing is
queued without bound.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from .checkpoint import LazyTensor, StoredTensor
from .errors import CheckpointError

SLOT_BYTES = 16 * 2**20
SLOTS = 16


def reader_threads() -> int:
    """Threads that read: most of the cores, as one is the caller's; more than 12 gained nothing on 16."""
    return max(2, min(12, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2))


@dataclass(frozen=True)
class _Extent:
    """A run of bytes of one tensor that fits a slot."""

    tensor: StoredTensor
    offset: int
    nbytes: int


class Reader(AbstractContextManager["Reader"]):
    """Reads tensors of a checkpoint, each byte once, ahead of their use; only the ring outlives the `with` block."""

    def __init__(self, tensors: Sequence[StoredTensor], *, pinned: bool) -> None:
        """Take the tensors in the order in which their pieces will be asked for."""
        self._ring = _take_ring(pinned)
        room = len(self._ring.slots[0])
        self._extents = [extent for tensor in tensors for extent in _cut(tensor, room)]
        self._copied: list[torch.cuda.Event | None] = [None] * len(self._ring.slots)
        self._begun = self._used = 0
        self._outcome: dict[int, BaseException | None] = {}
        self._changed = threading.Condition()
        self._stopped = False
        self._files: dict[Path, int] = {}
        self._devices: set[torch.device] = set()
        count = min(reader_threads(), len(self._extents))
        self._threads = [threading.Thread(target=self._read_ahead, daemon=True) for _ in range(count)]

    def __enter__(self) -> Reader:
        for thread in self._threads:
            thread.start()
        return self

    def pieces(self, tensor: StoredTensor, device: torch.device) -> Iterator[torch.Tensor]:
        """Give a tensor in order, in pieces of at most a slot.

        Yields:
            Flat pieces in the stored dtype, in a slot on the CPU. What the caller enqueues on the device's current
            stream before it asks for the next one may read them; later they are overwritten.

        Raises:
            CheckpointError: the file cannot be read, or ended before the tensor did.
        """
        if device.type == "cuda":
            self._devices.add(device)
        if isinstance(tensor, LazyTensor):
            values = tensor.load().detach().contiguous().view(-1)
            room = max(1, len(self._ring.slots[0]) // tensor.dtype.itemsize)
            yield from (values[begin : begin + room] for begin in range(0, len(values), room))
            return
        for _ in _cut(tensor, len(self._ring.slots[0])):
            index = self._used
            extent = self._extents[index]
            assert extent.tensor is tensor, "pieces are asked for in the order of the reads"
            slot = index % len(self._ring.slots)
            self._await(index)
            yield self._ring.slots[slot][: extent.nbytes].view(tensor.dtype)
            self._release(slot, device)

    def _await(self, index: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: index in self._outcome)
            error = self._outcome.pop(index)
        if error is not None:
            raise error

    def _release(self, slot: int, device: torch.device) -> None:
        if device.type == "cuda":
            self._copied[slot] = torch.cuda.current_stream(device).record_event()
        with self._changed:
            self._used += 1
            self._changed.notify_all()

    def _read_ahead(self) -> None:
        slots = self._ring.slots
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._begun < self._used + len(slots))
                index = self._begun
                if self._stopped or index == len(self._extents):
                    return
                self._begun += 1
            error: BaseException | None = None
            try:
                event = self._copied[index % len(slots)]
                if event is not None:
                    event.synchronize()
                self._fill(self._extents[index], slots[index % len(slots)])
            except BaseException as caught:  # raised where the piece is asked for
                error = caught
            with self._changed:
                self._outcome[index] = error
                self._changed.notify_all()

    def _fill(self, extent: _Extent, slot: torch.Tensor) -> None:
        view = memoryview(slot.numpy())[: extent.nbytes]  # type: ignore[arg-type]
        offset, file = extent.offset, extent.tensor.file
        try:
            descriptor = self._descriptor(file)
            while view:
                received = os.preadv(descriptor, [view], offset)
                if not received:
                    raise CheckpointError(f"'{file}' ended while '{extent.tensor.name}' was read: it was cut meanwhile")
                view, offset = view[received:], offset + received
        except OSError as error:
            raise CheckpointError(f"reading '{extent.tensor.name}' from '{file}' failed: {error}") from error

    def _descriptor(self, path: Path) -> int:
        with self._changed:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            return self._files[path]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for event in self._copied:
            if event is not None:
                event.synchronize()  # the copy still reads the slot
        if kind is not None:
            for device in self._devices:
                torch.cuda.synchronize(device)  # so may one that no event was recorded for
        for descriptor in self._files.values():
            os.close(descriptor)
        _give_ring_back(self._ring)


def _cut(tensor: StoredTensor, room: int) -> list[_Extent]:
    if isinstance(tensor, LazyTensor):
        return []
    room -= room % max(1, tensor.dtype.itemsize)
    starts = range(0, tensor.nbytes, room)
    return [_Extent(tensor, tensor.offset + at, min(room, tensor.nbytes - at)) for at in starts]


@dataclass(frozen=True, eq=False)
class _Ring:
    slots: list[torch.Tensor]
    pinned: bool


# One ring is kept for the next load: pinning costs 0.4 s a GiB. Loads at once make their own.
_kept: list[_Ring] = []
_keeping = threading.Lock()


def _take_ring(pinned: bool) -> _Ring:
    with _keeping:
        for ring in _kept:
            if ring.pinned == pinned and len(ring.slots[0]) == SLOT_BYTES:
                _kept.remove(ring)
                return ring
    count = SLOTS if pinned else 2 + reader_threads()
    return _Ring([torch.empty(SLOT_BYTES, dtype=torch.uint8, pin_memory=pinned) for _ in range(count)], pinned)


def _give_ring_back(ring: _Ring) -> None:
    with _keeping:
        if ring.pinned and len(ring.slots[0]) == SLOT_BYTES:
            _kept[:] = [ring]


def release_buffers() -> None:
    """Free the pinned host memory (256 MiB) that is kept from one load onto a GPU for the next."""
    with _keeping:
        _kept.clear()


@contextmanager
def default_stream(device: torch.device) -> Iterator[None]:
    """Work on a GPU's default stream, after all that the caller's stream holds and before all it will hold.

    bitsandbytes' 4-bit kernels run on the default stream whatever stream is current, so the copies they depend on
    must run there too.
    """
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
            caller, default = torch.cuda.current_stream(), torch.cuda.default_stream()
            default.wait_stream(caller)
            stack.enter_context(torch.cuda.stream(default))
            stack.callback(caller.wait_stream, default)
        yield
