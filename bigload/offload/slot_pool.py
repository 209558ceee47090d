"""Slots on a device, and which group is in which: brought when it is used, or before that when it is likely next."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from ..errors import OffloadError
from .leaves import Group, Leaf, NonCopyable, StreamedTensor
from .prefetch_order import PrefetchOrder, Step
from .slots import Slot, Use, copier_to


@dataclass(frozen=True)
class StreamStats:
    """What an engine has done since it was made.

    Attributes:
        nbytes: copied to the device.
        fetches: groups that were copied.
        demand_fetches: those of them that were waited for, since nobody had guessed that they would be next.
        slots: on the device now.
        gb_per_s: of the copies that were timed, 10**9 bytes a second; 0 where none was.
    """

    nbytes: int
    fetches: int
    demand_fetches: int
    slots: int
    gb_per_s: float


def _is_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


class SlotPool(NonCopyable):
    """The slots of one device.

    Attributes:
        slots: that there are now.
        lane: the way into them.
        lock: held by whoever asks for one, or lets go of one.
    """

    def __init__(
        self, groups: Sequence[Group], device: torch.device, slots: int, on_free: Callable[[Slot], object]
    ) -> None:
        """Make the slots.

        Args:
            groups: that will be brought, in the order in which forward is likely to reach them.
            device: where to.
            slots: groups that are there at once.
            on_free: told of each slot that is no more.

        Raises:
            torch.OutOfMemoryError: the device has no room for them.
        """
        self._groups, self._max_slots, self._on_free = set(groups), min(slots, len(groups)), on_free
        self._slot_nbytes = max((group.store.layout.nbytes for group in groups), default=0)
        self.copier = copier_to(device)
        self.lock = threading.RLock()
        self.slots: list[Slot] = []
        self.order = PrefetchOrder(groups)
        self._clock = self._nbytes = self._fetches = self._demand_fetches = 0
        self.make_slots()

    def make_slots(self) -> None:
        """Make the slots that are lacking.

        Raises:
            torch.OutOfMemoryError: the device has no room for them.
        """
        while len(self.slots) < self._max_slots:
            self.slots.append(self.copier.make_slot(self._slot_nbytes))

    def enter(self, use: Use, group: Group, leaf: Leaf, streamed: Sequence[StreamedTensor]) -> Slot:
        """Bring a group to the device, or find it there, and those that are likely next; under the lock.

        Args:
            use: for which; its slot is set.
            group: to bring.
            leaf: of it, that will run.
            streamed: those of the leaf that are parameters.

        Raises:
            OffloadError: a weight of the leaf was replaced or moved since, or cannot be read, or is streamed no more.
            torch.OutOfMemoryError: the device has no room.
        """
        if group not in self._groups:
            raise OffloadError(f"the weights of {leaf.path!r} were brought back meanwhile, by remove(): run it again")
        is_backward = _is_backward()
        step = self.order.arrive(group, leaf, is_backward=is_backward)
        rest = group.store.tensors
        for each in streamed:
            each.require_at_rest(rest[each.name])
        slot = self._slot_of(group)
        if slot is None or self.copier.has_failed(slot):  # what could not be read ahead may be there now
            slot = self._room()
            self._fetch(group, slot)
            self._demand_fetches += 1
            if step is None:
                step = self.order.current(group, leaf, is_backward=is_backward)
                assert step is not None  # it has just arrived there
                self.order.record_misprediction(step)
        slot.used = self._clock = self._clock + 1
        self.join(use, slot)
        self.trim()
        if step is not None:  # what a group's other leaves would fetch has been fetched for its first
            self._prefetch(step, [group])
        return slot

    def join(self, use: Use, slot: Slot) -> None:
        """Use a slot that is in use; under the lock."""
        use.slot = slot
        slot.users.add(use)
        self.copier.await_copy(slot)

    def leave(self, group: Group, leaf: Leaf) -> None:
        """Bring what is likely next into the slot of a group that is likely not wanted any more; under the lock.

        Raises:
            torch.OutOfMemoryError: the device has no room.
        """
        step = self.order.current(group, leaf, is_backward=_is_backward())
        if step is not None and self.order.is_over(step, leaf):
            self._prefetch(step, [])

    def _prefetch(self, step: Step, wanted: list[Group]) -> None:
        """Bring the groups that are likely to be next into slots that nobody uses, beside those that are wanted now."""
        for group in self.order.after(step):
            if len(wanted) >= len(self.slots):
                break
            if group not in wanted:
                wanted.append(group)
        for group in wanted:
            if self._slot_of(group) is None:
                slot = self._free_slot(keep=wanted)
                if slot is None:
                    return
                self._fetch(group, slot)

    def _slot_of(self, group: Group) -> Slot | None:
        store = group.store
        for slot in self.slots:
            if slot.store is store:
                return slot
        return None

    def _free_slot(self, keep: Sequence[Group]) -> Slot | None:
        kept = {group.store for group in keep}
        free = [slot for slot in self.slots if not slot.users and slot.store not in kept]
        return min(free, key=lambda slot: (slot.store is not None, slot.used), default=None)

    def _room(self) -> Slot:
        """Return a slot that may be filled: a new one where there are too few, or all are in use.

        Raises:
            torch.OutOfMemoryError: the device has no room, and none is free.
        """
        free = self._free_slot(keep=())
        if free is not None and len(self.slots) < self._max_slots:
            with suppress(torch.OutOfMemoryError):
                return self._grow()
        return free or self._grow()  # to wait for one could be to wait for ever

    def _grow(self) -> Slot:
        slot = self.copier.make_slot(self._slot_nbytes)
        self.slots.append(slot)
        return slot

    def _fetch(self, group: Group, slot: Slot) -> None:
        self.copier.copy(group.store, slot)
        slot.store = group.store
        slot.used = self._clock = self._clock + 1
        self._fetches += 1
        self._nbytes += group.store.layout.nbytes

    def trim(self) -> None:
        """Free the slots that are more than were asked for, as soon as nobody uses them; under the lock."""
        while len(self.slots) > self._max_slots:
            slot = self._free_slot(keep=())
            if slot is None:
                return
            self.free(slot)

    def free(self, slot: Slot) -> None:
        """Let go of a slot that nobody uses; under the lock."""
        self.copier.discard(slot)
        self.slots.remove(slot)
        self._on_free(slot)

    def forget(self, group: Group) -> None:
        """Have a group copied anew when it is next used: its weights at rest may have changed."""
        with self.lock:
            for slot in self.slots:
                if slot.store is group.store:
                    slot.store = None  # calls that use it go on with what they had

    def free_all(self) -> None:
        """Let go of all slots; under the lock.

        Raises:
            OffloadError: one is in use.
        """
        if any(slot.users for slot in self.slots):
            raise OffloadError("leaves are running: the engine cannot be removed from within their forward")
        self.copier.finish()
        while self.slots:
            self.free(self.slots[0])

    def drop(self, group: Group) -> None:
        """Bring a group no more; under the lock."""
        self._groups.discard(group)
        self._max_slots = min(self._max_slots, len(self._groups))

    def stats(self) -> StreamStats:
        """Tell what was brought so far."""
        rate = self.copier.timed_bytes / self.copier.timed_s / 1e9 if self.copier.timed_s else 0.0
        return StreamStats(self._nbytes, self._fetches, self._demand_fetches, len(self.slots), rate)
