"""How fast the host's memory and the link to a GPU are."""

from types import SimpleNamespace

from bigload.hardware.bandwidth import host_gb_per_s


def test_rate_of_the_host_is_the_best_of_five(monkeypatch):
    assert 0 < host_gb_per_s() < 5000
    clock = iter([0, 1, 1, 4, 4, 4.5, 5, 7, 7, 8])
    monkeypatch.setattr("bigload.hardware.bandwidth.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert host_gb_per_s() == 2**26 / 0.5 / 1e9
