"""Whether Triton's kernels run is found out by a trial, on the GPU that is asked about."""

import contextlib

import pytest
import torch

from bigload.hardware.triton_support import runs_on

GPU = torch.device("cuda", 1)


@pytest.fixture
def current(monkeypatch):
    """Stand in for GPUs that have Triton; lists the current one."""
    devices = []

    @contextlib.contextmanager
    def device(one):
        devices.append(one)
        yield
        devices.pop()

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device", device)
    return devices


def test_a_trial_runs_on_the_gpu(current):
    seen = []
    assert runs_on(GPU, lambda: seen.extend(current))
    assert seen == [GPU]
    assert not current


@pytest.mark.parametrize("lacking", ["triton", "nvidia"])
def test_nothing_is_tried_without_triton_or_on_another_makers_gpu(lacking, current, monkeypatch):
    if lacking == "triton":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    else:
        monkeypatch.setattr(torch.version, "hip", "6.0")
    assert not runs_on(GPU, pytest.fail)


@pytest.mark.parametrize("otherwise", ["", "so that it takes longer"])
def test_what_follows_from_a_trial_that_fails_is_warned_of(otherwise, current, caplog):
    def broken():
        raise OSError("no C compiler")

    assert not runs_on(GPU, broken, otherwise)
    assert [record.getMessage() for record in caplog.records] == (
        ["Triton's kernels do not run on cuda:1, so that it takes longer: no C compiler"] if otherwise else []
    )
