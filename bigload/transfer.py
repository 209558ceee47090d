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
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

import torch

from .errors import CheckpointError
from .extents import Delivery, Extent, Part, cut
from .ring import Ring, as_bytes, reader_threads, take_ring

# Places on a GPU for what its default stream has yet to work on, and their size.
_WINDOW = 2
PLACE_BYTES = 64 * 2**20
WINDOW_BYTES = _WINDOW * PLACE_BYTES
# Bytes that one thread reads at once.
BLOCK_BYTES = 4 * 2**20


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
    with take_ring(pinned=any(device.type == "cuda" for device in devices)) as ring:
        reader = Reader(cut(deliveries, ring.slot_bytes), ring)
        ways = {device: _way(device) for device in devices}
        try:
            with ExitStack() as entered:
                for way in ways.values():
                    entered.enter_context(way)
                with reader:
                    for extent, slot, filled in reader:
                        reader.release(slot, ways[extent.device].land(extent, slot, filled))
                        on_bytes(extent.nbytes)
        finally:
            # A second Ctrl-C stops the waiting for threads and copies: then the ring is theirs, and not kept.
            ring.is_quiet = reader.is_done and all(way.is_done for way in ways.values())


class Reader(AbstractContextManager["Reader"]):
    """Fills extents ahead of their use; nothing of it outlives the `with` block.

    Several threads fill one extent, block by block. They and the caller meet in two queues, of free slots and of filled
    extents, each of which wakes one who waits: a dozen threads that wake to look at a shared condition would take the
    interpreter's lock from the one that has work to do.
    """

    def __init__(self, extents: Sequence[Extent], ring: Ring) -> None:
        """Take the extents in the order in which they will be asked for."""
        self._extents, self._ring = extents, ring
        self._blocks = self._in_order()
        self._claiming, self._finishing = threading.Lock(), threading.Lock()
        self._free: SimpleQueue[tuple[int, torch.cuda.Event | None] | None] = SimpleQueue()
        self._filled: SimpleQueue[_Filling] = SimpleQueue()
        self._descriptors: dict[Path, int] = {}
        self._stopped = False
        self.is_done = False
        for slot in range(ring.count):
            self._free.put((slot, None))
        count = min(reader_threads(), sum(-(-extent.nbytes // BLOCK_BYTES) for extent in extents))
        self._threads = [threading.Thread(target=self._read_ahead, daemon=True) for _ in range(count)]

    def __enter__(self) -> Reader:
        try:
            for thread in self._threads:
                thread.start()
        except BaseException as error:  # no more threads are to be had, or Ctrl-C: those that run must not stay
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __iter__(self) -> Iterator[tuple[Extent, int | None, torch.Tensor | None]]:
        """Give the extents in their order, each when it is filled, with its slot's number and bytes if it has one."""
        early: dict[int, _Filling] = {}
        for index, extent in enumerate(self._extents):
            while index not in early:
                filling = self._filled.get()
                if filling.error is not None:
                    raise filling.error
                early[filling.index] = filling
            slot = early.pop(index).slot
            yield extent, slot, None if slot is None else self._ring.slots[slot][: extent.nbytes]

    def release(self, slot: int | None, copied: torch.cuda.Event | None) -> None:
        """Let a slot be filled again, when the event has happened."""
        if slot is not None:
            self._free.put((slot, copied))

    def _in_order(self) -> Iterator[tuple[_Filling, int, list[memoryview]]]:
        """Cut the extents into blocks, each extent when there is a slot for it.

        Yields:
            The extent, the block's offset in it, and the memory to fill.
        """
        for index, extent in enumerate(self._extents):
            if extent.is_direct:
                homes = [as_bytes(part.home) for part in extent.parts if part.home is not None]
                slot, memory = None, homes[0]
                if len(homes) > 1:
                    yield _Filling(index, None, 1), 0, homes
                    continue
            else:
                freed = self._free.get()
                if freed is None:
                    return
                slot, copied = freed
                if copied is not None:
                    copied.synchronize()
                memory = self._ring.buffers[slot]
            filling = _Filling(index, slot, -(-extent.nbytes // BLOCK_BYTES))
            for begin in range(0, extent.nbytes, BLOCK_BYTES):
                yield filling, begin, [memory[begin : min(begin + BLOCK_BYTES, extent.nbytes)]]

    def _read_ahead(self) -> None:
        try:
            while (block := self._claim()) is not None:
                filling, begin, memory = block
                self._fill(self._extents[filling.index], begin, memory)
                with self._finishing:
                    filling.blocks -= 1
                    is_full = not filling.blocks
                if is_full:
                    self._filled.put(filling)
        except BaseException as error:  # raised where extents are asked for
            self._filled.put(_Filling(-1, None, 0, error))

    def _claim(self) -> tuple[_Filling, int, list[memoryview]] | None:
        with self._claiming:  # where one waits for a slot, the others wait for it
            return None if self._stopped else next(self._blocks, None)

    def _fill(self, extent: Extent, begin: int, buffers: list[memoryview]) -> None:
        offset, file = extent.offset + begin, extent.file
        try:
            descriptor = self._descriptor(file)
            while buffers:
                received = os.preadv(descriptor, buffers, offset)
                if not received:
                    name = extent.name_at(offset)
                    raise CheckpointError(f"'{file}' ended while '{name}' was read: it was cut meanwhile")
                offset += received
                buffers = _without(buffers, received)
        except OSError as error:
            name = extent.name_at(offset)
            raise CheckpointError(f"reading '{name}' from '{file}' failed: {error}") from error

    def _descriptor(self, path: Path) -> int:
        if path not in self._descriptors:
            with self._finishing:
                if path not in self._descriptors:
                    self._descriptors[path] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        return self._descriptors[path]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = True
        self._free.put(None)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        while not self._free.empty():
            freed = self._free.get()
            if freed is not None and freed[1] is not None:
                freed[1].synchronize()  # the copy still reads the slot
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self.is_done = True


@dataclass(eq=False)
class _Filling:
    """An extent, by its index, while threads fill it; or what stopped one of them."""

    index: int
    slot: int | None
    blocks: int
    error: BaseException | None = None


def _without(buffers: list[memoryview], count: int) -> list[memoryview]:
    """Leave out the first bytes, which have been filled."""
    for index, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[index + 1 :]]
        count -= len(buffer)
    return []


class _Way(AbstractContextManager["_Way"]):
    """The way of extents to one device.

    Attributes:
        is_done: nothing is under way any more.
    """

    is_done = True

    def land(self, extent: Extent, slot: int | None, filled: torch.Tensor | None) -> torch.cuda.Event | None:
        """Bring an extent there and hand it over.

        Args:
            extent: what was read.
            slot: the number of the slot that it was read into, None where it was read into its homes.
            filled: its bytes there.

        Returns:
            The event after which the slot may be filled again; None if it may at once.
        """
        raise NotImplementedError

    def __exit__(self, *raised: object) -> None:
        pass


class _Here(_Way):
    """The way to the CPU: what was read is there."""

    def land(self, extent: Extent, slot: int | None, filled: torch.Tensor | None) -> None:
        for part in extent.parts:
            if filled is not None:
                part.delivery.take(part.values_in(filled), part.begin)
            part.delivery.arrived(part.count)


class _Lane(_Way):
    """The way onto one GPU: copies on a stream of their own, into homes or into a window on the device.

    A place of the window gathers a tensor, or as much of it as it holds, before the default stream takes it: few large
    steps instead of many. Events order it all: a place is written after the default stream has worked on what was
    there, and worked on after it has been written.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._default = torch.cuda.default_stream(device)
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._places: list[_Place] = []
        self._copied: defaultdict[int, torch.cuda.Event] = defaultdict(_event)  # by slot
        self._turn = 0

    def __enter__(self) -> _Lane:
        self.is_done = False
        self._places = [_Place(self._device) for _ in range(_WINDOW)]
        # Homes and window may have been another tensor's, which the default stream has yet to finish with.
        self._copies.wait_stream(self._default)
        return self

    def land(self, extent: Extent, slot: int | None, filled: torch.Tensor | None) -> torch.cuda.Event:
        assert slot is not None
        assert filled is not None
        copied = self._copied[slot]
        torch.cuda.set_stream(self._copies)  # a context would take ten times as long
        for part in extent.parts:
            home = part.home
            if home is None:
                self._gather(part, part.bytes_in(filled))
            else:
                home.copy_(part.bytes_in(filled), non_blocking=True)
        copied.record(self._copies)
        torch.cuda.set_stream(self._default)
        at_home = [part for part in extent.parts if part.delivery.home is not None]
        if at_home:
            self._default.wait_event(copied)  # what is done with a tensor that is whole is done there
        for part in at_home:
            part.delivery.arrived(part.count)
        return copied

    def _gather(self, part: Part, values: torch.Tensor) -> None:
        """Copy a piece's bytes into the place of its tensor, and what does not fit there into the next."""
        delivery = part.delivery
        itemsize = delivery.tensor.dtype.itemsize
        room = PLACE_BYTES // itemsize // delivery.granule * delivery.granule * itemsize
        begin, copied = part.begin * itemsize, 0
        while copied < part.nbytes:
            place = self._places[self._turn]
            if not place.gathered:
                self._copies.wait_event(place.worked)
            count = min(part.nbytes - copied, room - place.gathered)
            target = place.memory[place.gathered : place.gathered + count]
            target.copy_(values[copied : copied + count], non_blocking=True)
            place.gathered += count
            copied += count
            if place.gathered == room or begin + copied == delivery.tensor.nbytes:
                self._hand_over(delivery, place, (begin + copied - place.gathered) // itemsize)

    def _hand_over(self, delivery: Delivery, place: _Place, begin: int) -> None:
        place.copied.record(self._copies)
        self._default.wait_event(place.copied)
        torch.cuda.set_stream(self._default)
        values = place.memory[: place.gathered].view(delivery.tensor.dtype)
        delivery.take(values, begin)
        delivery.arrived(len(values))
        place.worked.record(self._default)
        torch.cuda.set_stream(self._copies)
        place.gathered = 0
        self._turn = (self._turn + 1) % _WINDOW

    def __exit__(self, kind: object = None, *raised: object) -> None:
        torch.cuda.set_stream(self._default)  # an error may have come between
        self._default.wait_stream(self._copies)
        if kind is not None:
            self._copies.synchronize()  # it still reads slots, and writes what is freed now
        self.is_done = True


class _Place:
    """Memory on a GPU where a tensor is gathered."""

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.empty(PLACE_BYTES, dtype=torch.uint8, device=device)
        self.gathered = 0
        self.copied, self.worked = _event(), _event()


def _event() -> torch.cuda.Event:
    """Make an event whose waiters sleep: threads that spin would take the cores from those that read."""
    return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]


def _way(device: torch.device) -> _Way:
    return _Lane(device) if device.type == "cuda" else _Here()


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
