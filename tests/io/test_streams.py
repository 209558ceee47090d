"""A load's streams of a GPU, with those of `lazy_gpu`, which do nothing before they are waited for."""

import ctypes

import lazy_gpu
import pytest
import torch

from bigload.io import native_feed
from bigload.io.feed import Lane
from bigload.io.timeline import plain_event, timed_event
from bigload.io.transfer import default_stream

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu():
    with lazy_gpu.installed() as gpu:
        yield gpu


def test_lane_copies_after_earlier_work_and_the_default_stream_goes_on_meanwhile(gpu, monkeypatch):
    work, found = gpu.stream(), []
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: work)
    lane, home, copied = Lane(CPU), torch.zeros(8, dtype=torch.uint8), plain_event()
    assert lane.work is work
    work.launch(lambda: found.append(home[0].item()))
    lane.begin()
    lane.copy([home[:4], home[4:]], [torch.full((4,), 5, dtype=torch.uint8)] * 2)
    copied.record(lane.copies)
    assert not home.any()
    assert not copied.query()
    work.wait_event(copied)
    work.finish()
    assert found == [0]
    assert home.tolist() == [5] * 8


def test_default_stream_works_after_the_callers_earlier_work_and_before_its_later(gpu, monkeypatch):
    default, caller, order = gpu.stream(), gpu.stream(), []
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: default)
    monkeypatch.setattr(torch.cuda, "device", gpu.launching_on_device)
    with gpu.launching_on(caller):
        caller.launch(lambda: order.append("earlier"))
        with default_stream(GPU):
            assert gpu.current() is default
            default.launch(lambda: order.append("loaded"))
        assert gpu.current() is caller
        caller.launch(lambda: order.append("later"))
    caller.finish()
    assert order == ["earlier", "loaded", "later"]


def test_only_events_that_spans_are_measured_with_take_the_time(gpu):
    assert timed_event().is_timed
    assert not plain_event().is_timed


def test_error_of_the_driver_is_named(monkeypatch):
    class Driver:
        def cuGetErrorName(self, code, name):  # noqa: N802
            name._obj.value = {700: b"CUDA_ERROR_ILLEGAL_ADDRESS"}.get(code)

    monkeypatch.setattr(native_feed, "_driver", Driver)
    assert native_feed._name_of(700) == "CUDA's driver says CUDA_ERROR_ILLEGAL_ADDRESS (700)"
    assert native_feed._name_of(1234) == "CUDA's driver says ? (1234)"


def test_part_in_c_is_given_the_functions_the_context_and_the_streams_of_a_gpu(gpu, monkeypatch):
    function = ctypes.CFUNCTYPE(None)(lambda: None)

    class Driver:
        def __getattr__(self, name):
            return function

        def cuCtxGetCurrent(self, context):  # noqa: N802
            context._obj.value = 1234 if gpu.device == CPU else 0

    monkeypatch.setattr(native_feed, "_driver", Driver)
    monkeypatch.setattr(native_feed, "_functions", native_feed._functions.__wrapped__)
    monkeypatch.setattr(torch.cuda, "device", gpu.launching_on_device)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: gpu.default)
    lane = Lane(CPU)
    address, context, copies, work = native_feed._fields_of(lane)
    assert address
    assert context == 1234
    assert (copies, work) == (lane.copies.cuda_stream, gpu.default.cuda_stream)
    functions = native_feed._functions()
    first = ctypes.cast(function, ctypes.c_void_p).value
    assert [getattr(functions, name) for name, _ in functions._fields_] == [first] * len(native_feed._DRIVER)
