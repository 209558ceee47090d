"""Keeps a leaf's weights on the device for as long as a call needs them.

Ctrl-C may interrupt Python between any two steps, but not between the end of a `try` block and a C function that its
`finally` calls first. So a use of a slot ends with such a call, of `set.discard`. Whatever else an interrupted call
leaves undone, the next one finds and does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from .leaves import Group, Leaf, StreamedTensor, without_torch_function
from .on_device.expert_cache import ExpertCache
from .on_device.slot_pool import SlotPool
from .on_device.slots import Slice, Slot, Use

_T = TypeVar("_T")


class Residency:
    """Keeps one leaf's weights on the device while they are used.

    Attributes:
        group: the leaf's group.
        leaf: the leaf.
        device: that computes it.
        parameters: the parameters of it that are streamed.
        pool: the slots on the device.
    """

    def __init__(
        self,
        pool: SlotPool,
        group: Group,
        leaf: Leaf,
        streamed: Sequence[StreamedTensor],
        adopt: Callable[[Group], object],
    ) -> None:
        """Keep `adopt`, which takes over what others have written to a group's weights, or put in their place."""
        self.pool, self.group, self.leaf, self._adopt = pool, group, leaf, adopt
        self.device = pool.copier.device
        self.follow(streamed)

    def follow(self, streamed: Sequence[StreamedTensor]) -> None:
        """Stream these tensors of the leaf from now on."""
        self._streamed = streamed
        self._owned = [each for each in streamed if each.parameter is not None]
        self.parameters = [each.parameter for each in self._owned if each.parameter is not None]

    def run_in_slot(self, compute: Callable[[Slot], _T]) -> _T:
        """Call `compute` with the slot that holds the group; the leaf's own tensors stay at rest.

        Raises:
            OffloadError: a weight has been replaced by one that cannot be streamed, or cannot be read.
            torch.OutOfMemoryError: the device has no room.
        """
        out = self._while_used(self._acquire, compute)
        self._leave()
        return out

    def run_with_some(
        self, choose: Callable[[dict[str, torch.Tensor]], Sequence[Slice]], compute: Callable[[Slot], _T]
    ) -> _T:
        """Call `compute` like `run_in_slot`, with a slot that holds only a part of the group.

        Args:
            choose: gives the slices to copy, for the group's parts in the slot.
            compute: what to call.
        """

        def acquire(use: Use) -> Slot:
            with self.pool.lock, without_torch_function():
                return self.pool.enter_some(use, self.group, choose)

        return self._while_used(acquire, compute)

    def run(self, compute: Callable[[Slot], _T], *, is_only_read: bool = False) -> _T:
        """Call `compute` like `run_in_slot`, with the slot's tensors in the place of the leaf's own.

        Args:
            compute: what to call.
            is_only_read: it does not write to the weights, so that nobody need count what is written.
        """
        try:
            out = self._while_used(self._swap_in_to_read if is_only_read else self._swap_in, compute)
        finally:
            self.swap_out()
        self._leave()
        return out

    def _while_used(self, acquire: Callable[[Use], Slot], compute: Callable[[Slot], _T]) -> _T:
        use = Use()
        try:
            return compute(acquire(use))
        finally:
            if use.slot is not None:
                use.slot.users.discard(use)

    @contextmanager
    def swapped_in(self) -> Iterator[Slot]:
        """Do for a `with` block what `run` does for a call. After Ctrl-C the use lasts as long as its traceback."""
        use = Use()
        try:
            yield self._swap_in(use)
        finally:
            if use.slot is not None:
                use.slot.users.discard(use)
            self.swap_out()
        self._leave()

    def cache(self) -> ExpertCache | None:
        """Return the memory of the experts that stay on the device, if the leaf has one.

        Raises:
            OffloadError: as `run_in_slot`.
        """
        cache = self.pool.caches.of(self.leaf)
        if cache is not None:
            with self.pool.lock, without_torch_function():
                self.adopt_changes()
        return self.pool.caches.of(self.leaf)  # what was adopted may be of another shape

    def note_pairs(self, pairs: int) -> None:
        """Take note of how many pairs of token and expert a call computes: of which groups it will want all experts."""
        self.pool.caches.pairs = pairs

    def adopt_changes(self) -> None:
        """Take over what others have written to the weights at rest, or put in their place.

        The caller holds the pool's lock, `without_torch_function`.
        """
        at_rest = self.group.store.tensors
        for each in self._owned:
            if at_rest and each.is_changed(at_rest[each.name]):  # there are none any more after remove()
                self._adopt(self.group)
                return

    def _acquire(self, use: Use) -> Slot:
        with self.pool.lock, without_torch_function():
            self.adopt_changes()
            return self.pool.enter(use, self.group, self.leaf)

    def _leave(self) -> None:
        with self.pool.lock:
            self.pool.leave(self.group, self.leaf)

    def _swap_in_to_read(self, use: Use) -> Slot:
        return self._swap_in(use, is_only_read=True)

    def _swap_in(self, use: Use, *, is_only_read: bool = False) -> Slot:
        with self.pool.lock, without_torch_function():
            # If another call uses the leaf's tensors, join it: the group may have been copied to a newer slot since.
            slot = self._streamed[0].slot() if self._streamed else None
            if slot is None:
                slot = self._acquire(use)
            else:
                self.pool.join(use, slot)
            views = slot.views(self.group.store)
            for each in self._streamed:
                each.swap_in(use, views[each.name], is_only_read=is_only_read)
        return slot

    def swap_out(self) -> None:
        """Put the leaf's tensors at rest back in place, as far as no call uses those in a slot."""
        with self.pool.lock, without_torch_function():
            for each in self._streamed:
                each.swap_out(self.group.store.tensors)

    def is_used(self) -> bool:
        """Whether a call uses the leaf's tensors in a slot."""
        with self.pool.lock:
            return any(each.is_used() for each in self._streamed)
