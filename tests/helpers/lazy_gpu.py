"""A GPU for tests without one, whose streams do nothing before someone waits for them: as late as a GPU may ever be.

Tensors on "cpu" are on it. What is copied on a stream is remembered, and done when the host, or another stream that is
done itself, waits for it. Outside of `torch.cuda.stream` all is computed at once, by the default stream: it is done
with what it waits for, and with nothing else. So what is read before it was copied shows, each time; and what is copied
over before it was read, where the reading is launched on a stream that is late.

`late_gpu` has streams that are threads, for the part in C.
"""

import contextlib
import gc
import itertools
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bigload.hardware.pinned import HostGroup
from bigload.offload.on_device import slot_pool
from bigload.offload.on_device.slots import CudaSlotCopier

ATEN = torch.ops.aten
COPIES = {ATEN.copy_.default, ATEN._foreach_copy_.default}
_PATIENCE_S = 20  # a thread that was let go of ends in less
_lock = threading.RLock()  # of all streams: one that is waited for may wait for others


class Stream:
    """Work in its order, of which the first so many pieces are done."""

    numbers = itertools.count(1)

    def __init__(self, is_late=True):
        self.cuda_stream, self.is_late = next(self.numbers), is_late
        self.work, self.done = [], 0

    def launch(self, work):
        self.work.append(work)

    def finish(self, until=None):
        """Do what was launched, or the first so many pieces of it."""
        with _lock, _disable_current_modes():  # which would launch it once more
            until = len(self.work) if until is None else until
            while self.done < until:
                self.done += 1
                self.work[self.done - 1]()

    synchronize = finish

    def wait_event(self, event):
        if event.stream is None:
            return
        self.launch(lambda stream=event.stream, place=event.place: stream.finish(place))
        if not self.is_late:
            self.finish()

    def wait_stream(self, other):
        event = Event()
        event.record(other)
        self.wait_event(event)


class Event:
    """A place in the work of a stream."""

    def __init__(self, enable_timing=False):
        self.stream, self.place, self.is_timed = None, 0, enable_timing

    def record(self, stream):
        self.stream, self.place = stream, len(stream.work)

    def query(self):
        return self.stream is None or self.stream.done >= self.place

    def synchronize(self):
        if self.stream is not None:
            self.stream.finish(self.place)

    def elapsed_time(self, later):
        """Return a millisecond for each piece of work between two places."""
        assert self.is_timed
        assert later.is_timed
        assert self.stream is later.stream
        return float(later.place - self.place)


class _Launched(TorchDispatchMode):
    """Copies that nobody waits for are launched on a stream; all else is done at once, by the host."""

    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in COPIES and ((len(args) == 3 and args[2]) or (kwargs or {}).get("non_blocking")):
            self.stream.launch(lambda: func(*args, **(kwargs or {})))
            return args[0] if func is ATEN.copy_.default else None
        return func(*args, **(kwargs or {}))


class LazyGpu:
    """Its streams.

    Attributes:
        default: the stream on which all is computed at once.
        stream: the class of the others.
        device: the current one, in `launching_on_device`.
        recorded: the memory and the streams that torch's allocator was told of.
    """

    def __init__(self):
        self.default = Stream(is_late=False)
        self.streams, self.recorded, self.device = [self.default], [], None
        self._own = threading.local()
        streams = self.streams

        class OwnStream(Stream):
            def __init__(self, device=None):
                super().__init__()
                streams.append(self)

        self.stream = OwnStream

    def current(self, device=None):
        """Return the stream on which this thread launches."""
        return getattr(self._own, "stream", self.default)

    @contextlib.contextmanager
    def launching_on(self, stream):
        before = self.current()
        stream = self._own.stream = before if stream is None else stream
        try:
            with _Launched(stream) if stream.is_late else contextlib.nullcontext():
                yield
        finally:
            self._own.stream = before

    @contextlib.contextmanager
    def launching_on_device(self, device):
        self.device = device
        yield
        self.device = None

    def finish(self, device=None):
        for stream in self.streams:
            stream.finish()


@contextlib.contextmanager
def installed(is_pinned=True):
    """Put lazy streams in the place of a GPU's, and tensors on "cpu" on it, in the `with` block.

    Args:
        is_pinned: whether host memory counts as pinned, which is copied without being waited for.
    """
    gpu, threads = LazyGpu(), set(threading.enumerate())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", gpu.stream)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "current_stream", gpu.current)
        patch.setattr(torch.cuda, "stream", gpu.launching_on)
        patch.setattr(torch.cuda, "synchronize", gpu.finish)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: gpu.current().cuda_stream, raising=False)
        patch.setattr(torch.Tensor, "record_stream", lambda memory, stream: gpu.recorded.append((memory, stream)))
        patch.setattr(torch.Tensor, "pin_memory", lambda memory: memory)
        patch.setattr(
            HostGroup, "is_pinned", property(lambda group: is_pinned, lambda group, pinned: None), raising=False
        )
        for room in ("files", "on_device.expert_copies"):
            patch.setattr(
                f"bigload.offload.{room}.pinned_memory", lambda nbytes: torch.empty(nbytes, dtype=torch.uint8)
            )
        patch.setattr(slot_pool, "copier_to", CudaSlotCopier)
        yield gpu
        gc.collect()  # what is let go of waits for its streams
        for thread in set(threading.enumerate()) - threads:
            if thread.name == "bigload-reader":  # it has waited for the streams when it ends
                thread.join(_PATIENCE_S)
                assert not thread.is_alive(), "a copier is neither closed nor let go of"
