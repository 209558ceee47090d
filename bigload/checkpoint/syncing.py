"""Files made lasting while others are still being written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager

# Steps that may wait for the disk at once; each holds a file open.
_MOST_WAITING = 4


class Syncing(AbstractContextManager["Syncing"]):
    """Takes steps that wait for the disk, in their order, in a thread of its own; none outlives the `with` block.

    An error of a step is raised by the next call.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._going: deque[Future[object]] = deque()

    @property
    def is_idle(self) -> bool:
        """Ask whether nothing waits for the disk."""
        return all(step.done() for step in self._going)

    def begin(self, step: Callable[[], object]) -> None:
        """Begin a step, or wait until fewer are going on."""
        self._keep(_MOST_WAITING - 1)
        self._going.append(self._pool.submit(step))

    def finish(self) -> None:
        """Wait for all steps that were begun."""
        self._keep(0)

    def _keep(self, most: int) -> None:
        while self._going and (len(self._going) > most or self._going[0].done()):
            self._going.popleft().result()

    def __exit__(self, *raised: object) -> None:
        self._pool.shutdown()  # what is whole is worth the wait
