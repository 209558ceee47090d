"""Which group of weights is wanted after which: guessed from their order, and learned as the model runs."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .groups import Group


class Step(NamedTuple):
    """A group in forward, or in backward, where the order is another."""

    is_backward: bool
    group: Group


class Succession:
    """What comes after what. Each thread has a last step of its own; what they learn is for all."""

    def __init__(self, groups: Sequence[Group]) -> None:
        """Guess that forward goes through the groups in their order, again and again, and backward the other way."""
        ahead = zip(groups, [*groups[1:], *groups[:1]], strict=True)
        self._next = {Step(False, group): Step(False, after) for group, after in ahead}
        self._next |= {Step(True, group): Step(True, before) for group, before in itertools.pairwise(groups[::-1])}
        if groups:
            self._next[Step(True, groups[0])] = Step(False, groups[0])
        self._last = threading.local()

    def arrive(self, group: Group, *, is_backward: bool) -> Step | None:
        """Note that a thread is at a group.

        Returns:
            The step that this is; None where it was there already.
        """
        last: Step | None = getattr(self._last, "step", None)
        if last is not None and last[1] is group and last[0] == is_backward:
            return None
        step = self._last.step = Step(is_backward, group)
        if last is not None:
            self._next[last] = step
        return step

    def current(self) -> Step:
        """Give the step that a thread has arrived at."""
        step: Step = self._last.step
        return step

    def after(self, step: Step) -> Iterator[Group]:
        """Go through the groups that are likely to follow a step, which may be some of them again."""
        for _ in range(len(self._next)):
            step = self._next[step]
            yield step.group
