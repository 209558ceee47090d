"""The timeline of a load: what waited for files, what was copied, what was quantized, and when."""

import pytest
import torch

from bigload.io import timeline as module
from bigload.io.timeline import Span, Timeline

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Clock:
    """Stands for `time`: goes on only when it is told to, however busy the machine is."""

    now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


class Event:
    """Stands for an event of CUDA that happens at a value of the clock."""

    def __init__(self, at=None):
        self.at = at

    def record(self, stream):
        assert stream == "default"
        self.at = module.time.perf_counter()

    def synchronize(self):
        assert self.at is not None

    def elapsed_time(self, later):
        return 1000 * (later.at - self.at)


def test_what_is_added_is_counted_from_the_beginning(clock):
    line = Timeline(clock.now - 5)
    line.add("read", CPU, clock.now - 4)
    line.add("quantize", CPU, clock.now - 5)
    line.add("read", CPU, clock.now - 1e-6)  # too short
    first, second = line.spans()
    assert (first.stage, second.stage) == ("quantize", "read")
    assert (first.begin_s, first.end_s, second.begin_s, second.end_s) == (0, 5, 1, 5)
    clock.now += 1
    assert line.elapsed_s == 6
    assert Timeline().elapsed_s == 0


def test_copies_and_work_on_a_gpu_are_timed_by_the_events_that_order_them(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "default")
    monkeypatch.setattr(module, "timed_event", Event)
    begun = clock.now
    line = Timeline(begun)
    line.add_copy(GPU, begun + 1, Event(begun + 3))
    line.add_copy(GPU, begun + 2, Event(begun + 4))  # waits for the first copy
    line.add_work(GPU, Event(begun + 4), Event(begun + 6))
    line.add_work(GPU, Event(begun + 5), Event(begun + 7))  # waits for the first work
    line.add_work(GPU, Event(begun + 8), Event(begun + 9))  # waits for its copy
    clock.now = begun + 10
    line.end()
    clock.now = begun + 20  # whenever they are asked for
    found = [(span.stage, span.begin_s, span.end_s) for span in line.spans()]
    expected = [("copy", 1, 3), ("copy", 3, 4), ("quantize", 4, 6), ("quantize", 6, 7), ("quantize", 8, 9)]
    assert [stage for stage, *_ in found] == [stage for stage, *_ in expected]
    for (_, *times), (_, *wanted) in zip(found, expected, strict=True):
        assert times == pytest.approx(wanted)
    assert all(span.device == GPU for span in line.spans())


def test_spans_are_plain_values():
    assert Span("read", CPU, 0.0, 1.0) == Span("read", CPU, 0.0, 1.0)
