"""The one edge to files and devices: threads read ahead into a ring of slots, from there bytes go where they belong.

Extents are read by several threads (one cannot keep a link busy: 6.7 GB/s against 44 with sixteen, on the machine that
the design was measured on), but landed in their order by the caller's thread. Onto a GPU they are copied on a stream of
their own, into their home or into a small window on the device, from where the default stream takes them. On the CPU
they are read into their home, or stay in the slot until they have been taken. A slot is filled again when the copy out
of it is done; nothing else holds the readers back, and nothing is queued without bound.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

import torch

from .errors import CheckpointError
from .extents import Delivery, Extent, cut
from .ring import Ring, reader_threads, take_ring

# Extents that may lie on a GPU while its default stream works on them.
_WINDOW = 4


def deliver(deliveries: Sequence[Delivery], *, on_bytes: Callable[[int], object] = lambda count: None) -> None:
    """Read tensors, each byte once, and bring them where they go.

    Homes must have been allocated, and what else is to be reused must have been freed, before this is called: the
    copies wait for what the default stream holds now.

    Args:
        deliveries: in the order of reading.
        on_bytes: called with the count of bytes that have arrived since the last call.

    Raises:
        CheckpointError: a file cannot be read, or ended before a tensor did.
    """
    if not deliveries:
        return
    devices = {delivery.device for delivery in deliveries}
    with take_ring(pinned=any(device.type == "cuda" for device in devices)) as ring, ExitStack() as lanes:
        reader = Reader(cut(deliveries, ring.slot_bytes), ring)
        ways = {device: _way(device, ring.slot_bytes) for device in devices}
        for way in ways.values():
            lanes.enter_context(way)
        with reader:
            for extent, slot in reader:
                copied = ways[extent.device].land(extent, slot)
                reader.release(extent, copied)
                on_bytes(extent.nbytes)


class Reader(AbstractContextManager["Reader"]):
    """Fills extents ahead of their use; nothing of it outlives the `with` block."""

    def __init__(self, extents: Sequence[Extent], ring: Ring) -> None:
        """Take the extents in the order in which they will be asked for."""
        self._extents, self._ring = extents, ring
        self._copied: list[torch.cuda.Event | None] = [None] * ring.count
        self._begun = self._released = 0
        self._outcome: dict[int, BaseException | None] = {}
        self._changed = threading.Condition()
        self._stopped = False
        self._files: dict[Path, int] = {}
        count = min(reader_threads(), len(extents))
        self._threads = [threading.Thread(target=self._read_ahead, daemon=True) for _ in range(count)]

    def __enter__(self) -> Reader:
        for thread in self._threads:
            thread.start()
        return self

    def __iter__(self) -> Iterator[tuple[Extent, torch.Tensor]]:
        """Give the extents in their order, each when it is filled, with its slot (empty where there is none)."""
        nothing = torch.empty(0, dtype=torch.uint8)
        for index, extent in enumerate(self._extents):
            with self._changed:
                self._changed.wait_for(lambda index=index: index in self._outcome)  # type: ignore[misc]
                error = self._outcome.pop(index)
            if error is not None:
                raise error
            yield extent, nothing if extent.rank is None else self._slot(extent.rank)[: extent.nbytes]

    def _slot(self, rank: int) -> torch.Tensor:
        return self._ring.slot(rank % self._ring.count)

    def release(self, extent: Extent, copied: torch.cuda.Event | None) -> None:
        """Let the extent's slot be filled again, when the event has happened."""
        if extent.rank is None:
            return
        with self._changed:
            self._copied[extent.rank % self._ring.count] = copied
            self._released += 1
            self._changed.notify_all()

    def _read_ahead(self) -> None:
        while (index := self._claim()) is not None:
            error: BaseException | None = None
            try:
                self._read(self._extents[index])
            except BaseException as caught:  # raised where the extent is asked for
                error = caught
            with self._changed:
                self._outcome[index] = error
                self._changed.notify_all()

    def _claim(self) -> int | None:
        """Take the next extent, when there is a slot for it; None when there are no more."""

        def is_free() -> bool:
            if self._stopped or self._begun == len(self._extents):
                return True
            rank = self._extents[self._begun].rank
            return rank is None or rank < self._released + self._ring.count

        with self._changed:
            self._changed.wait_for(is_free)
            if self._stopped or self._begun == len(self._extents):
                return None
            self._begun += 1
            return self._begun - 1

    def _read(self, extent: Extent) -> None:
        if extent.rank is not None:
            slot = self._slot(extent.rank)
            event = self._copied[extent.rank % self._ring.count]
            if event is not None:
                event.synchronize()
            self._fill(extent, [_bytes(slot[: extent.nbytes])])
        else:
            self._fill(extent, [_bytes(part.home) for part in extent.parts if part.home is not None])

    def _fill(self, extent: Extent, buffers: list[memoryview]) -> None:
        offset, file = extent.offset, extent.file
        try:
            descriptor = self._descriptor(file)
            while buffers:
                received = os.preadv(descriptor, buffers, offset)
                if not received:
                    name = extent.parts[0].delivery.tensor.name
                    raise CheckpointError(f"'{file}' ended while '{name}' was read: it was cut meanwhile")
                offset += received
                buffers = _without(buffers, received)
        except OSError as error:
            name = extent.parts[0].delivery.tensor.name
            raise CheckpointError(f"reading '{name}' from '{file}' failed: {error}") from error

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
        for descriptor in self._files.values():
            os.close(descriptor)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _without(buffers: list[memoryview], count: int) -> list[memoryview]:
    """Leave out the first bytes, which have been filled."""
    for index, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[index + 1 :]]
        count -= len(buffer)
    return []


class _Way(AbstractContextManager["_Way"]):
    """The way of extents to one device."""

    def land(self, extent: Extent, slot: torch.Tensor) -> torch.cuda.Event | None:
        """Bring an extent there and hand it over.

        Returns:
            The event after which the slot may be filled again; None if it may at once.
        """
        raise NotImplementedError

    def __exit__(self, *raised: object) -> None:
        pass


class _Here(_Way):
    """The way to the CPU: what was read is there."""

    def land(self, extent: Extent, slot: torch.Tensor) -> None:
        _hand_over(extent, None if extent.rank is None else slot)


class _Lane(_Way):
    """The way onto one GPU.

    Events order all of it: a place in the window is written after the default stream has worked on what was there, and
    worked on after it has been written.
    """

    def __init__(self, device: torch.device, slot_bytes: int) -> None:
        self._default = torch.cuda.default_stream(device)
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._window = [torch.empty(slot_bytes, dtype=torch.uint8, device=device) for _ in range(_WINDOW)]
        self._worked = [_event() for _ in range(_WINDOW)]
        self._next = 0

    def __enter__(self) -> _Lane:
        # Homes and window may have been another tensor's, which the default stream has yet to finish with.
        self._copies.wait_stream(self._default)
        return self

    def land(self, extent: Extent, slot: torch.Tensor) -> torch.cuda.Event:
        home = extent.parts[0].home if len(extent.parts) == 1 else None
        if home is not None:
            copied = self._copy(slot, home.view(torch.uint8))
            _hand_over(extent, None)
            return copied
        place = self._next = (self._next + 1) % _WINDOW
        landed = self._window[place][: extent.nbytes]
        self._copies.wait_event(self._worked[place])
        copied = self._copy(slot, landed)
        with torch.cuda.stream(self._default):
            self._default.wait_event(copied)
            _hand_over(extent, landed)
            self._worked[place].record()
        return copied

    def _copy(self, slot: torch.Tensor, target: torch.Tensor) -> torch.cuda.Event:
        with torch.cuda.stream(self._copies):
            target.copy_(slot, non_blocking=True)
            copied = _event()
            copied.record(self._copies)
            return copied

    def __exit__(self, kind: object = None, *raised: object) -> None:
        self._default.wait_stream(self._copies)
        if kind is not None:
            self._copies.synchronize()  # it still reads slots, and writes what is freed now


def _event() -> torch.cuda.Event:
    """Make an event whose waiters sleep: threads that spin would take the cores from those that read."""
    return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]


def _hand_over(extent: Extent, landed: torch.Tensor | None) -> None:
    for part in extent.parts:
        if landed is not None:
            part.delivery.take(part.values(landed), part.begin)
        part.delivery.arrived(part.count)


def _way(device: torch.device, slot_bytes: int) -> _Way:
    return _Lane(device, slot_bytes) if device.type == "cuda" else _Here()


@contextmanager
def default_stream(device: torch.device) -> Iterator[None]:
    """Work on a GPU's default stream, after all that the caller's stream holds and before all it will hold.

    bitsandbytes' 4-bit kernels run on the default stream whatever stream is current, so what they depend on must be
    ordered with it.
    """
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
            caller, default = torch.cuda.current_stream(), torch.cuda.default_stream()
            default.wait_stream(caller)
            stack.enter_context(torch.cuda.stream(default))
            stack.callback(caller.wait_stream, default)
        yield
