"""The slots on one device. A group is copied into one when it is used, or earlier when it is probably next."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from ...errors import OffloadError
from ...hardware.pinned import Store
from ..leaves import Group, Leaf, NonCopyable
from .captured_copies import CapturedCopies
from .expert_cache import ExpertCaches
from .prefetch_order import PrefetchOrder, Step
from .slots import Slice, Slot, Use, copier_to


@dataclass(frozen=True)
class StreamStats:
    """What has been streamed since the model was loaded.

    Attributes:
        nbytes: bytes copied to the device.
        fetches: copies of groups to the device.
        demand_fetches: the fetches that a forward had to wait for, because they had not been predicted.
        slots: the slots on the device now.
        gb_per_s: the rate of the copies that were timed, in 10**9 bytes per second; 0 if none was.
        expert_hits: experts that a call needed and found in the cache on the device, each counted once for a call.
        expert_misses: experts that were not in the cache and were copied one by one.

    Examples:
        >>> from bigload.offload.on_device.slot_pool import StreamStats
        >>> stats = StreamStats(nbytes=2**20, fetches=4, demand_fetches=1, slots=2, gb_per_s=25.0)
        >>> f"{stats.nbytes / stats.fetches / 2**10:.0f} KiB in each copy"  # of what model.offload.stats() returns
        '256 KiB in each copy'
    """

    nbytes: int
    fetches: int
    demand_fetches: int
    slots: int
    gb_per_s: float
    expert_hits: int = 0
    expert_misses: int = 0


def _is_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


class SlotPool(NonCopyable):
    """The slots of one device.

    Attributes:
        slots: the slots that exist now.
        copier: copies groups into them.
        caches: of the groups whose experts stay on the device.
        order: predicts which group follows.
        lock: guards all of it.
        captured: what copies instead, while a step is captured.
        visits: notes the group of each leaf that runs, if it is a list.
    """

    def __init__(
        self, groups: Sequence[Group], device: torch.device, slots: int, on_free: Callable[[Slot], object]
    ) -> None:
        """Allocate the slots.

        Args:
            groups: what will be copied into them, in the order in which forward is likely to reach them.
            device: the slots' device.
            slots: how many there are, at most one for each group.
            on_free: called with each slot that is freed, or whose contents get another layout.

        Raises:
            torch.OutOfMemoryError: the device has no room for the slots.
        """
        self._groups, self._max_slots, self._on_free = set(groups), min(slots, len(groups)), on_free
        self._slot_nbytes = max((group.store.layout.nbytes for group in groups), default=0)
        self._has_small = False  # slots that were made for smaller groups
        self.copier = copier_to(device)
        self.lock = threading.RLock()
        self.slots: list[Slot] = []
        self.order = PrefetchOrder(groups)
        self._clock = self._nbytes = self._fetches = self._demand_fetches = 0
        self.captured: CapturedCopies | None = None
        self.visits: list[Group] | None = None
        self.caches = ExpertCaches(groups, self.copier)
        self.make_slots()

    def make_slots(self) -> None:
        """Allocate the slots that are missing, and the memory of the caches.

        Raises:
            torch.OutOfMemoryError: the device has no room for them.
        """
        while len(self.slots) < self._max_slots:
            self.slots.append(self.copier.make_slot(self._slot_nbytes))
        self.caches.allocate()

    def enter(self, use: Use, group: Group, leaf: Leaf) -> Slot:
        """Begin a use of a group. It is copied to the device if it is not there, and the next ones are prefetched.

        The caller holds the lock.

        Args:
            use: the use, which gets its slot.
            group: the group.
            leaf: the leaf of the group that will run.

        Returns:
            The slot that holds the group.

        Raises:
            OffloadError: the group cannot be read, or is no longer offloaded.
            torch.OutOfMemoryError: the device has no room.
        """
        self._require_offloaded(group, leaf.path)
        if self.captured is not None:
            return self.captured.enter(use, group)
        if self.visits is not None:
            self.visits.append(group)
        is_backward = _is_backward()
        step = self.order.arrive(group, leaf, is_backward=is_backward)
        slot = self._slot_of(group)
        if slot is None or self.copier.has_failed(slot):  # what could not be prefetched may be readable now
            slot = self._room()
            self._fetch(group, slot)
            self._demand_fetches += 1
            if step is None:
                step = self.order.current(group, leaf, is_backward=is_backward)
                assert step is not None  # this thread has just arrived there
                self.order.record_misprediction(step)
        slot.used = self._clock = self._clock + 1
        self.join(use, slot)
        if self._has_small or len(self.slots) > self._max_slots:
            self.trim()
        if step is not None:  # the first leaf of a group prefetches for the others too
            self._prefetch(step, [group])
        return slot

    def enter_some(self, use: Use, group: Group, choose: Callable[[dict[str, torch.Tensor]], Sequence[Slice]]) -> Slot:
        """Begin a use of a part of a group, which is copied to where it is when all of the group is there.

        The caller holds the lock.

        Args:
            use: the use, which gets its slot.
            group: the group.
            choose: gives the slices, for the group's parts in the slot.

        Raises:
            OffloadError: as `enter`.
            torch.OutOfMemoryError: the device has no room.
        """
        self._require_offloaded(group, group.name)
        slot = self._room()
        slices = choose(slot.views(group.store))
        self.copier.copy_some(group.store, slices, slot)
        slot.used = self._clock = self._clock + 1
        self._nbytes += sum(each.target.numel() for each in slices)
        self.join(use, slot)
        return slot

    def begin_replay(self, copies: CapturedCopies) -> bool:
        """Have a replay of captured copies find what it begins with. The caller holds the lock.

        Returns:
            False if a call uses one of its slots, so that it cannot be replayed.

        Raises:
            torch.OutOfMemoryError: the device has no room.
        """
        if not copies.are_slots_free():
            return False
        for slot, group in copies.first():
            if slot.store is not group.store or self.copier.has_failed(slot):
                self._fetch(group, slot)
            self.copier.await_copy(slot)
            self.copier.await_users(slot)
        return True

    def end_replay(self, copies: CapturedCopies) -> None:
        """Note what a replay has launched. The caller holds the lock."""
        for slot, _ in copies.first():
            self.copier.note_replay(slot)
        copied = copies.copied()
        self._fetches += len(copied)
        self._nbytes += sum(copied)

    def _require_offloaded(self, group: Group, name: str) -> None:
        if group not in self._groups:
            raise OffloadError(f"remove() moved the weights of {name!r} to the device meanwhile: run the model again")

    def join(self, use: Use, slot: Slot) -> None:
        """Begin one more use of a slot that is in use. The caller holds the lock."""
        use.slot = slot
        slot.users.add(use)
        self.copier.await_copy(slot)

    def leave(self, group: Group, leaf: Leaf) -> None:
        """End a leaf's call: if its group is probably not needed any more, the next one is prefetched.

        The caller holds the lock.

        Raises:
            torch.OutOfMemoryError: the device has no room.
        """
        if self.captured is not None:
            self.captured.leave()
            return
        step = self.order.current(group, leaf, is_backward=_is_backward())
        if step is not None and self.order.is_over(step, leaf):
            self._prefetch(step, [])

    def _prefetch(self, step: Step, wanted: list[Group]) -> None:
        """Copy the groups that will probably follow into unused slots. Those of `wanted` and the next ones are kept."""
        for group in self.order.after(step):
            if len(wanted) >= len(self.slots):
                break
            if group not in wanted and not self.caches.suffice_for(group):
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
        free = [slot for slot in self.slots if not slot.users and slot.store not in kept and not self._is_small(slot)]
        return min(free, key=lambda slot: (slot.store is not None, slot.used), default=None)

    def _room(self) -> Slot:
        """Return a slot that may be overwritten; a new one if there are too few, or all are in use."""
        free = self._free_slot(keep=())
        if free is not None and len(self.slots) < self._max_slots:
            with suppress(torch.OutOfMemoryError):
                return self._grow()
        return free or self._grow()  # waiting for one could mean waiting forever

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

    def _is_small(self, slot: Slot) -> bool:
        return slot.memory.numel() < self._slot_nbytes

    def trim(self) -> None:
        """Free unused slots beyond the number that was asked for, or too small. The caller holds the lock."""
        if self._has_small:
            for small in [slot for slot in self.slots if self._is_small(slot) and not slot.users]:
                self.free(small)
            self._has_small = any(self._is_small(slot) for slot in self.slots)
        while len(self.slots) > self._max_slots:
            slot = self._free_slot(keep=())
            if slot is None:
                return
            self.free(slot)

    def free(self, slot: Slot) -> None:
        """Free a slot that is not in use. The caller holds the lock."""
        self.copier.discard(slot)
        self.slots.remove(slot)
        self._on_free(slot)

    def forget(self, group: Group) -> None:
        """Have a group copied again when it is next used: its weights at rest may have changed."""
        with self.lock:
            self.caches.forget(group)
            for slot in self.slots:
                if slot.store is group.store:
                    slot.store = None  # running calls go on with the old values

    def exchange_store(self, group: Group, store: Store) -> None:
        """Stream a group from another store. The caller holds the lock; running calls go on with the old values."""
        self.forget(group)
        self.caches.drop(group)  # laid out for the old weights; from now on the group is copied whole
        for slot in self.slots:
            slot.forget_views(group.store)
            self._on_free(slot)  # what is kept for it views the old layout
        group.store = store
        self._slot_nbytes, self._has_small = max(self._slot_nbytes, store.layout.nbytes), True
        self.trim()

    def free_all(self) -> None:
        """Free all slots, and the memory of the caches. The caller holds the lock.

        Raises:
            OffloadError: one is in use.
        """
        if any(slot.users for slot in self.slots):
            raise OffloadError("offloaded weights are in use: call remove() outside of forward and of materialize()")
        self.copier.finish()
        self.caches.free()
        while self.slots:
            self.free(self.slots[0])

    def drop(self, group: Group) -> None:
        """Stop streaming a group. The caller holds the lock."""
        self._groups.discard(group)
        self.caches.drop(group)
        self._max_slots = min(self._max_slots, len(self._groups))

    def stats(self) -> StreamStats:
        """Return what has been streamed so far."""
        rate = self.copier.timed_bytes / self.copier.timed_s / 1e9 if self.copier.timed_s else 0.0
        hits, misses, nbytes = self.caches.count()
        fetched = self._nbytes + nbytes, self._fetches, self._demand_fetches
        return StreamStats(*fetched, len(self.slots), rate, hits, misses)
