"""Reads by `feed.c`, which needs no interpreter's lock: a program's tables and a device's functions, by ctypes."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sysconfig
from array import array
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .program import Batch, Program

logger = logging.getLogger(__name__)

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64
_ERROR_READ, _ERROR_ENDED = 1, 2
# Ctrl-C is noticed as often.
_WAIT_MS = 100
# A file system that hangs for as long is left alone with the memory that it reads into.
_END_MS = 10_000
# CUDA's driver's, in the order of `feed_functions`.
_DRIVER = (
    "cuCtxSetCurrent",
    "cuMemcpyHtoDAsync_v2",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventQuery",
    "cuStreamWaitEvent",
)


class _Functions(ctypes.Structure):
    _fields_ = [(name, _POINTER) for name in _DRIVER]


class _Lane(ctypes.Structure):
    _fields_ = [(name, _POINTER) for name in ("device", "context", "copy_stream", "work_stream")]


class _Order(ctypes.Structure):
    _fields_ = (
        ("lanes", _POINTER),
        ("lane_count", _NUMBER),
        ("spans", _POINTER),
        ("span_count", _NUMBER),
        ("batches", _POINTER),
        ("batch_count", _NUMBER),
        ("ring", _POINTER),
        ("slot_bytes", _NUMBER),
        ("slot_count", _NUMBER),
        ("thread_count", _NUMBER),
    )


class _State(ctypes.Structure):
    _fields_ = [(name, _NUMBER) for name in ("complete", "error", "code", "span", "at")]


class Library:
    """The functions of `feed.c`. Those that take no time keep the interpreter's lock."""

    def __init__(self, path: Path) -> None:
        waiting, quick = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
        self.begin, self.wait, self.end = waiting.feed_begin, waiting.feed_wait, waiting.feed_end
        self.take, self.done = quick.feed_take, quick.feed_done
        self.begin.argtypes, self.begin.restype = (_POINTER,), _POINTER
        self.wait.argtypes, self.wait.restype = (_POINTER, _NUMBER, _NUMBER, _POINTER), None
        self.end.argtypes = self.take.argtypes = (_POINTER, _NUMBER)
        self.done.argtypes = (_POINTER,)


@functools.cache
def library() -> Library | None:
    """Return the library; None where it was not built, as where bigload was installed without a compiler."""
    suffix = str(sysconfig.get_config_var("EXT_SUFFIX"))
    for name in (f"_feed{suffix}", "_feed.abi3.so"):
        path = Path(__file__).with_name(name)
        if path.exists():
            try:
                return Library(path)
            except (OSError, AttributeError) as error:
                logger.info("reading by Python: %s cannot be used: %s", path, error)
                return None
    logger.info("reading by Python: bigload was installed without its part in C, which reads faster")
    return None


@functools.cache
def _driver() -> _Functions:
    driver = ctypes.CDLL("libcuda.so.1")
    return _Functions(*(ctypes.cast(getattr(driver, name), _POINTER).value for name in _DRIVER))


def _context() -> int | None:
    """Return the context of CUDA that is current in this thread."""
    context = _POINTER()
    ctypes.CDLL("libcuda.so.1").cuCtxGetCurrent(ctypes.byref(context))
    return context.value


class Lane:
    """Where bytes go: the host, or a GPU, which copies on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.functions: _Functions | None = None
        self.context: int | None = None
        self.copy: Any = None
        self.work: Any = None
        if device.type == "cuda":
            with torch.cuda.device(device):
                self.functions, self.context = _driver(), _context()
                self.copy, self.work = torch.cuda.Stream(device), torch.cuda.default_stream(device)  # type: ignore[no-untyped-call]

    def as_fields(self) -> tuple[int | None, ...]:
        """Return what `feed.c` knows of it."""
        if self.functions is None:
            return None, None, None, None
        return ctypes.addressof(self.functions), self.context, self.copy.cuda_stream, self.work.cuda_stream


class Feed(AbstractContextManager["Feed"]):
    """One program, read by threads.

    Attributes:
        is_done: whether nothing reads or copies any more.
    """

    def __init__(
        self, program: Program, lanes: Sequence[Lane], ring: torch.Tensor | None, slot_bytes: int, threads: int
    ) -> None:
        """Prepare it; the reads begin with the `with` block.

        Args:
            program: what to read.
            lanes: of the devices.
            ring: (bytes,), uint8, pinned: what passes through to GPUs; None for the host alone.
            slot_bytes: how much is read at once.
            threads: that read.
        """
        self._program, self._lanes, self._ring = program, lanes, ring
        self._slot_bytes, self._threads = slot_bytes, threads
        self._descriptors: list[int] = []
        self._feed: int | None = None
        self._keep: tuple[object, ...] = ()
        self.is_done = True

    def __enter__(self) -> Feed:
        found = library()
        assert found is not None
        self._library = found
        try:
            for file in self._program.files:
                self._descriptors.append(_opened(file, self._program))
            self._begin()
        except BaseException:
            self._close()
            raise
        return self

    def _begin(self) -> None:
        program, numbers = self._program, {lane.device: number for number, lane in enumerate(self._lanes)}
        spans = array("q", program.spans)
        for at in range(0, len(spans), 5):
            spans[at] = self._descriptors[spans[at]]
        batches = array("q")
        for batch in program.batches:
            after = -1 if batch.after is None else batch.after.number
            batches.extend((numbers[batch.device], after, 0, 0))
        lanes = (_Lane * len(self._lanes))(*(_Lane(*lane.as_fields()) for lane in self._lanes))
        ring, slots = self._ring, 0 if self._ring is None else self._ring.numel() // self._slot_bytes
        order = _Order(
            ctypes.addressof(lanes),
            len(lanes),
            spans.buffer_info()[0],
            len(program.tasks),
            batches.buffer_info()[0],
            len(program.batches),
            None if ring is None else ring.data_ptr(),
            self._slot_bytes,
            slots,
            self._threads,
        )
        self._keep = spans, batches, lanes, order, ring, self._lanes
        self._times = batches
        self.is_done = False
        self._feed = self._library.begin(ctypes.byref(order))
        if not self._feed:
            self.is_done = True
            raise CheckpointError("the system has no memory or no thread to read with")

    def batches(self) -> Iterator[Batch]:
        """Yield each batch when it is there, or on its way to a GPU: `take` it, work on it, and say that it is `done`.

        Raises:
            CheckpointError: a file cannot be read, or ends before a tensor does.
            RuntimeError: a GPU failed.
        """
        state, known, total = _State(), 0, len(self._program.batches)
        while known < total:
            self._library.wait(self._feed, known, _WAIT_MS, ctypes.byref(state))
            if state.error:
                self._raise(state)
            yield from self._program.batches[known : state.complete]
            known = state.complete

    def take(self, batch: Batch) -> None:
        """Have what is launched on the default stream from here on wait for a batch. Its GPU is the current one."""
        _check(self._library.take(self._feed, batch.number))

    def done(self) -> None:
        """Have the memory of the latest batch used again, after what has been launched. Its GPU is the current one."""
        _check(self._library.done(self._feed))

    def times_of(self, batch: Batch) -> tuple[float, float]:
        """Return when the first byte of a batch was asked for, and when the last had come: of `time.perf_counter`."""
        _, _, begun, complete = self._times[4 * batch.number : 4 * batch.number + 4]
        return begun / 1e9, complete / 1e9

    def _raise(self, state: _State) -> None:
        if state.error not in (_ERROR_READ, _ERROR_ENDED) or state.span < 0:
            raise RuntimeError(
                f"CUDA error {state.code}" if state.span < 0 else f"a copy failed: CUDA error {state.code}"
            )
        tensor = self._program.tasks[state.span].tensor
        if state.error == _ERROR_ENDED:
            raise CheckpointError(f"'{tensor.file}' ended while '{tensor.name}' was read: it was truncated meanwhile")
        error = OSError(state.code, os.strerror(state.code))
        raise CheckpointError(f"reading '{tensor.name}' from '{tensor.file}' failed: {error}") from error

    def __exit__(self, *raised: object) -> None:
        if self._feed and self._library.end(self._feed, _END_MS):
            _abandoned.append(self._keep)
            logger.warning("a file system does not answer: threads that read from it are left alone")
            return
        self._feed, self.is_done = None, True
        self._close()

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"CUDA error {code}")


# Of feeds whose threads are left alone: the memory that they write to.
_abandoned: list[object] = []


def _opened(file: Path, program: Program) -> int:
    try:
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        name = next(task.tensor.name for task in program.tasks if task.tensor.file == file)
        raise CheckpointError(f"reading '{name}' from '{file}' failed: {error}") from error
