"""Slots, and the copies into them: whichever is late, the other waits."""

import threading
import time

import pytest
import torch
from comparisons import equal
from streaming import (
    assert_at_rest,
    at_rest,
    groups_of,
    pairs,
    resident,
    stream,
    tokens,
    written,
)
from torch import nn

from bigload.offload.engine import Engine
from bigload.offload.files import FileGroup
from bigload.offload.on_device.slots import CudaSlotCopier, SlotCopier


def test_slot_is_not_let_go_of_while_it_is_read_into(tmp_path):
    cpu, done = torch.device("cpu"), []
    copier = SlotCopier(cpu)
    slot = copier.make_slot(64)
    slow = FileGroup(written({"a": torch.zeros(16)}, tmp_path / "slow"))
    slow.read_into = lambda memory: (time.sleep(0.1), done.append(1))
    copier.copy(slow, slot)
    copier.discard(slot)
    assert done
    copier.close()


def test_copies_wait_for_what_is_read_into_their_slot(tmp_path):
    """A mixed engine of one slot: what is read slowly must not land on what was copied after it."""
    cpu = torch.device("cpu")
    copier, gate = SlotCopier(cpu), threading.Event()
    slot = copier.make_slot(64)
    slow = FileGroup(written({"a": torch.zeros(16)}, tmp_path / "slow"))
    own = slow.read_into
    slow.read_into = lambda memory: (gate.wait(10), own(memory))  # to its end where nobody waits: too late
    copier.copy(slow, slot)
    wait = slot.pending.wait
    slot.pending.wait = lambda: (gate.set(), wait())
    copier.copy(at_rest({"a": torch.ones(16)}, cpu), slot)
    copier.finish()
    assert equal(slot.memory.view(torch.float32)[:16], torch.ones(16))


@pytest.mark.cuda
def test_copy_that_failed_is_waited_for_by_the_next_into_its_slot(tmp_path):
    """The kernels that read the slot are to be done before the copy that succeeds, too."""
    gpu = torch.device("cuda", 0)
    model = pairs(nn.Linear, device=gpu).requires_grad_(False)
    x = torch.randn(3, 64, device=gpu)
    expected, first = model(x), model[0](x)
    engine = Engine(model, list(groups_of(model, gpu, tmp_path)), gpu)
    assert equal(model(x), expected)
    torch.cuda.synchronize()
    file = tmp_path / "2"
    file.rename(tmp_path / "away")
    model[0](x)
    torch.cuda._sleep(int(3e7))  # what uses the first slot is late
    found = model[0](x)
    model[1](x)  # asks for the third group, in the slot of the first, in vain
    engine.pool.copier._background.finish()
    (tmp_path / "away").rename(file)
    model[2](x)
    assert equal(found, first)
    assert equal(model(x), expected)


def test_memory_that_could_not_be_pinned_passes_through_what_is(device, monkeypatch):
    """On the CPU nothing is pinned: there the reader is made to think so."""
    monkeypatch.setattr("bigload.hardware.pinned._pin", lambda *args: None)
    monkeypatch.setattr(SlotCopier, "_can_copy_directly", lambda self, store: False)
    expected, model = resident("nf4-dq", device), resident("nf4-dq", device)
    engine = stream(model, device)
    for _ in range(3):
        assert equal(model(tokens(device)), expected(tokens(device)))
    assert_at_rest(engine)
    assert engine.stats().demand_fetches == 1
    engine.remove()
    assert equal(model(tokens(device)), expected(tokens(device)))


def sleep(ms=20):
    torch.cuda._sleep(int(ms * 1.5e6))  # cycles


@pytest.mark.cuda
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("late", ["computing", "copying", "own stream"])
def test_whichever_is_late_the_other_waits(late, slots, monkeypatch):
    """Were a slot overwritten while it is read, or read before it is filled, the logits would differ."""
    gpu = torch.device("cuda", 0)
    expected, model = resident("nf4", gpu), resident("nf4", gpu)
    stream(model, gpu, slots)
    x = tokens(gpu)
    with torch.no_grad():
        wanted = expected(x)
        torch.cuda.synchronize()
        if late == "copying":
            own = CudaSlotCopier._copy

            def slow(self, source, slot):
                with torch.cuda.stream(self.stream):
                    sleep()
                own(self, source, slot)

            monkeypatch.setattr(CudaSlotCopier, "_copy", slow)
        else:
            for block in model.transformer["h"]:
                block.register_forward_pre_hook(lambda *_: sleep())
                block.attn.c_attn.register_forward_hook(lambda *_: sleep())
        for _ in range(2):
            with torch.cuda.stream(torch.cuda.Stream() if late == "own stream" else torch.cuda.current_stream()):
                found = model(x)
                torch.cuda.current_stream().synchronize()
            assert equal(found, wanted)


def test_copier_is_the_cpus_on_the_cpu(device):
    engine = stream(resident("fp32", device), device)
    assert (type(engine.pool.copier) is SlotCopier) == (device.type == "cpu")
