"""How fast the host's memory and the link to a GPU are."""

from types import SimpleNamespace

import torch

from bigload.hardware import bandwidth
from bigload.hardware.bandwidth import host_gb_per_s, link_gb_per_s


def test_rate_of_the_host_is_the_best_of_five(monkeypatch):
    assert 0 < host_gb_per_s() < 5000
    clock = iter([0, 1, 1, 4, 4, 4.5, 5, 7, 7, 8])
    monkeypatch.setattr("bigload.hardware.bandwidth.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert host_gb_per_s() == 2**26 / 0.5 / 1e9


def test_rate_of_the_link_is_the_best_of_five_copies_that_have_ended(monkeypatch):
    """Between events that are recorded before and after each."""
    times_ms, copied = iter([5.0, 3.0, 4.0, 8.0, 9.0]), []
    own = torch.Tensor.copy_

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.at, self.has_ended = None, False

        def record(self, stream):
            assert stream == "the stream"
            self.at = len(copied)

        def synchronize(self):
            self.has_ended = True

        def elapsed_time(self, ended):
            assert ended.has_ended
            assert ended.at == self.at + 1
            return next(times_ms)

    monkeypatch.setattr(bandwidth, "_LINK_BYTES", 2**20)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the stream")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *given, **how: copied.append(own(*given, **how).nbytes))
    assert link_gb_per_s(torch.device("cpu")) == 2**20 / 3.0 / 1e6
    assert copied == [2**20] * 5
    assert not [*times_ms]
