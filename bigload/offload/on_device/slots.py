"""Slots on the device, and the copies of groups into them, ordered by CUDA streams and events."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, TypeGuard

import torch

from ...hardware.allocation import allocate
from ...hardware.layout import aligned
from ...hardware.pinned import HostGroup, Store
from ..background import BackgroundRead, BackgroundReader
from ..files import Staging


class Use:
    """One call's use of a slot.

    Attributes:
        slot: the slot, which has the use among its `users`; None before the use begins.
    """

    __slots__ = ("slot",)

    def __init__(self) -> None:
        self.slot: Slot | None = None


class Slot:
    """Memory for one group on the device.

    Attributes:
        memory: (n,), uint8.
        store: the store of the group that it holds or is being filled with; None if it holds no whole group. It is not
            the group itself, since a thread that reads into the slot would keep the model alive.
        users: the running calls that use it.
        used: the pool's clock, a counter, at its last copy or use.
        streams: the streams that wait for the copy into it, and so may use it, by their CUDA handles.
        events: one event for each stream that has used it, recorded again for each copy.
        freed: the events that the next copy into it must wait for.
        begun: recorded before a copy that is timed.
        ready: recorded after each copy.
        nbytes_copied: bytes of the last copy if it is being timed, else 0.
        pending: the background read into it, if there is one.
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
        """Return a group's parts in this slot, by name."""
        found = self._views.get(id(store))
        if found is None:
            found = self._views[id(store)] = store.layout.views(self.memory)
        return found

    def forget_views(self, store: Store) -> None:
        """Drop the views of a store that will not be used any more; another one may get its id."""
        self._views.pop(id(store), None)


class Slice(NamedTuple):
    """One of several slices, of the same size, of a part of a store, and where it goes.

    Attributes:
        part: its name.
        number: of the slice.
        of: how many slices the part has.
        target: (bytes,), uint8, on the device.
    """

    part: str
    number: int
    of: int
    target: torch.Tensor


# One in this many copies is timed. Timing costs the host as much as launching the copy.
_TIMED_EVERY = 8


class SlotCopier:
    """Copies groups into slots in host memory, synchronously.

    Attributes:
        timed_bytes: bytes of the copies that were timed, which took `timed_s` seconds.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.timed_bytes, self.timed_s = 0, 0.0
        self._background: BackgroundReader | None = None  # started with the first read

    def make_slot(self, nbytes: int) -> Slot:
        """Allocate a slot.

        Raises:
            torch.OutOfMemoryError: the device has no room.
        """
        return Slot(self.device, aligned(max(nbytes, 1)))

    def copy(self, store: Store, slot: Slot) -> None:
        """Begin to copy a group into a slot that is not in use. The caller sets `slot.store` afterwards."""
        self._prepare(slot)
        if self._can_copy_directly(store):
            self._copy(store.source, slot)
        else:
            if self._background is None or not self._background.is_alive:
                self._background = BackgroundReader.start(self._wait_for_copies)
            pending, ask = BackgroundRead(partial(self._read, store, slot), slot.memory), self._background.queue.put
            slot.pending = pending
            ask(pending)  # in C, and right after the assignment: Ctrl-C cannot come between

    def copy_some(self, store: Store, slices: Sequence[Slice], slot: Slot) -> None:
        """Begin to copy slices into a slot that is not in use, and then does not hold the whole group.

        Raises:
            OffloadError: a file cannot be read.
        """
        self._prepare(slot)
        self._copy_slices(store, slices, slot)

    def _prepare(self, slot: Slot) -> None:
        slot.store = None
        if slot.pending is not None:
            slot.pending.wait()
            slot.pending = None
        self._order_after_users(slot)

    def _can_copy_directly(self, store: Store) -> TypeGuard[HostGroup]:
        return isinstance(store, HostGroup)

    def _copy_slices(self, store: Store, slices: Sequence[Slice], slot: Slot) -> None:
        read_slices(store, slices)

    def _order_after_users(self, slot: Slot) -> None:
        """Let the next copy into a slot wait for all computations with it so far."""

    def _copy(self, source: torch.Tensor, slot: Slot) -> None:
        slot.memory[: len(source)].copy_(source)

    def _read(self, store: Store, slot: Slot) -> None:
        store.read_into(slot.memory)

    def has_failed(self, slot: Slot) -> bool:
        """Wait for the background read into a slot, and return whether it failed; the slot is empty then."""
        pending = slot.pending
        if pending is None:
            return False
        pending.wait()
        if pending.error is None:
            return False
        slot.store = slot.pending = None
        return True

    def await_copy(self, slot: Slot) -> None:
        """Let what is computed from here on wait for the copy into a slot.

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

    def can_capture(self, store: Store) -> bool:
        """Whether a graph can copy a group: from pinned memory."""
        return self._can_copy_directly(store)

    def await_users(self, slot: Slot) -> None:
        """Let what is computed from here on wait for all streams that use a slot: a replay overwrites it."""

    def note_replay(self, slot: Slot) -> None:
        """Note that a replay on the current stream has used a slot, and copied into it."""

    def discard(self, slot: Slot) -> None:
        """Let a slot's memory be freed as soon as the copies and computations with it are done."""
        if slot.pending is not None:
            slot.pending.wait()

    def finish(self) -> None:
        """Wait for all background reads, copies and computations."""
        if self._background is not None and self._background.is_alive:
            self._background.finish()
        self._wait_for_copies()

    def close(self) -> None:
        """End the background thread and wait for running copies. The garbage collector may call this."""
        background, self._background = self._background, None
        if background is not None:
            background.queue.put(None)
        self._wait_for_copies()

    def _wait_for_copies(self) -> None:
        pass


class CudaSlotCopier(SlotCopier):
    """Copies groups into slots on a GPU, on a stream of its own; the host waits for nothing.

    Attributes:
        stream: the stream, on which nothing but copies runs.
        staging: what slices pass through that are not in pinned memory, for slots and for caches of experts alike.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._staging_of_groups, self.staging = Staging(), Staging()
        self._turn = 0

    def make_slot(self, nbytes: int) -> Slot:
        """Allocate a slot and its events."""
        slot = super().make_slot(nbytes)
        slot.begun, slot.ready = _timing_event(), _timing_event()
        # The current stream may still use a tensor that had this memory before.
        slot.streams[self._current()] = torch.cuda.current_stream(self.device)
        return slot

    def _current(self) -> int:
        return int(torch._C._cuda_getCurrentRawStream(self._index))  # ten times faster than to make a Stream

    def _can_copy_directly(self, store: Store) -> TypeGuard[HostGroup]:
        # Of memory that is not pinned, the host would wait for the copy: the background thread stages it instead.
        return isinstance(store, HostGroup) and store.is_pinned

    def _order_after_users(self, slot: Slot) -> None:
        # Recorded now, since the background thread may copy much later, when the streams have got more to do.
        # `freed` may hold events of an earlier copy that failed before it waited for them.
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
        self._wait_for_users(slot)
        with torch.cuda.stream(self.stream):
            if is_timed:
                slot.begun.record(self.stream)
            slot.memory[: len(source)].copy_(source, non_blocking=True)
            slot.ready.record(self.stream)
        slot.nbytes_copied = len(source) if is_timed else 0

    def _wait_for_users(self, slot: Slot) -> None:
        for event in slot.freed.values():
            self.stream.wait_event(event)
        slot.freed.clear()

    def _copy_slices(self, store: Store, slices: Sequence[Slice], slot: Slot) -> None:
        assert slot.ready is not None
        self._add_timing(slot)
        self._wait_for_users(slot)
        with torch.cuda.stream(self.stream):
            copy_slices(store, slices, self.stream, self.staging)
            slot.ready.record(self.stream)

    def _read(self, store: Store, slot: Slot) -> None:
        memory, copied = self._staging_of_groups.take(aligned(store.layout.nbytes))
        store.read_into(memory)
        with torch.inference_mode(False):
            self._copy(memory[: store.layout.nbytes], slot)
        copied.record(self.stream)

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
            # Added first, so that the next copy waits for the stream whatever happens here.
            stream = slot.streams[current] = torch.cuda.current_stream(self.device)
            try:
                stream.wait_event(slot.ready)
            except BaseException:
                slot.store = None
                raise

    def await_users(self, slot: Slot) -> None:
        """Let the current stream wait for the others that use a slot."""
        current = self._current()
        for number, stream in slot.streams.items():
            if number != current:
                torch.cuda.current_stream(self.device).wait_stream(stream)

    def note_replay(self, slot: Slot) -> None:
        """Let others wait for the replay on the current stream."""
        stream = torch.cuda.current_stream(self.device)
        assert slot.ready is not None
        slot.ready.record(stream)
        slot.streams = {self._current(): stream}
        slot.nbytes_copied = 0  # its copy was not timed

    def discard(self, slot: Slot) -> None:
        """Let a slot's memory be freed; torch's allocator waits for the streams that have used it."""
        super().discard(slot)
        for event in slot.freed.values():
            self.stream.wait_event(event)
        for stream in (self.stream, *slot.streams.values()):
            slot.memory.record_stream(stream)

    def _wait_for_copies(self) -> None:
        torch.cuda.synchronize(self.device)


def _has_ended(event: torch.cuda.Event) -> bool:
    return event.query()  # type: ignore[no-untyped-call, no-any-return]


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def read_slices(store: Store, slices: Sequence[Slice]) -> None:
    """Copy slices into host memory.

    Raises:
        OffloadError: a file cannot be read.
    """
    if isinstance(store, HostGroup):
        _copy_all(store, slices)
        return
    for part, number, of, memory in slices:
        store.read_slice(part, number, of, memory)


def _copy_all(store: HostGroup, slices: Sequence[Slice]) -> None:
    """Copy slices by one call: for small ones Python takes longer than the copies, of which a token wants hundreds."""
    if slices:
        sources = [store.slice_of(part, number, of) for part, number, of, _ in slices]
        torch._foreach_copy_([each.target for each in slices], sources, non_blocking=True)


def copy_slices(store: Store, slices: Sequence[Slice], stream: torch.cuda.Stream, staging: Staging) -> None:
    """Begin to copy slices to a GPU, on the current stream, which is `stream`.

    Args:
        staging: what slices pass through that are not in pinned memory: the host would wait for each copy.

    Raises:
        OffloadError: a file cannot be read.
    """
    if isinstance(store, HostGroup) and store.is_pinned:
        _copy_all(store, slices)
        return
    for part, number, of, memory in slices:
        with staging.lock:
            staged, copied = staging.take(memory.numel())
            store.read_slice(part, number, of, staged[: memory.numel()])
            memory.copy_(staged[: memory.numel()], non_blocking=True)
            copied.record(stream)


def copier_to(device: torch.device) -> SlotCopier:
    """Make the copier for a device."""
    return CudaSlotCopier(device) if device.type == "cuda" else SlotCopier(device)
