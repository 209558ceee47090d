"""The timeline of a load: what waited for files, what was copied, what was quantized, and when."""

import time

import pytest
import torch

from bigload.io import timeline as module
from bigload.io.timeline import Span, Timeline

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Event:
    """Stands for an event of CUDA that happens at a value of `time.perf_counter`."""

    def __init__(self, at=None):
        self.at = at

    def record(self, stream):
        assert stream == "default"

    def synchronize(self):
        self.at = time.perf_counter()

    def elapsed_time(self, later):
        return 1000 * (later.at - self.at)


def test_what_is_added_is_counted_from_the_beginning():
    begun = time.perf_counter() - 5
    line = Timeline(begun)
    line.add("read", CPU, begun + 1)
    line.add("quantize", CPU, begun)
    line.add("read", CPU, time.perf_counter())  # too short
    first, second = line.spans()
    assert (first.stage, second.stage) == ("quantize", "read")
    assert (first.begin_s, second.begin_s) == pytest.approx((0, 1))
    assert first.end_s == pytest.approx(5, abs=0.1)


def test_copies_and_work_on_a_gpu_are_timed_by_the_events_that_order_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "default")
    monkeypatch.setattr(module, "timed_event", Event)
    begun = time.perf_counter() - 10
    line = Timeline(begun)
    clock = iter([begun + 1, begun + 2])
    with monkeypatch.context() as patched:
        patched.setattr(module.time, "perf_counter", lambda: next(clock))
        line.add_copy(GPU, Event(begun + 3))  # read at 1
        line.add_copy(GPU, Event(begun + 4))  # read at 2: waits for the first copy
    line.add_work(GPU, Event(begun + 4), Event(begun + 6))
    line.add_work(GPU, Event(begun + 5), Event(begun + 7))  # waits for the first work
    line.add_work(GPU, Event(begun + 8), Event(begun + 9))  # waits for its copy
    found = [(span.stage, span.begin_s, span.end_s) for span in line.spans()]
    expected = [("copy", 1, 3), ("copy", 3, 4), ("quantize", 4, 6), ("quantize", 6, 7), ("quantize", 8, 9)]
    assert [stage for stage, *_ in found] == [stage for stage, *_ in expected]
    for (_, *times), (_, *wanted) in zip(found, expected, strict=True):
        assert times == pytest.approx(wanted, abs=0.01)
    assert all(span.device == GPU for span in line.spans())


def test_spans_are_plain_values():
    assert Span("read", CPU, 0.0, 1.0) == Span("read", CPU, 0.0, 1.0)
