"""Whether Triton's kernels run is found out once, but an error that passes is not the answer."""

import contextlib
import functools
import signal
from subprocess import CalledProcessError

import pytest
import torch

from bigload.checkpoint.scaled import values
from bigload.decoding.fused import trials
from bigload.hardware.triton_support import asks_again, runs_on
from bigload.quantization import expert_launches
from bigload.quantization.kernels import outliers

GPU = torch.device("cuda", 0)
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")


def caused_by(cause, error):
    """Return an error as raised while another was handled."""
    error.__context__ = cause
    return error


PASSING = [
    FULL,
    RuntimeError("Triton Error [CUDA]: out of memory"),
    MemoryError(),
    CalledProcessError(-signal.SIGINT, "gcc"),
    caused_by(CalledProcessError(-signal.SIGINT, "ptxas"), RuntimeError("`ptxas` failed with error code -2")),
]
LASTING = [
    RuntimeError("Failed to find C compiler"),
    CalledProcessError(1, "gcc"),
    caused_by(CalledProcessError(255, "ptxas"), RuntimeError("Internal Triton PTX codegen error")),
    OSError("libcuda.so cannot be found"),
]


@pytest.fixture
def with_triton(monkeypatch):
    """Triton, and GPUs, as far as `runs_on` looks; lists the current one."""
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


def failing_first(error, tried):
    """Return a trial that fails once."""

    def trial():
        tried.append(error)
        if len(tried) == 1:
            raise error

    return trial


def asking(trial, otherwise="all is slower"):
    return asks_again(functools.cache(lambda device: runs_on(device, trial, otherwise)))


def test_a_trial_runs_on_the_gpu(with_triton):
    seen = []
    assert runs_on(GPU, lambda: seen.extend(with_triton))
    assert seen == [GPU]
    assert not with_triton


@pytest.mark.parametrize("lacking", ["triton", "nvidia"])
def test_nothing_is_tried_without_triton_or_on_another_makers_gpu(lacking, with_triton, monkeypatch):
    if lacking == "triton":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    else:
        monkeypatch.setattr(torch.version, "hip", "6.0")
    assert not runs_on(GPU, pytest.fail)


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_after_an_error_that_passes_the_next_call_asks_again(error, with_triton, warned):
    tried = []
    asked = asking(failing_first(error, tried))
    assert [asked(GPU) for _ in range(4)] == [False, True, True, True]
    assert len(tried) == 2
    assert not warned()


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_another_error_is_the_answer_for_good_and_said_once(error, with_triton, warned):
    tried = []
    asked = asking(failing_first(error, tried))
    assert [asked(GPU) for _ in range(4)] == [False] * 4
    assert len(tried) == 1
    (message,) = warned()
    assert "all is slower" in message


def test_ctrl_c_in_a_trial_is_no_answer_either(with_triton):
    tried = []
    asked = asking(failing_first(KeyboardInterrupt(), tried))
    with pytest.raises(KeyboardInterrupt):
        asked(GPU)
    assert asked(GPU)


ASKED = [
    (expert_launches, "runs_kernels"),
    (outliers, "_runs_kernels"),
    (values, "runs_kernel"),
    (trials, "runs_kernels"),
]


@pytest.mark.parametrize(("module", "name"), ASKED, ids=lambda each: getattr(each, "__name__", each))
@pytest.mark.parametrize("where", ["before the trial", "in it"])
def test_each_that_asks_falls_back_while_the_gpu_is_full_and_then_runs(module, name, where, with_triton, monkeypatch):
    """What some of them allocate before the trial may find the GPU full as well."""
    full, tried, gpu = [True], [], torch.device("cuda", 5)  # not the GPU of another test: answers are kept

    def runs(device, trial, otherwise=""):
        tried.append(device)
        if full:
            raise FULL
        return True

    def zeros(*shape, **how):
        if full and where == "before the trial":
            raise FULL
        return torch.empty(*shape)

    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(expert_launches, "kernels", lambda: object())
    monkeypatch.setattr(module, "runs_on", runs)
    ask = getattr(module, name)
    try:
        assert not ask(gpu)
        full.clear()
        tried.clear()
        assert ask(gpu)
        assert ask(gpu)
        assert tried == [gpu]
    finally:
        ask.__wrapped__.cache_clear()


@pytest.mark.cuda
def test_gpu_that_is_full_is_asked_again():
    tried = []

    def trial():
        tried.append(GPU)
        torch.empty(2**50 if len(tried) == 1 else 1, device=GPU)

    asked = asking(trial)
    assert [asked(GPU) for _ in range(3)] == [False, True, True]
    assert len(tried) == 2
