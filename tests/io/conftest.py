"""What the tests of reading share."""

import pytest
import torch
from executors import EXECUTORS, read_by
from late_gpu import late_gpu  # noqa: F401
from resources import open_and_running

from bigload.io import native_feed, threaded_feed, transfer


@pytest.fixture
def nothing_left():
    """No file is open and no thread of Python's is running afterwards that was not before."""
    native_feed.library()  # what is loaded once for the whole process
    torch.zeros(1).view(torch.uint8).numpy()
    before = open_and_running()
    yield
    assert not open_and_running() - before


@pytest.fixture(params=EXECUTORS)
def executor(monkeypatch, request):
    """Read by `feed.c`, or by threads of Python's; gives the class that does."""
    return read_by(monkeypatch, request.param)


@pytest.fixture
def small_reads(monkeypatch):
    """Batches of 512 bytes, reads of 64, by four threads."""
    monkeypatch.setenv("BIGLOAD_RING_BYTES", "1KiB")
    monkeypatch.setenv("BIGLOAD_THREADS", "4")
    monkeypatch.setattr(transfer, "_BATCH_BYTES", 1024)
    for room in (native_feed, threaded_feed):
        monkeypatch.setattr(room, "_READ_BYTES", 64)


@pytest.fixture
def tiny(small_reads, executor):
    """The same, by each executor."""
    return executor


@pytest.fixture
def tiny_threads(monkeypatch, small_reads):
    """The same, always by threads of Python's, whose calls can be watched."""
    read_by(monkeypatch, "threads")
