"""Reads that go on while Python does something else, several at once: POSIX's asynchronous input, by the C library.

A thread of Python's must take the interpreter's lock again after every read, and be woken up for it; a dozen of them
that read 4 MiB each spend longer on that than on reading. The C library's own threads know no such lock. Where it
offers none, threads of Python's do.

glibc gives each descriptor to one thread, which does what is asked of it in order: so a file is opened as often as
there are reads to go on at once, and none of the threads sleeps while more is asked for.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Bytes that one thread reads at once: to wake it up takes as long as to read a few hundred KiB. And bytes below which
# the asking costs more than the reading.
BLOCK_BYTES = 4 * 2**20
SMALL_BYTES = 2**16

_LIO_NOWAIT, _LIO_READ, _SIGEV_NONE = 1, 0, 1
_MAX_THREADS = 64


class _Event(ctypes.Structure):
    """glibc's `struct sigevent`: here that nobody is to be told."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("rest", ctypes.c_char * 48),
    )


class _Request(ctypes.Structure):
    """glibc's `struct aiocb` on 64-bit systems, from its aio.h."""

    _fields_ = (
        ("descriptor", ctypes.c_int),
        ("opcode", ctypes.c_int),
        ("priority", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("nbytes", ctypes.c_size_t),
        ("event", _Event),
        ("internal", ctypes.c_char * 32),
        ("offset", ctypes.c_int64),
        ("rest", ctypes.c_char * 32),
    )


class _Init(ctypes.Structure):
    """glibc's `struct aioinit`."""

    _fields_ = (("threads", ctypes.c_int), ("num", ctypes.c_int), ("rest", ctypes.c_int * 6))


@dataclass(frozen=True)
class _Library:
    """Functions of the C library; those that only look at a request keep the interpreter's lock."""

    lio_listio: Any
    aio_suspend: Any
    aio_error: Any
    aio_return: Any


@functools.cache
def _library() -> _Library | None:
    """Return the C library where it is glibc on a 64-bit system, whose structures are those above; None elsewhere."""
    if os.name != "posix" or ctypes.sizeof(ctypes.c_long) != 8:
        return None
    waiting, looking = ctypes.CDLL(None, use_errno=True), ctypes.PyDLL(None)
    if not hasattr(waiting, "gnu_get_libc_version") or not hasattr(waiting, "lio_listio"):
        return None
    waiting.aio_init(ctypes.byref(_Init(threads=_MAX_THREADS, num=_MAX_THREADS)))
    waiting.lio_listio.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    waiting.aio_suspend.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    looking.aio_error.argtypes = looking.aio_return.argtypes = (ctypes.c_void_p,)
    looking.aio_return.restype = ctypes.c_ssize_t
    return _Library(waiting.lio_listio, waiting.aio_suspend, looking.aio_error, looking.aio_return)


# In a process that was forked the C library counts on threads that stayed in its parent: there Python's own read.
_is_forked = False


def _after_fork() -> None:
    global _is_forked
    _is_forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

# Reads whose end was not waited for, as on a second Ctrl-C: the memory that they write must not be another's.
_abandoned: list[object] = []


class Reads(AbstractContextManager["Reads"]):
    """Reads that go on at once; none outlives the `with` block, unless the wait for it is interrupted.

    Attributes:
        is_done: none goes on.
    """

    def __init__(self, threads: int) -> None:
        """Divide what is read among so many threads."""
        self._threads = threads
        self._turn = 0
        self._library = None if _is_forked else _library()
        self._pool = None if self._library else ThreadPoolExecutor(threads)
        self._opened: dict[Path, list[int]] = {}
        self._going: dict[Read, tuple[Path, Sequence[memoryview], int]] = {}
        self.is_done = True

    def begin(self, file: Path, buffers: Sequence[memoryview], offset: int) -> Read:
        """Begin to fill buffers, one after the other, with the bytes of a file from `offset` on.

        What is small is read at once.

        Raises:
            OSError: the file cannot be opened, or not be read.
        """
        descriptors = self._descriptors(file)
        pieces = list(_pieces(buffers, offset))
        if sum(map(len, buffers)) < SMALL_BYTES * len(pieces):
            read = Read(os.preadv(descriptors[0], buffers, offset))
        else:
            self.is_done = False
            read = self._begin(descriptors, pieces)
        self._going[read] = file, buffers, offset
        return read

    def _begin(self, descriptors: Sequence[int], pieces: Sequence[tuple[memoryview, int]]) -> Read:
        if self._library is None:
            assert self._pool is not None
            return _ReadByPool(self._pool, descriptors[0], pieces)
        turns = range(self._turn, self._turn + len(pieces))  # each of the threads in its turn
        self._turn = turns.stop % self._threads
        return _ReadByLibrary(self._library, [descriptors[turn % self._threads] for turn in turns], pieces)

    def finish(self, read: Read) -> int:
        """Wait for a read's end, and read on where the system gave less than was asked for.

        Returns:
            How many bytes were read: all of them, unless the file ends there.

        Raises:
            OSError: the file could not be read.
        """
        file, buffers, offset = self._going[read]
        total = count = self._received(read)
        while count and (rest := _without(buffers, total)):
            count = self._received(self.begin(file, rest, offset + total))
            total += count
        return total

    def _received(self, read: Read) -> int:
        read.wait()
        del self._going[read]
        return read.received()

    def close(self, file: Path) -> None:
        """Close a file, of which no read goes on."""
        for descriptor in self._opened.pop(file, ()):
            os.close(descriptor)

    def _descriptors(self, file: Path) -> list[int]:
        if file not in self._opened:
            opened = self._opened[file] = []
            for _ in range(1 if self._pool else self._threads):
                opened.append(os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0)))
        return self._opened[file]

    def __exit__(self, *raised: object) -> None:
        try:
            for read in self._going:
                read.wait()
            self.is_done = True
        finally:
            if not self.is_done:
                _abandoned.append(self)
        if self._pool:
            self._pool.shutdown()
        for file in list(self._opened):
            self.close(file)


def _pieces(buffers: Sequence[memoryview], offset: int) -> Iterator[tuple[memoryview, int]]:
    """Cut what is to be read into blocks, each with its offset in the file."""
    for buffer in buffers:
        for begin in range(0, len(buffer), BLOCK_BYTES):
            yield buffer[begin : begin + BLOCK_BYTES], offset + begin
        offset += len(buffer)


def _without(buffers: Sequence[memoryview], count: int) -> Sequence[memoryview]:
    """Leave out the first bytes, which have been filled."""
    for index, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[index + 1 :]]
        count -= len(buffer)
    return []


class Read:
    """One read, which may go on: here one that is over."""

    def __init__(self, received: int) -> None:
        self._received = received

    def wait(self) -> None:
        """Wait for its end, whatever that is."""

    def received(self) -> int:
        """Return the bytes that were read before the first that were not.

        Raises:
            OSError: the file could not be read.
        """
        return self._received


class _ReadByLibrary(Read):
    """A read by threads of the C library."""

    def __init__(self, library: _Library, descriptors: Sequence[int], pieces: Sequence[tuple[memoryview, int]]) -> None:
        self._library = library
        self._pieces, self._descriptor = pieces, descriptors[0]  # the pieces, whose memory must stay
        self._requests = (_Request * len(pieces))()
        size, first = ctypes.sizeof(_Request), ctypes.addressof(self._requests)
        self._addresses = [first + size * index for index in range(len(pieces))]
        self._list = (ctypes.c_void_p * len(pieces))(*self._addresses)
        for index, (buffer, offset) in enumerate(pieces):
            request = self._requests[index]
            request.descriptor = descriptors[index]
            request.buffer = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
            request.nbytes, request.offset = len(buffer), offset
            request.opcode, request.event.notify = _LIO_READ, _SIGEV_NONE
        # What cannot be asked for (EAGAIN) has that for its error.
        library.lio_listio(_LIO_NOWAIT, self._list, len(pieces), None)

    def wait(self) -> None:
        library, first = self._library, ctypes.addressof(self._list)
        for index, address in enumerate(self._addresses):
            while library.aio_error(address) == errno.EINPROGRESS:  # a signal ends the wait too early
                library.aio_suspend(first + index * ctypes.sizeof(ctypes.c_void_p), 1, None)

    def received(self) -> int:
        total = 0
        for address, (buffer, offset) in zip(self._addresses, self._pieces, strict=True):
            error = self._library.aio_error(address)
            if error == errno.EAGAIN:  # too much at once: not read yet
                return total or os.preadv(self._descriptor, [buffer], offset)
            if error:
                raise OSError(error, os.strerror(error))
            count = self._library.aio_return(address)
            total += count
            if count < len(buffer):
                break
        return total


class _ReadByPool(Read):
    """A read by threads of Python's."""

    def __init__(self, pool: ThreadPoolExecutor, descriptor: int, pieces: Sequence[tuple[memoryview, int]]) -> None:
        self._pieces = pieces
        self._counts: list[Future[int]] = [
            pool.submit(os.preadv, descriptor, [buffer], offset) for buffer, offset in pieces
        ]

    def wait(self) -> None:
        wait(self._counts)

    def received(self) -> int:
        total = 0
        for count, (buffer, _) in zip(self._counts, self._pieces, strict=True):
            total += count.result()
            if count.result() < len(buffer):
                break
        return total
