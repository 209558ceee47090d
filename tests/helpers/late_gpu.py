"""A GPU for tests without one: its streams are threads that do what is asked of them in order, and late.

What is copied out of memory that was filled again too early, or into memory that is still worked on, shows.
"""

import ctypes
import functools
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import torch

HEADER = Path(__file__).parent.parent / "io" / "native" / "fake_device.h"
COMPILER = shutil.which("gcc")


@functools.cache
def _library():
    folder = Path(tempfile.mkdtemp())
    path = folder / "late.so"
    command = [COMPILER, "-std=gnu11", "-O1", "-shared", "-fPIC", "-x", "c", str(HEADER), "-o", str(path), "-lpthread"]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(path))
    shutil.rmtree(folder)
    library.fake_begin.restype = ctypes.c_void_p
    for name in ("fake_end", "fake_event_query", "fake_event_destroy"):
        getattr(library, name).argtypes = (ctypes.c_void_p,)
    library.fake_event_record.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    library.fake_stream_wait.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint)
    library.fake_copy.argtypes = (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    return library


class Event:
    def __init__(self):
        self.handle = ctypes.c_void_p()
        _library().fake_event_create(ctypes.byref(self.handle), 0)

    def record(self, stream):
        _library().fake_event_record(self.handle, stream.handle)

    def query(self):
        return not _library().fake_event_query(self.handle)

    def synchronize(self):
        while not self.query():
            time.sleep(1e-5)

    def fields(self):
        """How often it was asked to be recorded, and how often it was."""
        return ctypes.cast(self.handle, ctypes.POINTER(ctypes.c_int64))

    def elapsed_time(self, other):
        return 0.0


class Stream:
    def __init__(self, late_us):
        self.handle = self.cuda_stream = _library().fake_begin(late_us)

    def wait_event(self, event):
        _library().fake_stream_wait(self.handle, event.handle, 0)

    def wait_stream(self, other):
        event = Event()
        event.record(other)
        self.wait_event(event)

    def synchronize(self):
        event = Event()
        event.record(self)
        event.synchronize()

    def copy(self, target, source):
        """Copy bytes between tensors, in the order of the stream."""
        nbytes = source.numel() * source.itemsize
        code = _library().fake_copy(target.data_ptr(), source.data_ptr(), nbytes, self.handle)
        if code:
            raise RuntimeError(f"error {code}")

    def end(self):
        _library().fake_end(self.handle)


class LateGpu:
    """The default stream and those that copy, of each device.

    Attributes:
        work: the default stream.
        memory: that was had there.
    """

    def __init__(self, late_us):
        self._late_us, self._streams, self.memory = late_us, [], []
        self._going_on = None
        self.work = self.stream()

    def stream(self):
        self._streams.append(Stream(self._late_us))
        if self._going_on is not None:
            self._streams[-1].wait_event(self._going_on)
        return self._streams[-1]

    def hang(self):
        """Do nothing any more on the streams that copy, until it goes on."""
        self._going_on = Event()
        self._going_on.fields()[0] = 1  # asked for, and never recorded

    def go_on(self):
        self._going_on.fields()[1] = 1

    def end(self):
        for stream in self._streams:
            stream.end()


# What `feed.c` is given of the device, in the order of its table.
FUNCTIONS = ("set_current", "copy", "event_create", "event_destroy", "event_record", "event_query", "stream_wait")


@pytest.fixture
def late_gpu(monkeypatch):
    """Put late streams in the place of a GPU's; tensors on "cpu" go there."""
    if COMPILER is None:
        pytest.skip("needs gcc")
    gpu = install(monkeypatch)
    yield gpu
    gpu.end()


def install(monkeypatch):
    """Put late streams in the place of a GPU's. Returns the GPU, which is to be ended."""
    from bigload.io import feed, native_feed, ring, threaded_feed, transfer

    gpu = LateGpu(late_us=100)
    addresses = [ctypes.cast(getattr(_library(), f"edge_{name}"), ctypes.c_void_p).value for name in FUNCTIONS]
    functions = native_feed._Functions(*addresses)

    def fields_of(lane):
        return ctypes.addressof(functions), None, lane.copies.handle, lane.work.handle

    for room in (feed, transfer):
        monkeypatch.setattr(room, "needs_ring", lambda device: True)
    # A GPU's memory that is freed is used again in the order of its default stream; the host's at once: it is kept.
    window = transfer._window
    monkeypatch.setattr(transfer, "_window", lambda *given: gpu.memory.append(window(*given)) or gpu.memory[-1])

    class Lane(feed.Lane):
        def __init__(self, device):
            self.device, self.copies, self.work = device, gpu.stream(), gpu.work

        def copy(self, targets, sources):
            for target, source in zip(targets, sources, strict=True):
                self.copies.copy(target, source)

    monkeypatch.setattr(feed, "Lane", Lane)
    monkeypatch.setattr(native_feed, "_fields_of", fields_of)
    monkeypatch.setattr(native_feed, "_name_of", lambda code: f"error {code}")
    monkeypatch.setattr(threaded_feed, "plain_event", Event)
    monkeypatch.setattr(transfer, "timed_event", Event)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: gpu.work)
    monkeypatch.setattr(ring, "pinned_memory", lambda nbytes, least=0: torch.empty(nbytes, dtype=torch.uint8))
    return gpu


def fail_copy(number):
    """Let the n-th copy from now on fail, as a GPU's may; -1: none."""
    library = _library()
    ctypes.c_int64.in_dll(library, "fake_copies").value = 0
    ctypes.c_int64.in_dll(library, "fake_copies_until_one_fails").value = number


def fail_function(name, call):
    """Let the n-th call from now on of a function that `feed.c` is given fail; 0: none."""
    library, which = _library(), FUNCTIONS.index(name)
    (ctypes.c_int64 * len(FUNCTIONS)).in_dll(library, "edge_calls")[which] = 0
    (ctypes.c_int64 * len(FUNCTIONS)).in_dll(library, "edge_fails_at")[which] = call - 1


def calls_of(name):
    """Return how often such a function was called since then."""
    return (ctypes.c_int64 * len(FUNCTIONS)).in_dll(_library(), "edge_calls")[FUNCTIONS.index(name)]
