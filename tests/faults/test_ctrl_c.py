"""Ctrl-C at any moment of a load, a save or a conversion: all is as it came, or complete, and a second try is right."""

import gc
import importlib
import random
import signal
import time

import pytest
import torch
from checkpoints import empty, save_checkpoint
from injected_faults import MORE_LOADS, CtrlC, CtrlCAtPoint, anatomy, build, tries_of

from bigload import load_and_quantize_model
from bigload.quantization import bnb

VERBS = ["load", *MORE_LOADS, "load to the disk", "save", "save over another", "quantize_checkpoint"]


@pytest.fixture
def drawn():
    """What draws the moments: the same each time, though not the same places, which depend on the machine."""
    return random.Random(24)


@pytest.fixture(autouse=True)
def ctrl_c_raises():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    for number, handler in handlers.items():
        signal.signal(number, handler)


def switches():
    """What holds for the whole process, and a load sets for itself."""
    return (
        gc.isenabled(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        signal.getsignal(signal.SIGINT),
    )


def tried(name, tries, faults):
    """Run tries, each with a fault; return what became of each."""
    before, outcomes = switches(), []
    for fault in faults:
        outcomes.append(tries.run_with(fault))
        assert switches() == before
    return outcomes


@pytest.mark.parametrize("name", VERBS)
def test_ctrl_c_at_random_moments(name, drawn):
    with tries_of(name) as tries:
        subject, begun = tries.job.subject(), time.monotonic()
        tries.job.act(subject)
        lasts = time.monotonic() - begun
        tries.job.clean(subject)
        tried(name, tries, [CtrlC(drawn.uniform(1e-5, lasts)) for _ in range(10)])


@pytest.mark.parametrize("name", VERBS)
def test_ctrl_c_at_points_where_it_is_raised(name, drawn):
    with tries_of(name) as tries:
        count = tries.calls_of(CtrlCAtPoint())
        assert count > 20
        outcomes = tried(name, tries, map(CtrlCAtPoint, [1, *drawn.sample(range(2, count + 1), 9)]))
        assert outcomes[0] == "refused"
        assert set(outcomes) <= {"refused", "not met"}  # waits have points, and are as long as the machine is busy


def test_ctrl_c_in_an_import_waits_for_its_end(tmp_path, monkeypatch):
    """bitsandbytes cannot be imported again in a process in which its import was interrupted."""
    folder, model, imported, own = save_checkpoint(build(), tmp_path), empty(build), [], importlib.import_module
    before = anatomy(model)

    def importing(name):
        signal.raise_signal(signal.SIGINT)
        imported.append(own(name))
        return imported[-1]

    bnb.library.cache_clear()
    monkeypatch.setattr(importlib, "import_module", importing)
    with pytest.raises(KeyboardInterrupt):
        load_and_quantize_model(model, "nf4", folder, device_map="cpu")
    monkeypatch.undo()
    assert bnb.library() in imported
    assert anatomy(model) == before
    load_and_quantize_model(model, "nf4", folder, device_map="cpu")
