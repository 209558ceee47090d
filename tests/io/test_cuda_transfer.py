"""The way onto a GPU, by each executor, tried on one whose streams are late: what does not wait where it must shows."""

import random
import time

import pytest
import torch
from failures import raising, raising_at
from late_gpu import fail_copy
from resources import open_and_running
from safetensors.torch import save_file

from bigload.checkpoint.checkpoint import open_checkpoint
from bigload.io import feed, threaded_feed, transfer
from bigload.io.program import ReadTask
from bigload.io.ring import take_ring
from bigload.io.timeline import Timeline

CPU = torch.device("cpu")
SEEDS = range(12)


@pytest.fixture
def small(monkeypatch, small_reads, executor):
    """By each executor; the ring has 4 KiB, so that its slots and the window are used again and again."""
    monkeypatch.setenv("BIGLOAD_RING_BYTES", "4KiB")
    return executor


def tensors_of(rng, scale=1):
    dtypes = [torch.float32, torch.float16, torch.uint8, torch.float64]
    sizes = [1, 3, scale, scale * 3 + 1, 100, 700, 4000]
    made = {}
    for number in range(rng.randint(5, 30)):
        values = torch.randint(0, 200, (rng.choice(sizes),))
        made[f"t{number:02}"] = values.to(rng.choice(dtypes))
    return made


class Receiver:
    """Has the GPU's default stream copy away what comes, as late as everything there."""

    def __init__(self, gpu, folder, tensors, taken=(), scale=1):
        self.gpu, self.tensors, self.taken, self.scale = gpu, tensors, taken, scale
        self.homes = {name: torch.full((tensor.nbytes,), 255, dtype=torch.uint8) for name, tensor in tensors.items()}
        self.found = {name: torch.zeros(tensor.nbytes, dtype=torch.uint8) for name, tensor in tensors.items()}
        self.pieces = {name: [] for name in tensors}
        save_file(tensors, folder / "w.safetensors")
        entries = open_checkpoint(folder / "w.safetensors").tensors.values()
        self.entries = sorted(entries, key=lambda entry: entry.offset)

    def task(self, entry):
        name, itemsize, counted = entry.name, entry.dtype.itemsize, 0

        def take(values, begin):
            assert values.data_ptr() % 64 == 0  # as memory of its own
            assert begin == sum(self.pieces[name])
            self.pieces[name].append(len(values))
            found = self.found[name][begin * itemsize : (begin + len(values)) * itemsize]
            self.gpu.work.copy(found, values)

        def arrived(count):
            nonlocal counted
            if name not in self.taken:
                part = slice(counted * itemsize, (counted + count) * itemsize)
                self.gpu.work.copy(self.found[name][part], self.homes[name][part])
            counted += count

        home = None if name in self.taken else self.homes[name]
        return ReadTask(entry, CPU, take, home, self.scale, arrived)

    def receive(self, **options):
        transfer.read_all([self.task(entry) for entry in self.entries], **options)
        self.gpu.work.synchronize()

    def assert_all_came(self):
        for name, tensor in self.tensors.items():
            assert torch.equal(self.found[name], tensor.view(torch.uint8)), name
            if name in self.taken:
                assert all(numel % self.scale == 0 for numel in self.pieces[name][:-1])


@pytest.mark.parametrize("seed", SEEDS)
def test_bytes_are_where_the_default_stream_looks_when_it_looks(late_gpu, tmp_path, small, seed):
    rng = random.Random(seed)
    scale = rng.choice([1, 7, 64])
    tensors = tensors_of(rng, scale)
    receiver = Receiver(late_gpu, tmp_path, tensors, {name for name in tensors if rng.random() < 0.6}, scale)
    receiver.receive()
    receiver.assert_all_came()


def test_what_lies_in_a_home_before_is_worked_on_to_the_end(late_gpu, tmp_path, small):
    """Memory of a home, and of a window, may have been another tensor's."""
    receiver = Receiver(late_gpu, tmp_path, {"w": torch.randn(500)})
    before, other = torch.zeros(2000, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)
    for _ in range(30):  # until all this is done, the default stream is late
        late_gpu.work.copy(other[:1], other[1:])
    late_gpu.work.copy(before, receiver.homes["w"])
    receiver.receive()
    assert torch.equal(before, torch.full_like(before, 255))
    receiver.assert_all_came()


@pytest.mark.parametrize("way", ["home", "taken"])
@pytest.mark.parametrize("call", [1, 2, 5])
def test_after_an_error_nothing_is_copied_any_more(late_gpu, tmp_path, small, way, call):
    """Neither out of the ring, which the next load fills, nor into homes, which are freed."""
    tensors = {f"t{number}": torch.randint(0, 200, (2800,), dtype=torch.uint8) for number in range(9)}
    receiver = Receiver(late_gpu, tmp_path, tensors, tensors if way == "taken" else ())
    before = open_and_running()
    with pytest.raises(KeyboardInterrupt):
        receiver.receive(on_bytes=raising_at(call, KeyboardInterrupt()))
    assert not open_and_running() - before
    places = [*receiver.homes.values(), *late_gpu.memory]
    seen = [place.clone() for place in places]
    with take_ring() as ring:
        ring.memory.fill_(233)
        time.sleep(0.01)
    assert all(map(torch.equal, places, seen))
    assert not any((place == 233).any() for place in receiver.homes.values())
    late_gpu.work.synchronize()
    again = Receiver(late_gpu, tmp_path, tensors)
    again.receive()
    again.assert_all_came()


@pytest.mark.parametrize("number", [0, 3, 40])
def test_a_copy_that_fails_is_an_error_and_a_second_load_is_right(late_gpu, tmp_path, small, number):
    tensors = {f"t{number}": torch.randn(700) for number in range(9)}
    receiver = Receiver(late_gpu, tmp_path, tensors)
    fail_copy(number)
    try:
        with pytest.raises(RuntimeError, match="error 719"):
            receiver.receive()
    finally:
        fail_copy(-1)
    late_gpu.work.synchronize()
    again = Receiver(late_gpu, tmp_path, tensors)
    again.receive()
    again.assert_all_came()


@pytest.mark.parametrize("executor", ["threads"], indirect=True)
def test_a_copy_whose_event_is_not_recorded_leaves_its_memory_alone(late_gpu, tmp_path, small, monkeypatch):
    """Nobody knows then when it will have come."""
    tensors = {f"t{number}": torch.randn(700) for number in range(9)}
    receiver, make, left = Receiver(late_gpu, tmp_path, tensors), threaded_feed.plain_event, len(feed._abandoned)

    def failing():
        event = make()
        monkeypatch.setattr(event, "record", raising(RuntimeError("error 719")))
        return event

    with monkeypatch.context() as patch:
        patch.setattr(threaded_feed, "plain_event", failing)
        with pytest.raises(RuntimeError, match="error 719"):
            receiver.receive()
    late_gpu.work.synchronize()
    for each in feed._abandoned[left:]:
        feed._abandoned.remove(each)
        each.is_done = True
        each._end()
    again = Receiver(late_gpu, tmp_path, tensors)
    again.receive()
    again.assert_all_came()


def test_the_ring_is_kept_for_the_next_load(late_gpu, tmp_path, small):
    rings = []
    for _ in range(2):
        receiver = Receiver(late_gpu, tmp_path, {"w": torch.randn(5000)})
        receiver.receive()
        receiver.assert_all_came()
        with take_ring() as ring:
            rings.append(ring)
    assert rings[0] is rings[1]


def test_copies_and_work_are_told_to_the_timeline(late_gpu, tmp_path, small):
    timeline = Timeline()
    tensors = {f"t{number}": torch.randn(700) for number in range(9)}
    Receiver(late_gpu, tmp_path, tensors, tensors).receive(timeline=timeline)
    assert len(timeline._copies[CPU]) == len(timeline._work[CPU]) > 9
