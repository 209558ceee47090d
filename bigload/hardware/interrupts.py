"""Ctrl-C between the steps of a call, instead of anywhere in it.

Python raises KeyboardInterrupt between any two instructions: also after a file was opened and before anything knows of
it, in the middle of an import, or of undoing what was interrupted. So a call here only remembers Ctrl-C, and raises it
at the next of many points where all can be undone. Another one is raised at once if the first has waited for long.
"""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ContextDecorator
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

# A wait looks as often whether Ctrl-C was pressed, in seconds.
WAIT_S = 0.1
# What bigload does between two points takes less, unless something hangs: a file system, a library, the network.
PATIENCE_S = 2.0
# Of `interruptible`: a look takes as long as a step of the shortest loops.
_STEPS = 16


class deferred_interrupts(ContextDecorator):  # noqa: N801 - a function, to those who use it
    """In the `with` block, or the function, raise Ctrl-C where `check_interrupt` is called, and else at the end.

    It does nothing outside the main thread, which alone is told of signals, where Ctrl-C is ignored or handled by no
    function of Python's, and within another such block.
    """

    def _recreate_cm(self) -> deferred_interrupts:
        return deferred_interrupts()

    def __enter__(self) -> None:
        global _active
        self.asked: float | None = None  # since when one waits to be raised
        self.is_immediate = False
        self._previous: Any = signal.getsignal(signal.SIGINT)
        if _is_main_thread() and callable(self._previous) and _active is None:
            signal.signal(signal.SIGINT, self._remember)
            _active = self

    def __exit__(self, *raised: object) -> None:
        global _active
        if _active is self:
            _active = None
            signal.signal(signal.SIGINT, self._previous)
            self.check()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        has_waited = self.asked is not None and now - self.asked > PATIENCE_S
        self.asked = self.asked or now
        if self.is_immediate or has_waited:
            self.check()

    def check(self) -> None:
        """Do what Ctrl-C does, if it was pressed. What then follows is undone without another."""
        if self.asked is not None:
            self.asked, was_immediate, self.is_immediate = None, self.is_immediate, False
            self._previous(signal.SIGINT, None)
            self.is_immediate = was_immediate  # the program's own function has not raised: all goes on


_active: deferred_interrupts | None = None


def check_interrupt() -> None:
    """Raise KeyboardInterrupt, or do what else the program does at Ctrl-C, if it was pressed since the last time."""
    if _active is not None and _active.asked is not None and _is_main_thread():
        _active.check()


def interruptible(steps: Iterable[T]) -> Iterator[T]:
    """Give many short steps, as those of a loop over tensors, with a point before the first of every few."""
    left = iter(steps)
    while some := list(itertools.islice(left, _STEPS)):
        check_interrupt()
        yield from some


class immediate_interrupts:  # noqa: N801 - as above
    """Raise Ctrl-C anywhere in the `with` block: around downloads and functions of the user's, which may take long.

    Not around imports: a library whose import was interrupted often cannot be imported again. A class, since Ctrl-C
    can keep a generator from its end until nobody holds the traceback any more.
    """

    def __enter__(self) -> None:
        self._active = _active if _is_main_thread() else None
        if self._active is not None:
            self._active.check()
            self._was_immediate, self._active.is_immediate = self._active.is_immediate, True

    def __exit__(self, *raised: object) -> None:
        if self._active is not None:
            self._active.is_immediate = self._was_immediate


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
