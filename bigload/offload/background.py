"""A thread that brings weights into slots in the background: from files, or from memory that is not pinned."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue

import torch

from ..errors import OffloadError


class BackgroundRead:
    """What the thread has been asked to bring, and whether it is there.

    A lock and two attributes, where a Future has a condition in Python: Ctrl-C within that leaves it locked for ever.
    """

    def __init__(self, read: Callable[[], None], memory: torch.Tensor | None = None) -> None:
        """Describe it.

        Args:
            read: brings it.
            memory: that is written, by copies that may go on for a while after.
        """
        self.read: Callable[[], None] | None = read
        self.memory = memory
        self.error: BaseException | None = None
        self._process = os.getpid()
        self._is_done = False
        self._running = threading.Lock()
        self._running.acquire()

    def run(self) -> None:
        """Bring it, in the thread; nothing but the outcome is held after."""
        read, self.read, self.memory = self.read, None, None
        try:
            if read is not None:
                read()
        except BaseException as error:  # for whoever waits
            self.error = error
        self._is_done = True
        self._running.release()

    def wait(self) -> None:
        """Wait until it is there, or has failed; for one thread at a time."""
        if not self._is_done and self._process != os.getpid():
            self.error, self._is_done = (
                OffloadError("it was being read in the process that this one was forked from"),
                True,
            )
        if not self._is_done:
            self._running.acquire()
            self._running.release()


@dataclass(frozen=True)
class BackgroundReader:
    """The thread, by what it is queue, in order; None ends it.

    No pool of Python's: those take a lock of the whole process, which the collector of cycles, when it lets go of an
    engine, may find taken by the very thread that it interrupts.
    """

    queue: SimpleQueue[BackgroundRead | None]
    _process: int = field(default_factory=os.getpid)

    @property
    def is_alive(self) -> bool:
        """Whether the thread is of this process, and not of one that it was forked from."""
        return self._process == os.getpid()

    @classmethod
    def start(cls, at_end: Callable[[], object]) -> BackgroundReader:
        """Start the thread, which calls `at_end` at its end."""
        started = cls(SimpleQueue())
        threading.Thread(target=_run_all, args=(started.queue, at_end), name="bigload-reader", daemon=True).start()
        return started

    def finish(self) -> None:
        """Wait until all is there that was asked for, and no memory of it is held."""
        self.queue.put(BackgroundRead(_nothing))
        last = BackgroundRead(_nothing)
        self.queue.put(last)
        last.wait()


def _nothing() -> None:
    pass


def _run_all(queue: SimpleQueue[BackgroundRead | None], at_end: Callable[[], object]) -> None:
    # The memory of the last two is held, whose copies may go on; staging has two buffers, so no more do.
    held: deque[torch.Tensor | None] = deque(maxlen=2)
    while _run_next(queue, held):
        pass
    at_end()


def _run_next(queue: SimpleQueue[BackgroundRead | None], held: deque[torch.Tensor | None]) -> bool:
    """Run one; of it nothing but its memory is held while the next is waited for, least of all the engine."""
    pending = queue.get()
    if pending is None:
        return False
    held.append(pending.memory)
    pending.run()
    return True
