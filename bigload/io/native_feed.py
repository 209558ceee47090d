"""Executes a program by `feed.c`, whose threads need no interpreter's lock: by ctypes, which tables of numbers suit."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sysconfig
from array import array
from collections.abc import Iterator
from pathlib import Path

import torch

from ..hardware.interrupts import WAIT_S, check_interrupt
from . import feed
from .feed import Feed, Lane
from .program import Batch

logger = logging.getLogger(__name__)

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64
_ERROR_READ, _ERROR_ENDED = 1, 2
# What is read at once on its way to a GPU: little, so that the first copy begins early.
_READ_BYTES = 4 * 2**20
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
    for name in ("_feed.abi3.so", f"_feed{suffix}"):
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
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _functions() -> _Functions:
    return _Functions(*(ctypes.cast(getattr(_driver(), name), _POINTER).value for name in _DRIVER))


def _fields_of(lane: Lane | None) -> tuple[int | None, ...]:
    """Return what `feed.c` knows of a lane; None is the host's."""
    if lane is None:
        return None, None, None, None
    context = _POINTER()
    with torch.cuda.device(lane.device):
        _driver().cuCtxGetCurrent(ctypes.byref(context))
    return ctypes.addressof(_functions()), context.value, lane.copies.cuda_stream, lane.work.cuda_stream


class NativeFeed(Feed):
    """A program that `feed.c` executes."""

    def _start(self) -> None:
        found = library()
        assert found is not None
        self._library, self._feed = found, None
        order = self._order()
        self._feed = found.begin(ctypes.byref(order))
        if not self._feed:
            self.is_done = True
            raise MemoryError("the system has no memory or no thread to read with")

    def _order(self) -> _Order:
        program, ring = self._program, self._resources.ring
        devices = list(dict.fromkeys(batch.device for batch in program.batches))
        lanes = (_Lane * len(devices))(*(_Lane(*_fields_of(self.lanes.get(device))) for device in devices))
        spans, batches = array("q", program.spans), array("q")
        for at in range(0, len(spans), 5):
            spans[at] = self._descriptors[spans[at]]
        numbers = {device: number for number, device in enumerate(devices)}
        for batch in program.batches:
            batches.extend((numbers[batch.device], -1 if batch.after is None else batch.after.number, 0))
        self._keep, self._times = (lanes, spans, batches), batches
        at_once, slots, threads = _READ_BYTES, 0, self._resources.threads
        if ring is not None:
            at_once = min(_READ_BYTES // len(self.lanes), ring.slot_bytes)  # with more GPUs there are more threads
            # More than two slots for each would leave the processor's cache between the read and the copy.
            slots = min(ring.memory.numel() // at_once, 2 * threads)
        return _Order(
            ctypes.addressof(lanes),
            len(lanes),
            spans.buffer_info()[0],
            len(program.pieces),
            batches.buffer_info()[0],
            len(program.batches),
            None if ring is None else ring.memory.data_ptr(),
            at_once,
            slots,
            threads,
        )

    def batches(self) -> Iterator[Batch]:
        state, known, batches = _State(), 0, self._program.batches
        while known < len(batches):
            self._library.wait(self._feed, known, int(1000 * WAIT_S), ctypes.byref(state))
            check_interrupt()
            if state.error:
                raise self._error_of(state)
            yield from batches[known : state.complete]
            known = state.complete

    def _error_of(self, state: _State) -> Exception:
        if state.span >= 0 and state.error == _ERROR_READ:
            return self._failure(state.span, state.at, OSError(state.code, os.strerror(state.code)))
        if state.error == _ERROR_ENDED:
            return self._failure(state.span, state.at, None)
        if state.error == _ERROR_READ:
            return MemoryError("the system has no memory to read with")
        return RuntimeError(f"a copy to a GPU failed: {_name_of(state.code)}")

    def take(self, batch: Batch) -> None:
        self._check(self._library.take(self._feed, batch.number))

    def done(self, batch: Batch) -> None:
        self._check(self._library.done(self._feed))

    def _check(self, code: int) -> None:
        if code:
            raise RuntimeError(f"a GPU failed: {_name_of(code)}")

    def begun(self, batch: Batch) -> float:
        return self._times[3 * batch.number + 2] / 1e9

    def _stop(self) -> bool:
        if self._feed and self._library.end(self._feed, int(1000 * feed.END_S)):
            logger.warning("a file system or a GPU does not answer: what waits for it is left alone")
            return False
        self._feed = None
        return True


def _name_of(code: int) -> str:
    name = ctypes.c_char_p()
    _driver().cuGetErrorName(code, ctypes.byref(name))
    return f"CUDA's driver says {(name.value or b'?').decode()} ({code})"
