"""Which group of weights is wanted after which: guessed from their order, and learned as the model runs."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .leaves import Group, Leaf

# After so many nobody guesses any more when a step is over: the first may be of what was guessed, not learned.
_MAX_MISPREDICTIONS = 2


class Step(NamedTuple):
    """A group in forward, or in backward, where the order is another."""

    is_backward: bool
    group: Group


class _Position:
    """Where a thread is."""

    step: Step | None = None
    leaf: Leaf | None = None


class _Positions(threading.local):
    """A position for each thread."""

    def __init__(self) -> None:
        self.own = _Position()


class PrefetchOrder:
    """What comes after what. Each thread has a position of its own; what they learn is for all.

    Backward goes on where the last forward was, whatever thread it runs in: for a GPU autograd has one of its own.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        """Guess that forward goes through the groups in their order, again and again, and backward the other way."""
        ahead = zip(groups, [*groups[1:], *groups[:1]], strict=True)
        self._next = {Step(False, group): Step(False, after) for group, after in ahead}
        self._next |= {Step(True, group): Step(True, before) for group, before in itertools.pairwise(groups[::-1])}
        if groups:
            self._next[Step(True, groups[0])] = Step(False, groups[0])
        # The leaf after which a step is over, as a rule, and how often there was more after it.
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
        """Note that a thread is at a leaf of a group.

        Returns:
            The step that this is; None where the thread was in it already.
        """
        position = self._position(is_backward=is_backward)
        before, last = position.step, position.leaf
        position.leaf = leaf
        if before is not None and before[1] is group and before[0] == is_backward:
            return None
        step = position.step = Step(is_backward, group)
        if before is not None and last is not None:
            self._next[before], self._last[before] = step, last
        return step

    def current(self, group: Group, leaf: Leaf, *, is_backward: bool) -> Step | None:
        """Return the step that a thread is in; None if it has left for another group or leaf since."""
        position = self._position(is_backward=is_backward)
        return (
            position.step
            if position.leaf is leaf and position.step is not None and position.step.group is group
            else None
        )

    def is_over(self, step: Step, leaf: Leaf) -> bool:
        """Whether a step's group is likely not wanted any more after a leaf."""
        return self._last.get(step) is leaf and self._mispredictions[step] < _MAX_MISPREDICTIONS

    def record_misprediction(self, step: Step) -> None:
        """Learn that a step that seemed to be over was not."""
        self._mispredictions[step] += 1

    def after(self, step: Step) -> Iterator[Group]:
        """Go through the groups that are likely to follow a step, which may be some of them again."""
        for _ in range(len(self._next)):
            step = self._next[step]
            yield step.group
