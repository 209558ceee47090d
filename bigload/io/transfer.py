"""Reads tensors and brings them to their devices.

What is read and where it goes is laid out first (`program.py`). Threads then execute that (`feed.py`): into a tensor's
home, or into a small window of memory on its device, where the caller's thread works on it, batch by batch. To a GPU
the bytes pass through a ring of pinned memory, and events order its copies with the work of its default stream. A slot
of the ring is used again when the copies out of it are over, memory of the window when the work on it is. Nothing else
holds the reads back, and the memory in use is bounded.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import torch

from ..hardware.devices import current_gpu
from ..hardware.interrupts import check_interrupt, interruptible
from .feed import Feed, Resources
from .native_feed import NativeFeed, library
from .program import Batch, Program, ReadTask, Window, lay_out
from .ring import needs_ring, reader_threads, slot_bytes, take_ring
from .threaded_feed import ThreadedFeed
from .timeline import Timeline, timed_event

# Of a batch for a GPU, at most: large, since each has to wake up the caller's thread.
_BATCH_BYTES = 48 * 2**20
# Batches for which a window has room: one that is worked on, one that is there, one that comes.
_LIVE = 3
WINDOW_BYTES = _LIVE * _BATCH_BYTES
# Files that are open at once: a process may open 1,024, as most systems are set.
_FILES = 256


def read_all(
    tasks: Sequence[ReadTask],
    *,
    on_bytes: Callable[[int], object] = lambda count: None,
    meanwhile: Callable[[], object] = lambda: None,
    timeline: Timeline | None = None,
) -> None:
    """Read tensors, each byte once, and move them to their devices.

    The copies wait for the work that is in the default streams now. So allocate the homes before the call.

    Args:
        tasks: in the order of reading.
        on_bytes: called, like the tasks' functions, in the caller's thread, with the number of bytes that have arrived
            since the last call.
        meanwhile: called once, in the caller's thread, when the first reads are on their way.
        timeline: gets the times of the stages.

    Raises:
        CheckpointError: a file cannot be read, or ends before a tensor does.
    """
    timeline, meanwhile = timeline or Timeline(), functools.cache(meanwhile)
    for some in _of_few_files([task for task in tasks if task.tensor.nbytes]):
        devices = dict.fromkeys(task.device for task in some)
        with ExitStack() as stack:
            ring = stack.enter_context(take_ring()) if any(map(needs_ring, devices)) else None
            windows = {device: _window(device, some) for device in devices}
            program = lay_out(some, {d: Window(w.data_ptr(), len(w), _batch_bytes(d)) for d, w in windows.items()})
            gpus = sum(map(needs_ring, devices))
            feed = _feed(program, Resources(windows, ring, reader_threads(max(1, gpus))))
            try:
                with feed:
                    meanwhile()
                    _work(feed, windows, on_bytes, timeline)
            finally:
                if ring is not None:
                    ring.is_quiet = feed.is_done


def _of_few_files(tasks: Sequence[ReadTask]) -> Iterator[list[ReadTask]]:
    """Divide tasks, so that not too many files are open at once."""
    numbers = {
        file: number for number, file in enumerate(dict.fromkeys(task.tensor.file for task in interruptible(tasks)))
    }
    for _, some in itertools.groupby(tasks, lambda task: numbers[task.tensor.file] // _FILES):
        yield list(some)


def _batch_bytes(device: torch.device) -> int:
    return _BATCH_BYTES if needs_ring(device) else slot_bytes()


def _window(device: torch.device, tasks: Sequence[ReadTask]) -> torch.Tensor:
    needs = any(task.home is None for task in tasks if task.device == device)
    return torch.empty(_LIVE * _batch_bytes(device) if needs else 0, dtype=torch.uint8, device=device)


def _feed(program: Program, resources: Resources) -> Feed:
    return (NativeFeed if library() is not None else ThreadedFeed)(program, resources)


def _work(
    feed: Feed, windows: dict[torch.device, torch.Tensor], on_bytes: Callable[[int], object], timeline: Timeline
) -> None:
    waited = time.perf_counter()
    for batch in feed.batches():
        timeline.add("read", batch.device, waited)
        with nullcontext() if batch.device.type == "cpu" else current_gpu(batch.device):
            feed.take(batch)
            with _timed(feed, batch, timeline):
                for task, begin, numel, at in batch.pieces:
                    check_interrupt()
                    if at is not None:
                        dtype = task.tensor.dtype
                        task.take(windows[batch.device][at : at + numel * dtype.itemsize].view(dtype), begin)
                    task.arrived(numel)
            feed.done(batch)
        on_bytes(batch.nbytes)
        waited = time.perf_counter()


@contextmanager
def _timed(feed: Feed, batch: Batch, timeline: Timeline) -> Iterator[None]:
    """Add a batch's copies and the work on it to the timeline."""
    if not needs_ring(batch.device):
        begun = time.perf_counter()
        yield
        if batch.used:
            timeline.add("quantize", batch.device, begun)
        return
    stream, copied, worked = feed.lanes[batch.device].work, timed_event(), timed_event()
    copied.record(stream)
    timeline.add_copy(batch.device, feed.begun(batch), copied)
    yield
    if batch.used:
        worked.record(stream)
        timeline.add_work(batch.device, copied, worked)


@contextmanager
def default_stream(device: torch.device) -> Iterator[None]:
    """Work on a GPU's default stream, ordered after the caller's earlier work and before its later work.

    bitsandbytes' 4-bit kernels run on the default stream, whatever stream is current, so all that they depend on must
    be ordered with it. Does nothing for the CPU.
    """
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
            caller, default = torch.cuda.current_stream(), torch.cuda.default_stream()
            default.wait_stream(caller)
            stack.enter_context(torch.cuda.stream(default))
            stack.callback(caller.wait_stream, default)
        yield
