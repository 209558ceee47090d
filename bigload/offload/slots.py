"""Slots on the device that groups of weights pass through, and the copies into them, ordered by streams and events."""

from __future__ import annotations

from functools import partial
from typing import TypeGuard

import torch

from ..hardware.allocation import allocate
from ..hardware.layout import aligned
from ..hardware.pinned import HostGroup, Store
from .background import BackgroundRead, BackgroundReader
from .files import Staging


class Use:
    """One call's use of a slot.

    Attributes:
        slot: of whose `users` it is one; None before.
    """

    __slots__ = ("slot",)

    def __init__(self) -> None:
        self.slot: Slot | None = None


class Slot:
    """Room for one group on the device.

    Attributes:
        memory: (n,), uint8.
        store: of the group that it holds, or is being filled with; None while that is nothing whole. Not the group:
            a thread that reads into a slot would keep the model.
        users: the calls that use what it holds.
        used: when it was last filled or used, as a count.
        landing: what a thread brings into it.
        events: one for each stream that has used it, to be recorded again and again.
        freed: those of them after which a copy into it may begin.
        streams: those that have been ordered after the copy into it, and so may use it, by CUDA's own names for them.
    """

    def __init__(self, device: torch.device, nbytes: int) -> None:
        with torch.inference_mode(False):
            self.memory = allocate((nbytes,), torch.uint8, device)
        self.store: Store | None = None
        self.users: set[Use] = set()
        self.used = 0
        self.streams: dict[int, torch.cuda.Stream] = {}
        self.events: dict[int, torch.cuda.Event] = {}
        self.freed: dict[int, torch.cuda.Event] = {}
        self.begun: torch.cuda.Event | None = None
        self.ready: torch.cuda.Event | None = None
        self.nbytes_copied = 0
        self.pending: BackgroundRead | None = None
        self._views: dict[int, dict[str, torch.Tensor]] = {}

    def views(self, store: Store) -> dict[str, torch.Tensor]:
        """Return a group's parts as they lie in this slot."""
        found = self._views.get(id(store))
        if found is None:
            found = self._views[id(store)] = store.layout.views(self.memory)
        return found


# One in so many copies is timed, which takes the host as long as the asking for it.
_TIMED_EVERY = 8


class SlotCopier:
    """The way into slots of the host's own memory: a copy is there when it has been asked for.

    Attributes:
        timed_bytes: copied in `timed_s` seconds.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.timed_bytes, self.timed_s = 0, 0.0
        self._background: BackgroundReader | None = None  # before there is something to bring

    def make_slot(self, nbytes: int) -> Slot:
        """Allocate a slot.

        Raises:
            torch.OutOfMemoryError: the device has no room.
        """
        return Slot(self.device, aligned(max(nbytes, 1)))

    def copy(self, store: Store, slot: Slot) -> None:
        """Begin to copy a group into a slot that nobody uses; it holds the group from then on."""
        slot.store = None  # until it is whole
        if slot.pending is not None:
            slot.pending.wait()
            slot.pending = None
        self._order_after_users(slot)
        if self._can_copy_directly(store):
            self._copy(store.source, slot)
        else:
            if self._background is None or not self._background.is_alive:
                self._background = BackgroundReader.start(self._wait_for_copies)
            pending, ask = BackgroundRead(partial(self._read, store, slot), slot.memory), self._background.queue.put
            slot.pending = pending
            ask(pending)  # a call in C that follows at once: Ctrl-C cannot come between

    def _can_copy_directly(self, store: Store) -> TypeGuard[HostGroup]:
        return isinstance(store, HostGroup)

    def _order_after_users(self, slot: Slot) -> None:
        """Have the copy into a slot come after all that was computed with it until now."""

    def _copy(self, source: torch.Tensor, slot: Slot) -> None:
        slot.memory[: len(source)].copy_(source)

    def _read(self, store: Store, slot: Slot) -> None:
        store.read_into(slot.memory)

    def has_failed(self, slot: Slot) -> bool:
        """Wait until what a thread brings into a slot is there; ask whether it could not be, so that nothing is."""
        pending = slot.pending
        if pending is None:
            return False
        pending.wait()
        if pending.error is None:
            return False
        slot.store = slot.pending = None
        return True

    def await_copy(self, slot: Slot) -> None:
        """Let what the caller computes from here on come after the copy into a slot.

        Raises:
            OffloadError: the group's files cannot be read.
        """
        pending = slot.pending
        if pending is not None:
            pending.wait()
            slot.pending = None
            if pending.error is not None:
                slot.store = None
                raise pending.error

    def discard(self, slot: Slot) -> None:
        """Let go of a slot, whose memory may be another's as soon as what is asked of it now is done."""
        if slot.pending is not None:
            slot.pending.wait()

    def finish(self) -> None:
        """Wait until nothing is brought, copied, or computed, any more."""
        if self._background is not None and self._background.is_alive:
            self._background.finish()
        self._wait_for_copies()

    def close(self) -> None:
        """Let the thread go, and wait for what is copied now: the collector may call this."""
        background, self._background = self._background, None
        if background is not None:
            background.queue.put(None)
        self._wait_for_copies()

    def _wait_for_copies(self) -> None:
        pass


class CudaSlotCopier(SlotCopier):
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

    def _can_copy_directly(self, store: Store) -> TypeGuard[HostGroup]:
        """Whether a copy need not pass through staging: of pinned memory alone does it let the host go on."""
        return isinstance(store, HostGroup) and store.is_pinned

    def _order_after_users(self, slot: Slot) -> None:
        # Now: a thread may copy much later, when more has been asked for that need not be waited for.
        # What an earlier copy was to wait for, and failed before it did, is waited for still.
        for number, stream in slot.streams.items():
            event = slot.events.get(number)
            if event is None:
                event = slot.events[number] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
            slot.freed[number] = event
        slot.streams.clear()

    def _copy(self, source: torch.Tensor, slot: Slot) -> None:
        assert slot.begun is not None
        assert slot.ready is not None
        self._add_timing(slot)
        is_timed = self._turn == 0
        self._turn = (self._turn + 1) % _TIMED_EVERY
        for event in slot.freed.values():
            self._stream.wait_event(event)
        slot.freed.clear()
        with torch.cuda.stream(self._stream):
            if is_timed:
                slot.begun.record(self._stream)
            slot.memory[: len(source)].copy_(source, non_blocking=True)
            slot.ready.record(self._stream)
        slot.nbytes_copied = len(source) if is_timed else 0

    def _read(self, store: Store, slot: Slot) -> None:
        memory, copied = self._staging.take(aligned(store.layout.nbytes))
        store.read_into(memory)
        with torch.inference_mode(False):
            self._copy(memory[: store.layout.nbytes], slot)
        copied.record(self._stream)

    def _add_timing(self, slot: Slot) -> None:
        if slot.nbytes_copied and slot.begun is not None and slot.ready is not None and _has_ended(slot.ready):
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

    def discard(self, slot: Slot) -> None:
        """Let go of a slot; torch's allocator waits for the streams that have used it."""
        super().discard(slot)
        for event in slot.freed.values():
            self._stream.wait_event(event)
        for stream in (self._stream, *slot.streams.values()):
            slot.memory.record_stream(stream)

    def _wait_for_copies(self) -> None:
        torch.cuda.synchronize(self.device)


def _has_ended(event: torch.cuda.Event) -> bool:
    return event.query()  # type: ignore[no-untyped-call, no-any-return]


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def copier_to(device: torch.device) -> SlotCopier:
    """Return the way to a device."""
    return CudaSlotCopier(device) if device.type == "cuda" else SlotCopier(device)
