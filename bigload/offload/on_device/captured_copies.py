"""The copies of one step in a graph that others capture: which group is in which slot is fixed.

A replay begins with the first groups in the slots, and ends with them there. When a group has been computed, the next
one of its slot is copied, on a branch of the graph of its own, while others are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

from ...errors import OffloadError
from ...hardware.pinned import HostGroup, Store
from ..leaves import Group
from .slots import CudaSlotCopier, Slot, SlotCopier, Use


class CapturedCopies:
    """Takes the place of a pool's own copies while a step is captured.

    Attributes:
        order: the groups that a step uses, in their order.
        slots: that they are copied into: a group into the one of its place in the order, from the beginning again.
    """

    def __init__(self, copier: SlotCopier, visits: Sequence[Group], slots: Sequence[Slot]) -> None:
        """Plan the copies.

        Args:
            copier: of the pool.
            visits: the group of each leaf that a step has run.
            slots: of the pool.

        Raises:
            OffloadError: a step uses a group, goes on to others and comes back to it.
        """
        runs = [(group, len([*leaves])) for group, leaves in groupby(visits)]
        self.order, self._leaves = [group for group, _ in runs], [count for _, count in runs]
        if len(set(self.order)) < len(self.order):
            raise OffloadError("a step comes back to an offloaded block that it has left, which no graph does here")
        self.slots = list(slots)[: len(self.order)]
        self._stores: list[Store] = [group.store for group in self.order]
        self._device = copier.device
        self._stream = torch.cuda.Stream(copier.device) if isinstance(copier, CudaSlotCopier) else None  # type: ignore[no-untyped-call]
        self._place, self._left, self._is_passed_on = -1, 0, True
        self._ready: dict[int, torch.cuda.Event | None] = {}

    def begin(self) -> None:
        """Begin to capture a step."""
        self._place, self._left, self._is_passed_on = -1, 0, True
        self._ready.clear()

    def enter(self, use: Use, group: Group) -> Slot:
        """Begin a use of a group, which the current stream waits for.

        Raises:
            OffloadError: the step goes another way than before.
        """
        if self._place < 0 or self.order[self._place] is not group:
            self._pass_on()
            self._place, self._left, self._is_passed_on = self._place + 1, 0, False
            if self._place >= len(self.order) or self.order[self._place] is not group:
                raise OffloadError("offloaded blocks ran in another order than in the step before")
            ready = self._ready.pop(self._place, None)
            if ready is not None:
                torch.cuda.current_stream(self._device).wait_event(ready)
        elif self._is_passed_on:
            raise OffloadError("an offloaded block ran more layers than in the step before")
        slot = self.slots[self._place % len(self.slots)]
        use.slot = slot
        slot.users.add(use)
        return slot

    def leave(self) -> None:
        """End the call of a leaf: after the last one of its group, the slot gets its next group."""
        self._left += 1
        if self._left == self._leaves[self._place]:
            self._pass_on()

    def _pass_on(self) -> None:
        if self._is_passed_on:
            return
        self._is_passed_on = True
        place, count = self._place, len(self.slots)
        following = place + count if place + count < len(self.order) else place % count
        if following == place:
            return  # it stays
        slot, store = self.slots[place % count], self._stores[following]
        assert isinstance(store, HostGroup)  # which is asked before
        if self._stream is None:
            slot.memory[: len(store.source)].copy_(store.source)
            return
        current, free, ready = torch.cuda.current_stream(self._device), torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]
        free.record(current)
        self._stream.wait_event(free)
        with torch.cuda.stream(self._stream):
            slot.memory[: len(store.source)].copy_(store.source, non_blocking=True)
            ready.record(self._stream)
        self._ready[following + (len(self.order) if following < place else 0)] = ready

    def finish(self) -> None:
        """End the step: all copies come back to the current stream.

        Raises:
            OffloadError: a group was left out.
        """
        self._pass_on()
        if self._place + 1 != len(self.order):
            raise OffloadError("offloaded blocks were left out that ran in the step before")
        for ready in self._ready.values():
            if ready is not None:
                torch.cuda.current_stream(self._device).wait_event(ready)
        self._ready.clear()

    def are_slots_free(self) -> bool:
        """Whether no call uses a slot. The caller holds the lock of the pool."""
        return not any(slot.users for slot in self.slots)

    def is_same(self, slots: Sequence[Slot]) -> bool:
        """Whether the groups and the slots are where they were."""
        stores = (group.store is store for group, store in zip(self.order, self._stores, strict=True))
        return all(stores) and all(slot in slots for slot in self.slots)

    def copied(self) -> list[int]:
        """List the bytes of the groups that a replay copies: those of slots that hold several."""
        count = len(self.slots)
        shared = [place for place in range(len(self.order)) if place + count < len(self.order) or place >= count]
        return [self._stores[place].layout.nbytes for place in shared]

    def first(self) -> list[tuple[Slot, Group]]:
        """List what a replay begins with."""
        return [*zip(self.slots, self.order, strict=False)]
