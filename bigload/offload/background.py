"""A thread that reads weights into slots in the background, from files or from memory that is not pinned."""

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
    """One read that the thread was asked for.

    This is a lock and two attributes instead of a Future, whose condition variable is written in Python and stays
    locked forever if Ctrl-C interrupts it.

    Attributes:
        error: what the read has raised, once it is done.
    """

    def __init__(self, read: Callable[[], None], memory: torch.Tensor | None = None) -> None:
        """Describe the read.

        Args:
            read: does it.
            memory: what is written to; kept alive for a while, since copies into it may still be running afterwards.
        """
        self.read: Callable[[], None] | None = read
        self.memory = memory
        self.error: BaseException | None = None
        self._process = os.getpid()
        self._is_done = False
        self._running = threading.Lock()
        self._running.acquire()

    def run(self) -> None:
        """Do the read, in the thread, and then hold nothing but its outcome."""
        read, self.read, self.memory = self.read, None, None
        try:
            if read is not None:
                read()
        except BaseException as error:  # for whoever waits
            self.error = error
        self._is_done = True
        self._running.release()

    def wait(self) -> None:
        """Wait until the read has succeeded or failed; only one thread may wait at a time."""
        if not self._is_done and self._process != os.getpid():
            self.error = OffloadError("it was being read in the process that this one was forked from")
            self._is_done = True
        if not self._is_done:
            self._running.acquire()
            self._running.release()


@dataclass(frozen=True)
class BackgroundReader:
    """The thread and its queue of reads, which it does in order; None ends the thread.

    It is no ThreadPoolExecutor: that takes a lock of the whole process, and the garbage collector, when it frees an
    engine, may run in the very thread that holds the lock.
    """

    queue: SimpleQueue[BackgroundRead | None]
    _process: int = field(default_factory=os.getpid)

    @property
    def is_alive(self) -> bool:
        """Whether the thread belongs to this process, and not to the one that it was forked from."""
        return self._process == os.getpid()

    @classmethod
    def start(cls, at_end: Callable[[], object]) -> BackgroundReader:
        """Start the thread, which calls `at_end` before it ends."""
        started = cls(SimpleQueue())
        threading.Thread(target=_run_all, args=(started.queue, at_end), name="bigload-reader", daemon=True).start()
        return started

    def finish(self) -> None:
        """Wait until all reads that were asked for are done, and the thread holds none of their memory."""
        self.queue.put(BackgroundRead(_nothing))
        last = BackgroundRead(_nothing)
        self.queue.put(last)
        last.wait()


def _nothing() -> None:
    pass


def _run_all(queue: SimpleQueue[BackgroundRead | None], at_end: Callable[[], object]) -> None:
    # Copies of the last two reads may still be running: staging has two buffers.
    held: deque[torch.Tensor | None] = deque(maxlen=2)
    while _run_next(queue, held):
        pass
    at_end()


def _run_next(queue: SimpleQueue[BackgroundRead | None], held: deque[torch.Tensor | None]) -> bool:
    # A function of its own: while the thread waits for the next read it must hold nothing of the last one but its
    # memory, least of all the engine.
    pending = queue.get()
    if pending is None:
        return False
    held.append(pending.memory)
    pending.run()
    return True
