"""Moves what was read into the slots of a ring to its device.

To a GPU, a thread copies it on a stream of its own, into the tensor's home or into a small window of staging buffers on
the device, whose contents the default stream works on. For the CPU it was read into the tensor's home, or is taken out
of the slot. A slot is reused when the copy out of it is done, a staging buffer when the default stream is done with it.
Nothing else holds the reads back, and the memory in use is bounded.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from queue import SimpleQueue

import torch

from ..hardware.devices import current_gpu
from .delivery import deliver
from .extents import Extent, ExtentSlice, ReadTask, cut
from .feed import library
from .reader import Reader
from .ring import take_ring
from .staging import BUFFER_BYTES, Copies, StagingBuffer
from .timeline import Timeline, plain_event, timed_event

# Staging buffers on each GPU, for what its default stream has yet to work on.
_WINDOW = 3
WINDOW_BYTES = _WINDOW * BUFFER_BYTES

# Slots that a GPU copies from: one now, and one that is ready so that the link never waits.
_COPIED = 2

# The caller's thread is woken up after this many bytes, unless it is needed earlier: to wake up takes time, and threads
# that are awake compete for the interpreter's lock.
_BATCH_BYTES = 64 * 2**20

# Work for the caller's thread; None: do all that has been yielded so far now.
_Step = Callable[[], object] | None


def read_all(
    tasks: Sequence[ReadTask],
    *,
    on_bytes: Callable[[int], object] = lambda count: None,
    timeline: Timeline | None = None,
) -> None:
    """Read tensors, each byte once, and move them to their devices.

    The copies wait for the work that is in the default streams now. So allocate the homes before the call.

    Args:
        tasks: in the order of reading.
        on_bytes: called, like the tasks' functions, in the caller's thread, with the number of bytes that have arrived
            since the last call.
        timeline: gets the times of the stages.

    Raises:
        CheckpointError: a file cannot be read, or ends before a tensor does.
    """
    timeline = timeline or Timeline()
    tasks = [task for task in tasks if task.tensor.nbytes]
    if not tasks:
        return
    if library() is not None and os.environ.get("BIGLOAD_NATIVE", "1") == "1":
        deliver(tasks, on_bytes, timeline)
        return
    devices = {task.device for task in tasks}
    with take_ring(pinned=any(device.type == "cuda" for device in devices)) as ring:
        transfers = {device: _transfer(device, timeline) for device in devices}
        copies = any(transfer.copies for transfer in transfers.values())
        extents = _in_turns(cut(tasks, ring.slot_bytes))
        reader = Reader(extents, ring, copied=_COPIED if copies else 0, timeline=timeline)
        steps = _steps(reader, transfers, on_bytes)
        ahead = ReadAheadThread(steps) if copies else None
        try:
            with ExitStack() as entered:
                for transfer in transfers.values():
                    entered.enter_context(transfer)
                entered.enter_context(reader)
                if ahead is not None:
                    steps = entered.enter_context(ahead)
                    entered.callback(_stop, reader, transfers)
                for step in steps:
                    if step is not None:
                        step()
        finally:
            # A second Ctrl-C may have stopped the wait for threads and copies: then they still use the ring.
            is_done = reader.is_done and (ahead is None or ahead.is_done)
            ring.is_quiet = is_done and all(transfer.is_done for transfer in transfers.values())


def _in_turns(extents: Sequence[Extent]) -> list[Extent]:
    """Interleave the extents of different devices: each device has its own link, and all shall be busy."""
    by_device: dict[torch.device, list[Extent]] = defaultdict(list)
    for extent in extents:
        by_device[extent.device].append(extent)
    rounds = itertools.zip_longest(*by_device.values())
    return [extent for turn in rounds for extent in turn if extent is not None]


def _steps(
    reader: Reader, transfers: dict[torch.device, Transfer], on_bytes: Callable[[int], object]
) -> Iterator[_Step]:
    """Send each extent to its device, and yield the work that this leaves for the caller's thread."""
    nbytes = 0
    for extent, slot, filled in reader:
        yield from transfers[extent.device].send(extent, slot, filled, reader)
        yield partial(on_bytes, extent.nbytes)
        nbytes += extent.nbytes
        if nbytes >= _BATCH_BYTES:
            nbytes = 0
            yield None
    for transfer in transfers.values():
        yield from transfer.flush()


def _stop(reader: Reader, transfers: dict[torch.device, Transfer]) -> None:
    reader.stop()
    for transfer in transfers.values():
        transfer.stop()


class ReadAheadThread(AbstractContextManager[Iterator[_Step]]):
    """Iterates over the steps in a thread of its own, ahead of the caller, so that copies do not wait for its work."""

    def __init__(self, steps: Iterator[_Step]) -> None:
        self._steps = steps
        self._found: SimpleQueue[list[_Step] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._find, daemon=True)
        self.is_done = True

    def __enter__(self) -> Iterator[_Step]:
        self._thread.start()
        self.is_done = False
        return (step for batch in iter(self._found.get, None) for step in batch)

    def _find(self) -> None:
        batch: list[_Step] = []
        try:
            for step in self._steps:
                batch.append(step)
                if step is None:
                    self._found.put(batch)
                    batch = []
        except BaseException as error:
            batch.append(partial(_raise, error))
        self._found.put(batch)
        self._found.put(None)

    def __exit__(self, *raised: object) -> None:
        self._thread.join()
        self.is_done = True


def _raise(error: BaseException) -> None:
    raise error


class Transfer(AbstractContextManager["Transfer"]):
    """Sends extents to one device.

    Attributes:
        copies: whether it copies asynchronously.
        is_done: whether no copy is running any more.
    """

    copies = False
    is_done = True

    def send(self, extent: Extent, slot: int | None, filled: torch.Tensor | None, reader: Reader) -> Iterator[_Step]:
        """Send an extent to the device, and release its slot when that may be reused.

        Args:
            extent: what was read.
            slot: the number of its slot; None where it was read into its homes.
            filled: its bytes in the slot.
            reader: owns the slot.

        Yields:
            Work for the caller's thread.
        """
        raise NotImplementedError

    def flush(self) -> Iterator[_Step]:
        """Yield the work that waits for more to come; after the last extent."""
        return iter(())

    def stop(self) -> None:
        """End all waits: the load was interrupted."""

    def __exit__(self, *raised: object) -> None:
        pass


class CpuTransfer(Transfer):
    """For the CPU, where nothing has to be copied."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline, self._begun = timeline, 0.0

    def send(self, extent: Extent, slot: int | None, filled: torch.Tensor | None, reader: Reader) -> Iterator[_Step]:
        if filled is not None:
            yield self._begin
        for part in extent.parts:
            if filled is not None:
                yield partial(_take, part, filled)
            yield partial(part.task.arrived, part.count)
        if filled is not None:
            yield partial(self._end, extent)
        yield partial(reader.release, slot, None)
        yield None

    def _begin(self) -> None:
        self._begun = time.perf_counter()

    def _end(self, extent: Extent) -> None:
        self._timeline.add("quantize", extent.device, self._begun)


def _take(part: ExtentSlice, filled: torch.Tensor) -> None:
    part.task.take(part.values_in(filled), part.begin)


class CudaTransfer(Transfer):
    """Copies to one GPU on a stream of its own, into homes or into staging buffers on the device.

    A staging buffer collects whole tensors, as many as fit, or a piece of a larger one before the default stream works
    on them: few large steps instead of many. Events order the two streams: a buffer is written after the default stream
    is done with its former contents, and worked on after it has been written.
    """

    copies = True

    def __init__(self, device: torch.device, timeline: Timeline) -> None:
        self._device, self._timeline = device, timeline
        self._default = torch.cuda.default_stream(device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._free: SimpleQueue[StagingBuffer | None] = SimpleQueue()
        self._buffer: StagingBuffer | None = None
        self._emptied: defaultdict[int, torch.cuda.Event] = defaultdict(plain_event)  # by slot

    def __enter__(self) -> CudaTransfer:
        self.is_done = False
        for _ in range(_WINDOW):
            self._free.put(StagingBuffer(self._device))
        # The memory of homes and buffers may have been another tensor's, which the default stream still works on.
        self._stream.wait_stream(self._default)
        return self

    def send(self, extent: Extent, slot: int | None, filled: torch.Tensor | None, reader: Reader) -> Iterator[_Step]:
        assert slot is not None
        assert filled is not None
        torch.cuda.set_stream(self._stream)  # of this thread; a context manager would take ten times as long
        begun = time.perf_counter()
        at_home, copies = list[ExtentSlice](), Copies(filled, extent.nbytes)
        for part in extent.parts:
            home = part.home
            if home is None:
                yield from self._stage(part, copies)
            else:
                copies.add(home, part.at, part.nbytes)
                at_home.append(part)
        copies.begin()
        copied = timed_event() if at_home else self._emptied[slot]  # copies into a buffer are timed with it
        copied.record(self._stream)
        reader.release(slot, copied)
        if at_home:
            self._timeline.add_copy(self._device, begun, copied)
            yield partial(self._arrive, at_home, copied)
        if len(at_home) == len(extent.parts):
            yield from self.flush()  # what is staged shall not wait for the end of a large home

    def _arrive(self, at_home: Sequence[ExtentSlice], copied: torch.cuda.Event) -> None:
        with current_gpu(self._device):
            self._default.wait_event(copied)  # work on tensors that are complete is done there
            for part in at_home:
                part.task.arrived(part.count)

    def _stage(self, part: ExtentSlice, copies: Copies) -> Iterator[_Step]:
        """Add the copies of a piece's bytes into staging buffers; one that is full goes to the caller's thread."""
        task, copied, begin = part.task, 0, part.begin * part.task.tensor.dtype.itemsize
        while copied < part.nbytes:
            if self._buffer is None:
                self._buffer = self._free.get()
                if self._buffer is None:
                    self.stop()  # the next call shall not wait either
                    return
                self._stream.wait_event(self._buffer.worked)
            taken = self._buffer.take(task, begin + copied, part.nbytes - copied)
            if taken is None:
                copies.begin()
                yield from self.flush()
                continue
            at, count = taken
            copies.add_run(self._buffer.memory, at, part.at + copied, count)
            copied += count

    def flush(self) -> Iterator[_Step]:
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            buffer.copied = timed_event()
            buffer.copied.record(self._stream)
            self._timeline.add_copy(self._device, buffer.begun, buffer.copied)
            yield partial(self._hand_over, buffer)
            yield None

    def _hand_over(self, buffer: StagingBuffer) -> None:
        with current_gpu(self._device):  # the caller's may be another
            self._default.wait_event(buffer.copied)
            for part in buffer.parts:
                part.task.take(buffer.values_of(part), part.begin)
                part.task.arrived(part.count)
            buffer.worked = timed_event()
            buffer.worked.record(self._default)
        self._timeline.add_work(self._device, buffer.copied, buffer.worked)
        buffer.parts = []
        self._free.put(buffer)

    def stop(self) -> None:
        self._free.put(None)

    def __exit__(self, kind: object = None, *raised: object) -> None:
        self._default.wait_stream(self._stream)
        if kind is not None:
            self._stream.synchronize()  # it may still read slots, and write tensors that are freed now
        self.is_done = True


def _transfer(device: torch.device, timeline: Timeline) -> Transfer:
    return CudaTransfer(device, timeline) if device.type == "cuda" else CpuTransfer(timeline)


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
