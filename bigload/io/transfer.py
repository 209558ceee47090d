"""The one edge to devices: what threads have read into a ring of slots goes where it belongs.

Onto a GPU it is copied on a stream of its own, by a thread of its own, into its home or into a small window on the
device, from where the default stream takes it. On the CPU it was read into its home, or stays in the slot until it has
been taken. A slot is filled again when the copy out of it is done, a place of the window when the default stream has
worked on it; nothing else holds the readers back, and no memory is queued without bound.
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

# Places on a GPU for what its default stream has yet to work on, and their size.
_WINDOW = 3
PLACE_BYTES = 48 * 2**20
WINDOW_BYTES = _WINDOW * PLACE_BYTES

# Slots that a GPU is copying from: one that it works on, and one that waits so that the link does not rest.
_COPIED = 2

# Bytes after which the caller's thread is woken up, if nothing waits for it: being woken up costs time, and two threads
# that are awake wait for each other's lock.
_BATCH_BYTES = 64 * 2**20

# What is left to do in the caller's thread; None where its end is waited for.
_Step = Callable[[], object] | None


def read_all(tasks: Sequence[ReadTask], *, on_bytes: Callable[[int], object] = lambda count: None) -> None:
    """Read tensors, each byte once, and bring them where they go.

    Homes must have been allocated, and what else is to be reused must have been freed, before this is called: the
    copies wait for what the default stream holds now.

    Args:
        tasks: in the order of reading.
        on_bytes: called with the count of bytes that have arrived since the last call.

    Raises:
        CheckpointError: a file cannot be read, or ended before a tensor did.
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
            # A second Ctrl-C stops the waiting for threads and copies: then the ring is theirs, and not kept.
            is_done = reader.is_done and (ahead is None or ahead.is_done)
            ring.is_quiet = is_done and all(transfer.is_done for transfer in transfers.values())


def _in_turns(extents: Sequence[Extent]) -> list[Extent]:
    """Let devices take turns, each in the order of its extents: each has a link of its own, and all are to be busy."""
    by_device: dict[torch.device, list[Extent]] = defaultdict(list)
    for extent in extents:
        by_device[extent.device].append(extent)
    rounds = itertools.zip_longest(*by_device.values())
    return [extent for turn in rounds for extent in turn if extent is not None]


def _steps(
    reader: Reader, transfers: dict[torch.device, Transfer], on_bytes: Callable[[int], object]
) -> Iterator[_Step]:
    """Bring extents on their way, one by one, and say what the caller's thread must do for each."""
    nbytes = 0
    for extent, slot, filled in reader:
        yield from transfers[extent.device].bring(extent, slot, filled, reader)
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
    """Steps that a thread of their own finds ahead of their use, so that copies wait for no work on what was copied."""

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
    """The way of extents to one device.

    Attributes:
        copies: it takes time, in which the caller's thread can do something else.
        is_done: nothing is under way any more.
    """

    copies = False
    is_done = True

    def bring(self, extent: Extent, slot: int | None, filled: torch.Tensor | None, reader: Reader) -> Iterator[_Step]:
        """Bring an extent on its way, and let its slot go when it may be filled again.

        Args:
            extent: what was read.
            slot: the number of the slot that it was read into, None where it was read into its homes.
            filled: its bytes there.
            reader: whose slot it is.

        Yields:
            What is to be done in the caller's thread.
        """
        raise NotImplementedError

    def stop(self) -> None:
        """Let nobody wait for what will not come."""

    def __exit__(self, *raised: object) -> None:
        pass


class CpuTransfer(Transfer):
    """The way to the CPU: what was read is there."""

    def bring(self, extent: Extent, slot: int | None, filled: torch.Tensor | None, reader: Reader) -> Iterator[_Step]:
        for part in extent.parts:
            if filled is not None:
                yield partial(_take, part, filled)
            yield partial(part.task.arrived, part.count)
        yield partial(reader.release, slot, None)
        yield None


def _take(part: ExtentSlice, filled: torch.Tensor) -> None:
    part.task.take(part.values_in(filled), part.begin)


class CudaTransfer(Transfer):
    """The way onto one GPU: copies on a stream of their own, into homes or into a window on the device.

    A place of the window gathers a tensor, or as much of it as it holds, before the default stream takes it: few large
    steps instead of many. Events order it all: a place is written after the default stream has worked on what was
    there, and worked on after it has been written.
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
        # Homes and window may have been another tensor's, which the default stream has yet to finish with.
        self._stream.wait_stream(self._default)
        return self

    def bring(self, extent: Extent, slot: int | None, filled: torch.Tensor | None, reader: Reader) -> Iterator[_Step]:
        assert slot is not None
        assert filled is not None
        torch.cuda.set_stream(self._stream)  # this thread's: a context would take ten times as long
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
            self._default.wait_event(copied)  # what is done with a tensor that is whole is done there
            for part in at_home:
                part.task.arrived(part.count)

    def _gather(self, part: ExtentSlice, values: torch.Tensor) -> Iterator[_Step]:
        """Copy a piece's bytes into the place of its tensor, and what does not fit there into the next."""
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
            self.stop()  # for whoever asks next
        else:
            self._stream.wait_event(place.worked)
        return place

    def _hand_over(self, task: ReadTask, place: _Place, begin: int) -> None:
        with torch.cuda.device(self._device):  # the caller's may be another
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
            self._stream.synchronize()  # it still reads slots, and writes what is freed now
        self.is_done = True


class _Place:
    """Memory on a GPU where a tensor is gathered."""

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
    """Work on a GPU's default stream, after all that the caller's stream holds and before all it will hold.

    bitsandbytes' 4-bit kernels run on the default stream whatever stream is current, so what they depend on must be
    ordered with it.
    """
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
            caller, default = torch.cuda.current_stream(), torch.cuda.default_stream()
            default.wait_stream(caller)
            stack.enter_context(torch.cuda.stream(default))
            stack.callback(caller.wait_stream, default)
        yield
