"""Asynchronous file reads, several at once, by POSIX's asynchronous I/O (`man 7 aio`).

A Python thread must wake up and take the interpreter's lock after each read; with a dozen threads that read 4 MiB each,
this takes longer than the reads. The C library's own threads need no lock. Where the C library is not glibc, Python
threads read.

glibc lets one thread serve all requests for a descriptor, in order. So a file is opened once for each read that shall
run at the same time.
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

# The largest request: to wake up a thread takes as long as to read a few hundred KiB.
BLOCK_BYTES = 4 * 2**20
# Below this, to request a read costs more than to read.
SMALL_BYTES = 2**16

_LIO_NOWAIT, _LIO_READ, _SIGEV_NONE = 1, 0, 1
_MAX_THREADS = 64


class _Event(ctypes.Structure):
    """glibc's `struct sigevent`, which here asks for no notification."""

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
    """Functions of the C library. `aio_error` and `aio_return` return at once, so they keep the interpreter's lock."""

    lio_listio: Any
    aio_suspend: Any
    aio_error: Any
    aio_return: Any


@functools.cache
def _library() -> _Library | None:
    """Return glibc's functions; None on other systems, or 32-bit ones, where the structures above would be wrong."""
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


# A forked process lacks the threads of its parent, which the C library still counts on: there Python threads read.
_is_forked = False


def _after_fork() -> None:
    global _is_forked
    _is_forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

# Reads that were not waited for, as on a second Ctrl-C: kept, so that the memory they write to is not reused.
_abandoned: list[object] = []


class Reads(AbstractContextManager["Reads"]):
    """Asynchronous reads. The end of the `with` block waits for all of them.

    Attributes:
        is_done: whether no read is running any more; False after the `with` block if its wait was interrupted.
    """

    def __init__(self, threads: int) -> None:
        """Use this many threads."""
        self._threads = threads
        self._turn = 0
        self._library = None if _is_forked else _library()
        self._pool = None if self._library else ThreadPoolExecutor(threads)
        self._opened: dict[Path, list[int]] = {}
        self._going: dict[Read, tuple[Path, Sequence[memoryview], int]] = {}
        self.is_done = True

    def begin(self, file: Path, buffers: Sequence[memoryview], offset: int) -> Read:
        """Begin to fill buffers, one after the other, with a file's bytes from `offset` on.

        A small read is done at once.

        Raises:
            OSError: the file cannot be opened or read.
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
        turns = range(self._turn, self._turn + len(pieces))  # threads take turns, also across reads
        self._turn = turns.stop % self._threads
        return _ReadByLibrary(self._library, [descriptors[turn % self._threads] for turn in turns], pieces)

    def finish(self, read: Read) -> int:
        """Wait for a read, and read the rest if the system gave less than was asked for.

        Returns:
            The number of bytes that were read: all, or those up to the end of the file.

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
        """Close a file that no running read uses."""
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
    """Split buffers into requests of at most `BLOCK_BYTES`, each with its offset in the file."""
    for buffer in buffers:
        for begin in range(0, len(buffer), BLOCK_BYTES):
            yield buffer[begin : begin + BLOCK_BYTES], offset + begin
        offset += len(buffer)


def _without(buffers: Sequence[memoryview], count: int) -> Sequence[memoryview]:
    """Drop the first `count` bytes of the buffers."""
    for index, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[index + 1 :]]
        count -= len(buffer)
    return []


class Read:
    """One read; this class is for one that is already done.

    Attributes:
        is_small: it was done at once.
    """

    is_small = True

    def __init__(self, received: int) -> None:
        self._received = received

    def wait(self) -> None:
        """Wait until the read has ended, well or not."""

    def received(self) -> int:
        """Return the number of bytes that were read, up to the first gap.

        Raises:
            OSError: the file could not be read.
        """
        return self._received


class _ReadByLibrary(Read):
    """A read by the C library's threads."""

    is_small = False

    def __init__(self, library: _Library, descriptors: Sequence[int], pieces: Sequence[tuple[memoryview, int]]) -> None:
        self._library = library
        self._pieces, self._descriptor = pieces, descriptors[0]  # keeps the memory alive that is written to
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
        # Its result is not needed: a request that the system does not take has the error EAGAIN.
        library.lio_listio(_LIO_NOWAIT, self._list, len(pieces), None)

    def wait(self) -> None:
        library, first = self._library, ctypes.addressof(self._list)
        for index, address in enumerate(self._addresses):
            while library.aio_error(address) == errno.EINPROGRESS:  # a signal may end the wait early
                library.aio_suspend(first + index * ctypes.sizeof(ctypes.c_void_p), 1, None)

    def received(self) -> int:
        total = 0
        for address, (buffer, offset) in zip(self._addresses, self._pieces, strict=True):
            error = self._library.aio_error(address)
            if error == errno.EAGAIN:  # the system had too many requests: not read yet
                return total or os.preadv(self._descriptor, [buffer], offset)
            if error:
                raise OSError(error, os.strerror(error))
            count = self._library.aio_return(address)
            total += count
            if count < len(buffer):
                break
        return total


class _ReadByPool(Read):
    """A read by Python threads."""

    is_small = False

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
