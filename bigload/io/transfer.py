"""Moves what was read into the slots of a ring to its device.

To a GPU, a thread copies it on a stream of its own, into the tensor's home or into a small window of staging buffers on
the device, whose contents the default stream works on. For the CPU it was read into the tensor's home, or is taken out
of the slot. A slot is reused when the copy out of it is done, a staging buffer when the default stream is done with it.
Nothing else holds the reads back, and the memory in use is bounded.
"""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from queue import SimpleQueue

import torch

from .extents import Extent, ExtentSlice, ReadTask, cut
from .reader import Reader
from .ring import take_ring

# Staging buffers on each GPU, for what its default stream has yet to work on, and their size.
_WINDOW = 3
PLACE_BYTES = 48 * 2**20
WINDOW_BYTES = _WINDOW * PLACE_BYTES

# Slots that a GPU copies from: one now, and one that is ready so that the link never waits.
_COPIED = 2

# The caller's thread is woken up after this many bytes, unless it is needed earlier: to wake up takes time, and threads
# that are awake compete for the interpreter's lock.
_BATCH_BYTES = 64 * 2**20

# Work for the caller's thread; None: do all that has been yielded so far now.
_Step = Callable[[], object] | None


def read_all(tasks: Sequence[ReadTask], *, on_bytes: Callable[[int], object] = lambda count: None) -> None:
    """Read tensors, each byte once, and move them to their devices.

    The copies wait for the work that is in the default streams now. So allocate the homes before the call.

    Args:
        tasks: in the order of reading.
        on_bytes: called, like the tasks' functions, in the caller's thread, with the number of bytes that have arrived
            since the last call.

    Raises:
        CheckpointError: a file cannot be read, or ends before a tensor does.
    """
    if not tasks:
        return
    devices = {task.device for task in tasks}
    with take_ring(pinned=any(device.type == "cuda" for device in devices)) as ring:
        transfers = {device: _transfer(device) for device in devices}
        copies = any(transfer.copies for transfer in transfers.values())
        reader = Reader(_in_turns(cut(tasks, ring.slot_bytes)), ring, copied=_COPIED if copies else 0)
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

    def stop(self) -> None:
        """End all waits: the load was interrupted."""

    def __exit__(self, *raised: object) -> None:
        pass


class CpuTransfer(Transfer):
    """For the CPU, where nothing has to be copied."""

    def send(self, extent: Extent, slot: int | None, filled: torch.Tensor | None, reader: Reader) -> Iterator[_Step]:
        for part in extent.parts:
            if filled is not None:
                yield partial(_take, part, filled)
            yield partial(part.task.arrived, part.count)
        yield partial(reader.release, slot, None)
        yield None


def _take(part: ExtentSlice, filled: torch.Tensor) -> None:
    part.task.take(part.values_in(filled), part.begin)


class CudaTransfer(Transfer):
    """Copies to one GPU on a stream of its own, into homes or into staging buffers on the device.

    A staging buffer collects a tensor, or as much of it as fits, before the default stream works on it: few large steps
    instead of many. Events order the two streams: a buffer is written after the default stream is done with its former
    contents, and worked on after it has been written.
    """

    copies = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._default = torch.cuda.default_stream(device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._free: SimpleQueue[_Place | None] = SimpleQueue()
        self._place: _Place | None = None
        self._copied: defaultdict[int, torch.cuda.Event] = defaultdict(_event)  # by slot

    def __enter__(self) -> CudaTransfer:
        self.is_done = False
        for _ in range(_WINDOW):
            self._free.put(_Place(self._device))
        # The memory of homes and buffers may have been another tensor's, which the default stream still works on.
        self._stream.wait_stream(self._default)
        return self

    def send(self, extent: Extent, slot: int | None, filled: torch.Tensor | None, reader: Reader) -> Iterator[_Step]:
        assert slot is not None
        assert filled is not None
        torch.cuda.set_stream(self._stream)  # of this thread; a context manager would take ten times as long
        at_home = [part for part in extent.parts if part.task.home is not None]
        if at_home:
            homes = [part.home for part in at_home if part.home is not None]
            torch._foreach_copy_(homes, [part.bytes_in(filled) for part in at_home], non_blocking=True)
        for part in extent.parts:
            if part.task.home is None:
                yield from self._gather(part, part.bytes_in(filled))
        copied = self._copied[slot]
        copied.record(self._stream)
        reader.release(slot, copied)
        if at_home:
            yield partial(self._arrive, at_home, copied)

    def _arrive(self, at_home: Sequence[ExtentSlice], copied: torch.cuda.Event) -> None:
        with torch.cuda.device(self._device):
            self._default.wait_event(copied)  # work on tensors that are complete is done there
            for part in at_home:
                part.task.arrived(part.count)

    def _gather(self, part: ExtentSlice, values: torch.Tensor) -> Iterator[_Step]:
        """Copy a piece's bytes into its tensor's staging buffer, and the rest into the next."""
        task = part.task
        itemsize = task.tensor.dtype.itemsize
        room = PLACE_BYTES // itemsize // task.values_per_scale * task.values_per_scale * itemsize
        begin, copied = part.begin * itemsize, 0
        while copied < part.nbytes:
            place = self._place or self._next_place()
            if place is None:
                return
            self._place = place
            count = min(part.nbytes - copied, room - place.gathered)
            target = place.memory[place.gathered : place.gathered + count]
            target.copy_(values[copied : copied + count], non_blocking=True)
            place.gathered += count
            copied += count
            if place.gathered == room or begin + copied == task.tensor.nbytes:
                place.copied.record(self._stream)
                self._place = None
                yield partial(self._hand_over, task, place, (begin + copied - place.gathered) // itemsize)
                yield None

    def _next_place(self) -> _Place | None:
        place = self._free.get()
        if place is None:
            self.stop()  # the next call shall not wait either
        else:
            self._stream.wait_event(place.worked)
        return place

    def _hand_over(self, task: ReadTask, place: _Place, begin: int) -> None:
        with torch.cuda.device(self._device):  # the caller's current GPU may be another
            self._default.wait_event(place.copied)
            values = place.memory[: place.gathered].view(task.tensor.dtype)
            task.take(values, begin)
            task.arrived(len(values))
            place.worked.record(self._default)
        place.gathered = 0
        self._free.put(place)

    def stop(self) -> None:
        self._free.put(None)

    def __exit__(self, kind: object = None, *raised: object) -> None:
        self._default.wait_stream(self._stream)
        if kind is not None:
            self._stream.synchronize()  # it may still read slots, and write tensors that are freed now
        self.is_done = True


class _Place:
    """A staging buffer on a GPU, which collects a tensor's bytes."""

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.empty(PLACE_BYTES, dtype=torch.uint8, device=device)
        self.gathered = 0
        self.copied, self.worked = _event(), _event()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _transfer(device: torch.device) -> Transfer:
    return CudaTransfer(device) if device.type == "cuda" else CpuTransfer()


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
