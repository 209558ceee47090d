"""A leaf's weights on the device, for as long as a call of it needs them.

Ctrl-C may come between any two steps of Python, though not before a call of what is written in C that follows at once.
So a use ends by one such call, and whatever else is left undone then is found and done by the next use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from .leaves import Group, Leaf, StreamedTensor
from .slot_pool import SlotPool
from .slots import Slot, Use

_T = TypeVar("_T")

# Without bitsandbytes' say in what is done to its parameters, in which it has none and which takes Python's time.
without_torch_function = torch._C.DisableTorchFunctionSubclass


class Residency:
    """Has one leaf's weights on the device.

    Attributes:
        group: which the leaf is of.
        leaf: itself.
        parameters: of it, that are streamed.
    """

    def __init__(self, pool: SlotPool, group: Group, leaf: Leaf, streamed: Sequence[StreamedTensor]) -> None:
        """Describe the leaf.

        Args:
            pool: of the slots that it is brought into.
            group: which it is of.
            leaf: itself.
            streamed: what is streamed of it.
        """
        self._pool, self.group, self.leaf, self._streamed = pool, group, leaf, streamed
        self._owned = [each for each in streamed if each.parameter is not None]
        self.parameters = [each.parameter for each in self._owned if each.parameter is not None]

    def run_in_slot(self, compute: Callable[[Slot], _T]) -> _T:
        """Call `compute` with the slot that the group is in; the leaf's own tensors stay at rest.

        Raises:
            OffloadError: a weight was replaced or moved since, or cannot be read.
            torch.OutOfMemoryError: the device has no room.
        """
        out = self._while_used(self._acquire, compute)
        self._leave()
        return out

    def run(self, compute: Callable[[Slot], _T]) -> _T:
        """Call `compute` as `run_in_slot` does, while the leaf's tensors are those in the slot."""
        try:
            out = self._while_used(self._swap_in, compute)
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
        """Do as `run` does while a block runs. After Ctrl-C the use may last as long as the traceback is kept."""
        use = Use()
        try:
            yield self._swap_in(use)
        finally:
            if use.slot is not None:
                use.slot.users.discard(use)
            self.swap_out()
        self._leave()

    def _acquire(self, use: Use) -> Slot:
        with self._pool.lock, without_torch_function():
            return self._pool.enter(use, self.group, self.leaf, self._owned)

    def _leave(self) -> None:
        with self._pool.lock:
            self._pool.leave(self.group, self.leaf)

    def _swap_in(self, use: Use) -> Slot:
        with self._pool.lock, without_torch_function():
            # Where another call has them; which need not be where new calls of the group find theirs.
            slot = self._streamed[0].slot() if self._streamed else None
            if slot is None:
                slot = self._acquire(use)
            else:
                self._pool.join(use, slot)
            views = slot.views(self.group.store)
            for each in self._streamed:
                each.swap_in(use, views[each.name])
        return slot

    def swap_out(self) -> None:
        """Put to rest what no call uses any more."""
        with self._pool.lock, without_torch_function():
            for each in self._streamed:
                each.swap_out(self.group.store.tensors)

    def is_used(self) -> bool:
        """Whether a call has the leaf's tensors on the device."""
        with self._pool.lock:
            return any(each.is_used() for each in self._streamed)
