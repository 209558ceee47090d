"""Which group of weights follows which: guessed from their order, then learned as the model runs."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..leaves import Group, Leaf

# After this many mispredictions the end of a step is no longer predicted; the first may come from the initial guess.
_MAX_MISPREDICTIONS = 2


class Step(NamedTuple):
    """A group in forward or in backward, which have orders of their own."""

    is_backward: bool
    group: Group


class _Position:
    step: Step | None = None
    leaf: Leaf | None = None


class _Positions(threading.local):
    def __init__(self) -> None:
        self.own = _Position()


class PrefetchOrder:
    """Predicts which group follows. Each thread has its own position; all share what is learned.

    Backward continues from the last forward's position, whichever thread it runs in: for GPUs, autograd has threads of
    its own.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        """Guess that forward runs through the groups in their order, again and again, and backward in reverse."""
        ahead = zip(groups, [*groups[1:], *groups[:1]], strict=True)
        self._next = {Step(False, group): Step(False, after) for group, after in ahead}
        self._next |= {Step(True, group): Step(True, before) for group, before in itertools.pairwise(groups[::-1])}
        if groups:
            self._next[Step(True, groups[0])] = Step(False, groups[0])
        # The leaf that usually ends a step, and how often the step went on after it.
        self._last = {Step(False, group): group.leaves[-1] for group in groups if group.leaves}
        self._mispredictions: Counter[Step] = Counter()
        self._positions = _Positions()
        self._latest = self._positions.own

    def _position(self, *, is_backward: bool) -> _Position:
        if is_backward:
            return self._latest
        position = self._latest = self._positions.own
        return position

    def arrive(self, group: Group, leaf: Leaf, *, is_backward: bool) -> Step | None:
        """Record that this thread has reached a leaf of a group.

        Returns:
            The step that begins here; None if the thread was in it already.
        """
        position = self._position(is_backward=is_backward)
        before, last = position.step, position.leaf
        position.leaf = leaf
        if before is not None and before.group is group and before.is_backward == is_backward:
            return None
        step = position.step = Step(is_backward, group)
        if before is not None and last is not None:
            self._next[before], self._last[before] = step, last
        return step

    def current(self, group: Group, leaf: Leaf, *, is_backward: bool) -> Step | None:
        """Return the step that this thread is in; None if it has gone on to another leaf or group."""
        position = self._position(is_backward=is_backward)
        step = position.step
        return step if position.leaf is leaf and step is not None and step.group is group else None

    def is_over(self, step: Step, leaf: Leaf) -> bool:
        """Whether a step's group is probably not needed any more after a leaf."""
        return self._last.get(step) is leaf and self._mispredictions[step] < _MAX_MISPREDICTIONS

    def record_misprediction(self, step: Step) -> None:
        """Learn that a step went on after `is_over` was true."""
        self._mispredictions[step] += 1

    def after(self, step: Step) -> Iterator[Group]:
        """Iterate over the groups that will probably follow a step; a group may come more than once."""
        for _ in range(len(self._next)):
            step = self._next[step]
            yield step.group
