"""Slots on the device that groups of weights pass through, and the copies into them, ordered by streams and events."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from queue import SimpleQueue
from typing import TypeGuard

import torch

from .disk import Staging
from .host import HostGroup, Store, aligned
from .stores import DeviceStore


class Slot:
    """Room for one group on the device.

    Attributes:
        memory: (n,), uint8.
        store: of the group that it holds, or is being filled with; None while that is nothing whole. Not the group:
            a thread that reads into a slot would keep the model.
        users: the calls that use what it holds.
        used: when it was last filled or used, as a count.
        landing: what a thread reads from files into it.
        freed: events after which a copy into it may begin.
        events: by stream, to be used again and again.
        streams: those that have been ordered after the copy into it, and so may use it, by CUDA's own names for them.
    """

    def __init__(self, device: torch.device, nbytes: int) -> None:
        with torch.inference_mode(False):
            self.memory = DeviceStore(device).allocate((nbytes,), torch.uint8)
        self.store: Store | None = None
        self.users: set[object] = set()
        self.used = 0
        self.streams: dict[int, torch.cuda.Stream] = {}
        self.freed: list[torch.cuda.Event] = []
        self.events: dict[int, torch.cuda.Event] = {}
        self.begun: torch.cuda.Event | None = None
        self.ready: torch.cuda.Event | None = None
        self.nbytes_copied = 0
        self.landing: Future[None] | None = None
        self._views: dict[int, dict[str, torch.Tensor]] = {}

    def views(self, store: Store) -> dict[str, torch.Tensor]:
        """Give a group's parts as they lie in this slot."""
        found = self._views.get(id(store))
        if found is None:
            found = self._views[id(store)] = store.layout.views(self.memory)
        return found


# One in so many copies is timed, which takes the host as long as the asking for it.
_TIMED = 8

_Given = SimpleQueue[tuple[Future[None], Callable[[], None], torch.Tensor | None] | None]


class _Reader:
    """A thread that reads what it is given from files, or from memory that is not pinned, in order.

    No pool of Python's: those take a lock of the whole process, which the collector of cycles, when it lets go of an
    engine, may find taken by the very thread that it interrupts.
    """

    def __init__(self, at_end: Callable[[], object]) -> None:
        self._given: _Given = SimpleQueue()
        threading.Thread(target=_read_on, args=(self._given, at_end), name="bigload-reader", daemon=True).start()

    def submit(self, read: Callable[[], None], memory: torch.Tensor | None = None) -> Future[None]:
        """Give it something to read, into memory that copies may go on to write for a while after."""
        done: Future[None] = Future()
        self._given.put((done, read, memory))
        return done

    def end(self) -> None:
        """Let it go when it has read what it was given; nobody waits."""
        self._given.put(None)


def _read_on(given: _Given, at_end: Callable[[], object]) -> None:
    # The memory of the last two is held, whose copies may go on; staging has two buffers, so no more do.
    held: deque[torch.Tensor | None] = deque(maxlen=2)
    while _read_next(given, held):
        pass
    at_end()


def _read_next(given: _Given, held: deque[torch.Tensor | None]) -> bool:
    """Read one thing; of it nothing but its memory is held while the next is waited for, least of all the engine."""
    item = given.get()
    if item is None:
        return False
    done, read, memory = item
    held.append(memory)
    try:
        read()
    except BaseException as error:
        done.set_exception(error)
    else:
        done.set_result(None)
    return True


class Lane:
    """The way into slots of the host's own memory: a copy is there when it has been asked for.

    Attributes:
        timed_bytes: copied in `timed_s` seconds.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.timed_bytes, self.timed_s = 0, 0.0
        self._reader: _Reader | None = None  # before there is something to read

    def make_slot(self, nbytes: int) -> Slot:
        """Allocate a slot.

        Raises:
            torch.OutOfMemoryError: the device has no room.
        """
        return Slot(self.device, aligned(max(nbytes, 1)))

    def copy(self, store: Store, slot: Slot) -> None:
        """Begin to copy a group into a slot that nobody uses; it holds the group from then on."""
        slot.store = None  # until it is whole
        if slot.landing is not None:
            wait([slot.landing])
            slot.landing = None
        self._order_after_users(slot)
        if self._can_begin_at_once(store):
            self._copy(store.source, slot)
        else:
            self._reader = self._reader or _Reader(self._wait_for_copies)
            slot.landing = self._reader.submit(partial(self._land, store, slot), slot.memory)

    def _can_begin_at_once(self, store: Store) -> TypeGuard[HostGroup]:
        return isinstance(store, HostGroup)

    def _order_after_users(self, slot: Slot) -> None:
        """Have the copy into a slot come after all that was computed with it until now."""

    def _copy(self, source: torch.Tensor, slot: Slot) -> None:
        slot.memory[: len(source)].copy_(source)

    def _land(self, store: Store, slot: Slot) -> None:
        store.read_into(slot.memory)

    def await_copy(self, slot: Slot) -> None:
        """Let what the caller computes from here on come after the copy into a slot.

        Raises:
            OffloadError: the group's files cannot be read.
        """
        if slot.landing is not None:
            try:
                slot.landing.result()
            except BaseException:
                slot.store = None
                raise
            slot.landing = None

    def finish(self) -> None:
        """Wait until nothing is read, copied, or computed, any more."""
        if self._reader is not None:
            self._reader.submit(lambda: None).result()
        self._wait_for_copies()

    def close(self) -> None:
        """Let the thread that reads files go, and wait for what is copied now: the collector may call this."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.end()
        self._wait_for_copies()

    def _wait_for_copies(self) -> None:
        pass


class CudaLane(Lane):
    """The way into a GPU's memory, on a stream of its own; the host waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._staging = Staging()
        self._turn = 0

    def make_slot(self, nbytes: int) -> Slot:
        """Allocate a slot, and its events."""
        slot = super().make_slot(nbytes)
        slot.begun, slot.ready = _timing_event(), _timing_event()
        # The memory may have been another tensor's, which the stream that it came from has yet to finish with.
        slot.streams[self._current()] = torch.cuda.current_stream(self.device)
        return slot

    def _current(self) -> int:
        return int(torch._C._cuda_getCurrentRawStream(self._index))  # to make a Stream takes ten times as long

    def _can_begin_at_once(self, store: Store) -> TypeGuard[HostGroup]:
        """Ask whether a copy need not pass through staging: of pinned memory alone does it let the host go on."""
        return isinstance(store, HostGroup) and store.is_pinned

    def _order_after_users(self, slot: Slot) -> None:
        # Now: a thread may copy much later, when more has been asked for that need not be waited for.
        slot.freed.clear()
        for number, stream in slot.streams.items():
            event = slot.events.get(number)
            if event is None:
                event = slot.events[number] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
            slot.freed.append(event)
        slot.streams.clear()

    def _copy(self, source: torch.Tensor, slot: Slot) -> None:
        assert slot.begun is not None
        assert slot.ready is not None
        self._take_time(slot)
        is_timed = self._turn == 0
        self._turn = (self._turn + 1) % _TIMED
        for event in slot.freed:
            self._stream.wait_event(event)
        with torch.cuda.stream(self._stream):
            if is_timed:
                slot.begun.record(self._stream)
            slot.memory[: len(source)].copy_(source, non_blocking=True)
            slot.ready.record(self._stream)
        slot.nbytes_copied = len(source) if is_timed else 0

    def _land(self, store: Store, slot: Slot) -> None:
        memory, copied = self._staging.take(aligned(store.layout.nbytes))
        store.read_into(memory)
        with torch.inference_mode(False):
            self._copy(memory[: store.layout.nbytes], slot)
        copied.record(self._stream)

    def _take_time(self, slot: Slot) -> None:
        if slot.nbytes_copied and slot.begun is not None and slot.ready is not None and _is_over(slot.ready):
            self.timed_s += slot.begun.elapsed_time(slot.ready) / 1000
            self.timed_bytes += slot.nbytes_copied
        slot.nbytes_copied = 0

    def await_copy(self, slot: Slot) -> None:
        """Let the current stream wait for the copy into a slot, once."""
        super().await_copy(slot)
        current = self._current()
        if current not in slot.streams:
            assert slot.ready is not None
            stream = slot.streams[current] = torch.cuda.current_stream(
                self.device
            )  # first: the next copy must wait for it whatever happens here
            try:
                stream.wait_event(slot.ready)
            except BaseException:
                slot.store = None
                raise

    def _wait_for_copies(self) -> None:
        torch.cuda.synchronize(self.device)


def _is_over(event: torch.cuda.Event) -> bool:
    return event.query()  # type: ignore[no-untyped-call, no-any-return]


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def lane_to(device: torch.device) -> Lane:
    """Give the way to a device."""
    return CudaLane(device) if device.type == "cuda" else Lane(device)
