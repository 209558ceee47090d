"""The thread that reads into slots: its errors, its end, and processes that are forked."""

import gc
import os
import threading
import time
import weakref
from concurrent.futures import thread as pools

import torch
from comparisons import equal
from forks import exit_status, needs_fork
from streaming import (
    groups_of,
    linears,
    pairs,
    resident,
    stream_from_disk,
    tokens,
)
from torch import nn

from bigload.offload.background import BackgroundRead, BackgroundReader
from bigload.offload.engine import Engine
from bigload.offload.files import FileGroup


def brought(engine):
    """Bring each leaf's weight in its turn, and copy it there."""
    copies = []
    for leaf in (leaf for group in engine.groups for leaf in group.leaves):
        with engine.materialize(leaf.module):
            copies.append(leaf.module.weight.clone())
    return copies


def assert_all_equal(tensors, others):
    assert all(equal(one, other) for one, other in zip(tensors, others, strict=True))


@needs_fork
def test_process_that_is_forked_while_its_parent_reads_reads_for_itself(tmp_path, monkeypatch):
    cpu, parent, is_reading, gate = torch.device("cpu"), os.getpid(), threading.Event(), threading.Event()
    model = pairs(nn.Linear).requires_grad_(False)
    expected = [layer.weight.clone() for pair in model for layer in pair]
    engine = Engine(model, list(groups_of(model, cpu, tmp_path)), cpu)
    brought(engine)
    engine.pool.copier.finish()
    own = FileGroup.read_into

    def read_into(*args):
        if os.getpid() == parent:
            is_reading.set()
            gate.wait()
        own(*args)

    monkeypatch.setattr(FileGroup, "read_into", read_into)
    model[0](torch.randn(3, 64))  # what comes after it is being read for ever, so far
    assert is_reading.wait(60)
    try:
        assert exit_status(lambda: assert_all_equal(brought(engine), expected)) == 0
    finally:
        gate.set()


@needs_fork
def test_forked_process_reads_for_itself(tmp_path):
    cpu = torch.device("cpu")
    model = pairs(nn.Linear).requires_grad_(False)
    expected = [layer.weight.clone() for pair in model for layer in pair]
    engine = Engine(model, list(groups_of(model, cpu, tmp_path)), cpu)
    brought(engine)
    engine.pool.copier.finish()
    assert exit_status(lambda: assert_all_equal(brought(engine), expected)) == 0


def test_finish_waits_for_all_and_nothing_of_it_is_held():
    done, begun = [], BackgroundReader.start(lambda: None)
    memories = [torch.zeros(4) for _ in range(3)]
    held = [weakref.ref(memory) for memory in memories]
    while memories:
        memory = memories.pop()
        begun.queue.put(BackgroundRead(lambda: (time.sleep(0.02), done.append(1)), memory))
    del memory
    begun.finish()
    assert done == [1, 1, 1]
    assert not any(memory() is not None for memory in held)
    begun.queue.put(None)


def test_error_of_a_landing_is_its_waiters():
    def fail():
        raise ValueError("injected")

    begun, pending = BackgroundReader.start(lambda: None), BackgroundRead(fail)
    begun.queue.put(pending)
    for _ in range(2):
        pending.wait()
        assert isinstance(pending.error, ValueError)
    begun.queue.put(None)


def readers():
    return {thread for thread in threading.enumerate() if thread.name == "bigload-reader"}


def test_reader_thread_ends_with_its_engine(device, tmp_path):
    before = readers()
    model = resident("fp32", device)
    engine = stream_from_disk(model, device, tmp_path)
    model(tokens(device))
    (reader,) = readers() - before
    engine.remove()
    reader.join(60)
    assert not reader.is_alive()


def test_engine_that_the_collector_finds_ends_without_taking_a_lock(device, tmp_path):
    """The collector may run in a thread that holds any lock: those of Python's pools, for instance."""
    before = readers()
    model = resident("fp32", device)
    engine = weakref.ref(stream_from_disk(model, device, tmp_path))
    model(tokens(device))
    (reader,) = readers() - before
    gc.collect()  # what others have left
    del model
    with pools._global_shutdown_lock:
        gc.collect()
    assert engine() is None
    reader.join(60)
    assert not reader.is_alive()


def test_model_can_be_let_go_of_while_its_files_are_read(device, tmp_path, monkeypatch):

    gate, own = threading.Event(), FileGroup.read_into
    monkeypatch.setattr(FileGroup, "read_into", lambda *args: (gate.wait(60), own(*args)))
    before = readers()
    model = resident("nf4", device)
    engine = weakref.ref(stream_from_disk(model, device, tmp_path))
    linears(model, "transformer.h.2.")[-1].module.register_forward_pre_hook(lambda *_: gate.clear())
    gate.set()
    model(tokens(device))
    (reader,) = readers() - before
    del model
    gc.collect()
    assert engine() is None
    gate.set()
    reader.join(60)
    assert not reader.is_alive()


def test_model_that_is_let_go_of_takes_its_engine_thread_and_files_with_it(device, tmp_path):

    before = readers()
    for _ in range(3):
        model = resident("nf4", device)
        engine = weakref.ref(stream_from_disk(model, device, tmp_path))
        model(tokens(device))
        del model
        gc.collect()
        assert engine() is None
    for reader in readers() - before:
        reader.join(60)
        assert not reader.is_alive()
