"""Ctrl-C at any moment of a load, a save or a conversion: all is as it came, or complete, and a second try is right."""

import gc
import importlib
import random
import signal
import sys
import time

import pytest
import torch
from checkpoints import empty, save_checkpoint
from injected_faults import MORE_LOADS, CtrlC, CtrlCAtPoint, anatomy, at_each_point, build, tries_of
from torch import nn

from bigload import load_and_quantize_model, save_quantized_model
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


class Many(nn.Module):
    """Of small tensors, as many as a large mixture has of large ones."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(16, 16) for name in "abc"} | {"norm": nn.LayerNorm(16)})
            for _ in range(blocks)
        )


def most_calls_between_points(blocks, source, folder):
    """Return the most functions that a load calls between two looks for Ctrl-C, and how many tensors it loads."""
    model, mode = Many(blocks), "nf4"
    if source == "safetensors":
        save_checkpoint(model, folder)
    elif source == "pickle":
        folder.mkdir()
        torch.save(model.state_dict(), folder / "model.bin")
    else:
        save_quantized_model(load_and_quantize_model(model, "nf4-dq", device_map="cpu"), folder)
        mode = None
    model, calls = empty(Many, blocks), [0]

    def count(frame, event, argument):
        calls[-1] += event in ("call", "c_call")

    with at_each_point(lambda: calls.append(0)):
        sys.setprofile(count)
        try:
            load_and_quantize_model(
                model, mode, folder, device_map={"": "cpu", "blocks.0": "disk"}, offload_folder=folder
            )
        finally:
            sys.setprofile(None)
    return max(calls), len(model.state_dict())


@pytest.mark.parametrize("source", ["safetensors", "pickle", "quantized"])
def test_between_two_points_little_is_done_for_each_tensor(source, tmp_path):
    """Planning 6,500 tensors took up to 0.7 s without a look for Ctrl-C, 45 to 140 calls for each; now it takes 4 to 9.

    Those are of short loops that have no points, and of one of torch's over what a pickle holds.
    """
    most_calls_between_points(2, source, tmp_path / "first")  # imports, and what is asked once
    few, tensors = most_calls_between_points(20, source, tmp_path / "few")
    many, more_tensors = most_calls_between_points(100, source, tmp_path / "many")
    assert (many - few) / (more_tensors - tensors) < 30


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
