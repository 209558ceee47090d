"""The ring of host memory: its knobs, its slots, memory that cannot be pinned, and what is kept between loads."""

import contextlib
import gc
import logging
import os
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from checkpoints import empty, save_checkpoint
from failures import raising
from hypothesis import given, settings
from hypothesis import strategies as st
from models import GPT
from resources import open_and_running

import bigload.io.ring as room
from bigload import ConfigError, load_and_quantize_model, release_buffers
from bigload.io.ring import Ring, as_bytes, pin_ahead, reader_threads, ring_bytes, slot_bytes, take_ring

GPU = torch.device("cuda", 0)
EMPTY = torch.empty


@pytest.fixture(autouse=True)
def small_and_released(monkeypatch):
    """Rings of 4 KiB, and none from or for another test."""
    release_buffers()
    monkeypatch.setenv("BIGLOAD_RING_BYTES", "4KiB")
    yield
    release_buffers()


@pytest.fixture
def pinning(monkeypatch):
    """Pinned memory without a GPU: it is only written down, by its size. More than `most` of it there is not."""

    class Pinning:
        sizes, most = [], 2**40

        def empty(self, *args, pin_memory=False, **kwargs):
            if pin_memory:
                self.sizes.append(args[0])
                if args[0] > self.most:
                    raise RuntimeError("CUDA error: out of memory")
            return EMPTY(*args, **kwargs)

    watched = Pinning()
    watched.sizes = []
    monkeypatch.setattr(torch, "empty", watched.empty)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    return watched


@pytest.fixture
def gpu():
    return GPU


# Knobs


@pytest.mark.parametrize(("given", "threads"), [("1", 1), ("2", 2), ("012", 12), ("64", 64)])
def test_threads_are_as_many_as_asked(monkeypatch, given, threads):
    monkeypatch.setenv("BIGLOAD_THREADS", given)
    assert reader_threads() == threads


@pytest.mark.parametrize("given", ["0", "-1", "abc", "", " ", "1.5", "2 threads", "²", "0x4", "+3"])
def test_what_is_no_number_of_threads_is_refused_as_it_was_written(monkeypatch, given):
    monkeypatch.setenv("BIGLOAD_THREADS", given)
    with pytest.raises(ConfigError) as raised:
        reader_threads()
    assert "BIGLOAD_THREADS" in str(raised.value)
    assert repr(given) in str(raised.value)


@pytest.mark.parametrize("cores", [1, 2, 5, 12, 64])
def test_threads_are_by_default_those_of_the_cores_it_may_use_within_reason(monkeypatch, cores):
    monkeypatch.delenv("BIGLOAD_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert 2 <= reader_threads() <= max(2, cores)
    assert reader_threads() <= 12
    assert reader_threads() <= reader_threads(gpus=4) <= 48


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ("1024", 2**10),
        ("1KiB", 2**10),
        ("1.5KiB", 1536),
        ("2KB", 2000),
        ("1 MiB", 2**20),
        (" 3 mib ", 3 * 2**20),
        ("1GB", 10**9),
        ("4GiB", 2**32),
    ],
)
def test_ring_is_as_large_as_asked(monkeypatch, given, size):
    monkeypatch.setenv("BIGLOAD_RING_BYTES", given)
    assert ring_bytes() == size


@pytest.mark.parametrize(
    "given", ["0", "1", "1023", "1KB", "0.5KiB", "abc", "", "-1", "-1KiB", "1Kb", "nan", "9" * 5000]
)
def test_what_is_no_size_of_a_ring_is_refused_as_it_was_written(monkeypatch, given):
    monkeypatch.setenv("BIGLOAD_RING_BYTES", given)
    with pytest.raises(ConfigError) as raised:
        ring_bytes()
    assert "BIGLOAD_RING_BYTES" in str(raised.value)
    assert repr(given) in str(raised.value)


@pytest.mark.parametrize("knob", ["BIGLOAD_RING_BYTES", "BIGLOAD_THREADS"])
def test_bad_knob_stops_a_load_before_the_model_is_touched(tmp_path, monkeypatch, knob):
    save_checkpoint(GPT(), tmp_path)
    model = empty(GPT)
    monkeypatch.setenv(knob, "0")
    with pytest.raises(ConfigError, match=f"{knob} is '0'"):
        load_and_quantize_model(model, "nf4", tmp_path, device_map="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())
    monkeypatch.delenv(knob)
    load_and_quantize_model(model, "nf4", tmp_path, device_map="cpu")


# Slots


@settings(max_examples=100, deadline=None)
@given(st.integers(2**10, 2**34))
def test_a_ring_of_any_size_has_two_slots_at_least_each_a_power_of_two(size):
    with mock.patch.dict(os.environ, {"BIGLOAD_RING_BYTES": str(size)}):
        slot = slot_bytes()
    assert slot & (slot - 1) == 0
    assert slot >= 512
    assert 2 * slot <= size


@pytest.mark.parametrize("size", ["1KiB", "1025", "3000", "4KiB", "1MiB", "3MB"])
def test_slots_are_apart_within_the_memory_that_was_asked_for(monkeypatch, pinning, size):
    monkeypatch.setenv("BIGLOAD_RING_BYTES", size)
    ring = Ring(ring_bytes())
    assert len(ring.slots) == ring.count >= 2
    assert ring.count * ring.slot_bytes <= ring_bytes()
    for number, slot in enumerate(ring.slots):
        as_bytes(slot)[:] = bytes([number % 256]) * ring.slot_bytes
    for number, slot in enumerate(ring.slots):
        assert slot.dtype == torch.uint8
        assert slot.data_ptr() % 16 == 0
        assert torch.equal(slot, torch.full((ring.slot_bytes,), number % 256, dtype=torch.uint8))


def test_a_ring_has_slots_of_its_own_size_whatever_the_knob_says_meanwhile(monkeypatch, pinning):
    """It is pinned in a thread: what was asked for counts, not what the variable holds by then."""
    monkeypatch.setenv("BIGLOAD_RING_BYTES", "1GiB")
    ring = Ring(4096)
    assert ring.count >= 2
    assert ring.count * ring.slot_bytes <= 4096


# Memory that cannot be pinned


def test_where_not_all_can_be_pinned_half_of_it_is_and_so_on(pinning, logged, monkeypatch):
    monkeypatch.setattr(room, "SLOT_BYTES", 1024)
    monkeypatch.setenv("BIGLOAD_RING_BYTES", "16KiB")
    pinning.most = 4096
    ring = Ring(2**14)
    assert pinning.sizes == [2**14, 2**13, 2**12]
    assert ring.count * ring.slot_bytes <= 4096
    assert ring.count >= 2
    assert logged.records == []


def test_where_none_can_be_pinned_one_warning_says_so_and_loads_go_on(pinning, logged, monkeypatch):
    monkeypatch.setattr("bigload.hardware.pinned._has_warned", False)
    pinning.most = 0
    with logged.at_level(logging.WARNING):
        for _ in range(3):
            with take_ring() as ring:
                assert ring.count >= 2
                assert ring.count * ring.slot_bytes <= 4096
    assert min(pinning.sizes) >= 2 * ring.slot_bytes
    assert len(pinning.sizes) == len(set(pinning.sizes))
    assert [record.levelname for record in logged.records] == ["WARNING"]
    assert "pinned" in logged.text


# Kept between loads


def test_pinned_ring_is_lent_again(pinning):
    with take_ring() as first:
        pass
    with take_ring() as second:
        assert second is first
    assert len(pinning.sizes) == 1


def test_ring_of_a_load_that_failed_is_lent_again(pinning):
    with pytest.raises(KeyboardInterrupt), take_ring() as first:
        raise KeyboardInterrupt
    with take_ring() as second:
        assert second is first


@pytest.mark.parametrize("before", [0, 1])
def test_loads_at_once_have_rings_of_their_own_of_which_one_is_kept(pinning, before):
    for _ in range(before):
        with take_ring():
            pass
    with take_ring() as first, take_ring() as second:
        assert first is not second
        assert first.slots[0].data_ptr() != second.slots[0].data_ptr()
        refs = [weakref.ref(first), weakref.ref(second)]
    del first, second
    gc.collect()
    assert sum(ref() is not None for ref in refs) == 1


def test_ring_of_another_size_is_not_lent(pinning, monkeypatch):
    with take_ring():
        pass
    monkeypatch.setenv("BIGLOAD_RING_BYTES", "8KiB")
    with take_ring() as ring:
        assert ring.count * ring.slot_bytes == 8192
    assert pinning.sizes == [4096, 8192]


def test_loads_onto_the_cpu_neither_pin_nor_take_what_is_kept(pinning, tmp_path, monkeypatch):
    save_checkpoint(GPT(), tmp_path)
    monkeypatch.setattr(room, "take_ring", raising(AssertionError("taken")))
    monkeypatch.setattr("bigload.io.transfer.take_ring", raising(AssertionError("taken")))
    load_and_quantize_model(empty(GPT), "nf4", tmp_path, device_map="cpu")
    assert pinning.sizes == []


def test_release_frees_what_is_kept(pinning):
    with take_ring() as ring:
        seen = weakref.ref(ring)
    del ring
    release_buffers()
    gc.collect()
    assert seen() is None
    release_buffers()  # nothing there: nothing to do
    with take_ring():
        pass
    assert len(pinning.sizes) == 2


def test_release_gives_back_what_torch_keeps_of_pinned_memory(monkeypatch):
    released = []
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: released.append(1), raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    release_buffers()  # which makes no context on a GPU
    assert not released
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    release_buffers()
    assert released
    monkeypatch.delattr(torch._C, "_host_emptyCache")
    release_buffers()  # of an older torch


def test_release_leaves_a_ring_that_is_lent(pinning):
    with take_ring() as ring:
        release_buffers()
        as_bytes(ring.slots[0])[:] = bytes(ring.slot_bytes)
        assert ring.slots[0].sum() == 0


# Pinned ahead


def test_ring_is_pinned_ahead_once(pinning):
    for _ in range(3):
        pin_ahead(GPU)
    with take_ring():
        pin_ahead(GPU)
    pin_ahead(GPU)
    with take_ring():
        pass
    # The second is for a load that comes while the first ring is lent.
    assert len(pinning.sizes) <= 2


def test_pinning_ahead_that_fails_is_left_to_the_load(pinning, monkeypatch, logged):
    def no_gpu(device):
        raise RuntimeError("no such GPU")

    with monkeypatch.context() as patch, logged.at_level("DEBUG", "bigload"):
        patch.setattr(torch.cuda, "device", no_gpu)
        pin_ahead(GPU)
        with take_ring() as ring:
            assert ring.count >= 2
    assert "pinning ahead failed: no such GPU" in logged.text
    assert len(pinning.sizes) == 1


def test_nothing_is_pinned_ahead_where_a_ring_is_kept(pinning):
    with take_ring() as kept:
        pass
    pin_ahead(GPU)
    with take_ring() as ring:
        assert ring is kept
    assert len(pinning.sizes) == 1


def test_kept_ring_of_another_size_is_freed_before_one_is_pinned_ahead(pinning, monkeypatch):
    with take_ring() as ring:
        seen = weakref.ref(ring)
    del ring
    monkeypatch.setenv("BIGLOAD_RING_BYTES", "8KiB")
    pin_ahead(GPU)
    with take_ring() as ring:
        assert ring.count * ring.slot_bytes == 8192
    gc.collect()
    assert seen() is None
    assert pinning.sizes == [4096, 8192]


@pytest.fixture
def held(monkeypatch, pinning):
    """Pinning that takes until the test says go."""
    begun, go = threading.Event(), threading.Event()
    empty = torch.empty

    def waiting(*args, pin_memory=False, **kwargs):
        if pin_memory:
            begun.set()
            assert go.wait(60)
        return empty(*args, pin_memory=pin_memory, **kwargs)

    monkeypatch.setattr(torch, "empty", waiting)
    return begun, go


def test_load_waits_for_the_ring_that_is_being_pinned(pinning, held):
    begun, go = held
    pin_ahead(GPU)
    assert begun.wait(60)
    with ThreadPoolExecutor(1) as pool:

        def load():
            with take_ring() as ring:
                return ring.count

        count = pool.submit(load)
        time.sleep(0.05)
        assert not count.done()
        go.set()
        assert count.result(60) >= 2
    assert len(pinning.sizes) == 1


def test_release_while_a_ring_is_being_pinned_frees_it_too(pinning, held):
    begun, go = held
    running = open_and_running()
    pin_ahead(GPU)
    assert begun.wait(60)
    with ThreadPoolExecutor(1) as pool:
        released = pool.submit(release_buffers)
        time.sleep(0.05)
        assert not released.done()
        go.set()
        released.result(60)
    assert not open_and_running() - running
    with take_ring():
        pass
    assert len(pinning.sizes) == 2


def test_knob_that_is_turned_while_a_ring_is_pinned_ends_in_a_ring_that_works(pinning, held, monkeypatch):
    begun, go = held
    pin_ahead(GPU)
    assert begun.wait(60)
    monkeypatch.setenv("BIGLOAD_RING_BYTES", "16KiB")
    go.set()
    with take_ring() as ring:
        assert ring.count >= 2
        assert ring.count * ring.slot_bytes == 2**14


def test_any_order_of_taking_pinning_ahead_and_releasing_in_threads_ends(pinning):
    def work(number):
        for step in range(20):
            if (number + step) % 3 == 0:
                pin_ahead(GPU)
            elif (number + step) % 7 == 0:
                release_buffers()
            with take_ring() as ring:
                mark = bytes([number]) * ring.slot_bytes
                buffers = [as_bytes(slot) for slot in ring.slots]
                for buffer in buffers:
                    buffer[:] = mark
                time.sleep(0.001)
                assert all(buffer == mark for buffer in buffers)  # lent to nobody else

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    release_buffers()
    pinned = len(pinning.sizes)
    with take_ring():
        assert len(pinning.sizes) == pinned + 1  # none was kept


# On a GPU


def pinned_bytes():
    """Host memory that torch holds pinned, in use or not."""
    return torch.cuda.host_memory_stats()["allocated_bytes.current"]


@pytest.mark.cuda
def test_ring_is_really_pinned_and_its_slots_too(gpu):
    pin_ahead(gpu)
    with take_ring() as ring:
        assert all(slot.is_pinned() for slot in ring.slots)


@pytest.mark.cuda
def test_pinned_ahead_twice_and_loaded_twice_there_is_one_ring(gpu, tmp_path):
    save_checkpoint(GPT(), tmp_path)
    pin_ahead(gpu)
    pin_ahead(gpu)
    with take_ring() as first:
        pass
    for _ in range(2):
        load_and_quantize_model(empty(GPT), "nf4", tmp_path, device_map=0)
        with take_ring() as ring:
            assert ring is first


@pytest.mark.cuda
def test_release_gives_the_system_its_memory_back(gpu, monkeypatch):
    if not hasattr(torch.cuda, "host_memory_stats") or not hasattr(torch._C, "_host_emptyCache"):
        pytest.skip("this torch neither counts nor frees pinned memory")
    torch.zeros(1, device=gpu)
    monkeypatch.setenv("BIGLOAD_RING_BYTES", "64MiB")
    release_buffers()
    before = pinned_bytes()
    with take_ring():
        assert pinned_bytes() >= before + 2**26
    release_buffers()
    assert pinned_bytes() <= before


@pytest.mark.cuda
def test_release_while_pinning_on_a_gpu_leaves_nothing_pinned(gpu, monkeypatch):
    monkeypatch.setenv("BIGLOAD_RING_BYTES", "256MiB")
    for _ in range(3):
        pin_ahead(gpu)
        release_buffers()
        assert room._kept_ring.kept is None
        assert room._kept_ring.pinning is None


@pytest.mark.cuda
def test_two_loads_at_once_on_a_gpu_have_rings_of_their_own(gpu, tmp_path, monkeypatch):
    full = GPT()
    save_checkpoint(full, tmp_path)
    expected = load_and_quantize_model(empty(GPT), "nf4", tmp_path, device_map=0).state_dict()
    release_buffers()

    def load(_):
        pin_ahead(gpu)
        return load_and_quantize_model(empty(GPT), "nf4", tmp_path, device_map=0).state_dict()

    with ThreadPoolExecutor(2) as pool:
        states = list(pool.map(load, range(8)))
    assert all(torch.equal(state[name], expected[name]) for state in states for name in expected)
    monkeypatch.setattr(room, "Ring", raising(AssertionError("none was kept")))
    with take_ring():
        pass


@pytest.mark.cuda
def test_load_with_memory_that_cannot_be_pinned_is_right(gpu, tmp_path, monkeypatch, logged):
    save_checkpoint(GPT(), tmp_path)
    expected = load_and_quantize_model(empty(GPT), "nf4", tmp_path, device_map=0).state_dict()
    release_buffers()

    def refusing(*args, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return EMPTY(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", refusing)
    monkeypatch.setattr("bigload.hardware.pinned._has_warned", False)
    with logged.at_level(logging.WARNING, logger="bigload"):
        for _ in range(2):
            found = load_and_quantize_model(empty(GPT), "nf4", tmp_path, device_map=0).state_dict()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [record.levelname for record in logged.records if "pinned" in record.getMessage()] == ["WARNING"]


def test_ring_that_is_still_written_to_is_not_kept_for_the_next_load(tmp_path, monkeypatch, late_gpu, executor):
    """A second Ctrl-C ends the wait for threads that hang on a slow disk: what they write must reach no other load."""
    from safetensors.torch import save_file

    from bigload.checkpoint.checkpoint import open_checkpoint
    from bigload.io import feed, transfer
    from bigload.io.program import ReadTask

    save_file({"w": torch.randn(1000)}, tmp_path / "w.safetensors")
    entry = open_checkpoint(tmp_path / "w.safetensors").tensors["w"]
    rings = []
    stop = executor._stop

    def interrupted_again(self):
        rings.append(self._resources.ring)
        stop(self)
        raise KeyboardInterrupt  # as if the wait had been cut short

    monkeypatch.setattr(executor, "_stop", interrupted_again)
    before = len(feed._abandoned)
    with pytest.raises(KeyboardInterrupt):
        transfer.read_all([ReadTask(entry, torch.device("cpu"), lambda values, begin: None)])
    assert not rings[0].is_quiet
    with take_ring() as ring:
        assert ring is not rings[0]
    monkeypatch.undo()
    (left,) = feed._abandoned[before:]
    feed._abandoned.remove(left)
    left._end()
    assert left.is_done


def test_pinning_ahead_that_cannot_start_a_thread_leaves_the_load_as_it_was(monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", raising(RuntimeError("can't start new thread")))
    pin_ahead(GPU)
    with take_ring() as lent:
        assert lent.count >= 2
