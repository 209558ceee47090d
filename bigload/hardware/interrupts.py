"""Ctrl-C between the steps of a call, instead of anywhere in it.

Python raises KeyboardInterrupt between any two instructions: also after a file was opened and before anything knows of
it, or in the middle of undoing what was interrupted. So a call here only remembers the first Ctrl-C, and raises it at
the next of many points where it can be undone. A second one is raised at once, as usual, should the first hang.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ContextDecorator, contextmanager
from types import FrameType
from typing import Any


class deferred_interrupts(ContextDecorator):  # noqa: N801 - a function, to those who use it
    """In the `with` block, or the function, raise Ctrl-C where `check_interrupt` is called, and else at the end.

    It does nothing outside the main thread, which alone is told of signals, where Ctrl-C is ignored or handled by no
    function of Python's, and within another such block.
    """

    def _recreate_cm(self) -> deferred_interrupts:
        return deferred_interrupts()

    def __enter__(self) -> None:
        global _active
        self.was_asked = False
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
        if self.was_asked:
            self._previous(number, frame)
        self.was_asked = True

    def check(self) -> None:
        """Do what Ctrl-C does, if it was pressed."""
        if self.was_asked:
            self.was_asked = False
            self._previous(signal.SIGINT, None)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Raise Ctrl-C anywhere in the `with` block."""
        self.check()
        try:
            signal.signal(signal.SIGINT, self._previous)
            yield
        finally:
            signal.signal(signal.SIGINT, self._remember)


_active: deferred_interrupts | None = None


def check_interrupt() -> None:
    """Raise KeyboardInterrupt, or do what else the program does at Ctrl-C, if it was pressed since the last time."""
    if _active is not None and _active.was_asked and _is_main_thread():
        _active.check()


@contextmanager
def immediate_interrupts() -> Iterator[None]:
    """Raise Ctrl-C anywhere in the `with` block: around what takes long, and leaves nothing behind.

    Downloads, imports and functions of the user's are such.
    """
    if _active is None or not _is_main_thread():
        yield
        return
    with _active.suspended():
        yield


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
