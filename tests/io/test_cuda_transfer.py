"""The way onto a GPU, its streams and events replaced by ones that write down what is asked of them: values and order.

What the events are for shows only on a GPU (test_races.py); that each stands where it must can be seen anywhere.
"""

import random
import threading
from contextlib import nullcontext

import pytest
import torch
from checkpoints import save
from resources import open_and_running
from safetensors.torch import save_file

from bigload.checkpoint.checkpoint import open_checkpoint
from bigload.io import staging, transfer
from bigload.io.extents import ReadTask

CPU = torch.device("cpu")


class Event:
    def __init__(self, log):
        self.log, self.recorded_on = log, None

    def record(self, stream):
        self.recorded_on = stream.name
        self.log.append(("record", stream.name, self))

    def synchronize(self):
        self.log.append(("synchronize", self))


class Stream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_event(self, event):
        self.log.append(("wait", self.name, event))

    def wait_stream(self, other):
        self.log.append(("wait_stream", self.name, other.name))

    def synchronize(self):
        self.log.append(("synchronize", self.name))


class Log(list):
    """What is asked of the streams, in order."""


@pytest.fixture
def log(monkeypatch):
    """Put the CPU in the place of a GPU; gives what is asked of its streams, in order."""
    log = Log()
    default = Stream("default", log)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: default)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies", log))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: log.append(("set", stream.name)))
    monkeypatch.setattr(transfer, "timed_event", lambda: Event(log))
    monkeypatch.setattr(transfer, "plain_event", lambda: Event(log))
    monkeypatch.setattr(staging, "plain_event", lambda: Event(log))
    monkeypatch.setattr(transfer, "_transfer", transfer.CudaTransfer)
    monkeypatch.setattr("bigload.io.extents._is_direct", lambda task: False)
    monkeypatch.setattr(staging, "BUFFER_BYTES", 1024)
    monkeypatch.setenv("BIGLOAD_RING_BYTES", "4KiB")
    return log


@pytest.fixture
def stored(tmp_path):
    tensors = {
        "big": torch.randn(37, 64),
        "half": torch.randn(700).half(),
        "small": torch.randn(3),
        "one": torch.ones(()),
    }
    tensors["other"] = torch.randn(900)
    save_file(tensors, tmp_path / "w.safetensors")
    return tensors, open_checkpoint(tmp_path / "w.safetensors").tensors


def delivered(stored, log, *, taken=(), values_per_scale=1):
    """Bring all tensors over, those named in `taken` through `take`, the others home. Returns what arrived, flat."""
    tensors, entries = stored
    made = {name: torch.zeros(tensor.numel(), dtype=tensor.dtype) for name, tensor in tensors.items()}
    counts = dict.fromkeys(tensors, 0)

    def task(name, entry):
        def take(values, begin):
            assert begin % values_per_scale == 0
            log.append(("take", name))
            made[name][begin : begin + len(values)] = values

        def arrived(count):
            counts[name] += count
            log.append(("arrived", name))

        home = None if name in taken else made[name].view(torch.uint8)
        return ReadTask(entry, CPU, take, home, values_per_scale, arrived)

    ordered = sorted(entries.items(), key=lambda item: item[1].offset)
    transfer.read_all([task(name, entry) for name, entry in ordered])
    assert counts == {name: tensor.numel() for name, tensor in tensors.items()}
    return made


@pytest.mark.parametrize(
    "taken", [(), ("big",), ("big", "half", "one"), ("big", "half", "small", "one", "other")], ids=str
)
@pytest.mark.parametrize("values_per_scale", [1, 64])
def test_values_arrive_whichever_way_they_go(stored, log, taken, values_per_scale):
    made = delivered(stored, log, taken=taken, values_per_scale=values_per_scale)
    for name, tensor in stored[0].items():
        assert torch.equal(made[name], tensor.reshape(-1)), name


def staged(log, folder, sizes, *, dtype=torch.float32, values_per_scale=1):
    """Bring tensors over by `take`. Returns by name the pieces of each, as (begin, values), and the hand-overs."""
    tensors = {f"t{number:03}": torch.randint(0, 200, (size,)).to(dtype) for number, size in enumerate(sizes)}
    save_file(tensors, folder / "w.safetensors")
    entries = open_checkpoint(folder / "w.safetensors").tensors
    pieces = {name: [] for name in tensors}
    tasks = []
    for name, entry in entries.items():

        def take(values, begin, name=name):
            assert values.data_ptr() % 64 == 0  # as memory of its own
            pieces[name].append((begin, values.clone()))

        tasks.append(ReadTask(entry, CPU, take, None, values_per_scale))
    transfer.read_all(sorted(tasks, key=lambda task: task.tensor.offset))
    for name, tensor in tensors.items():
        assert torch.equal(torch.cat([values for _, values in pieces[name]]), tensor), name
        ends = [begin + len(values) for begin, values in pieces[name]]
        assert [begin for begin, _ in pieces[name]] == [0, *ends[:-1]], name
        assert all(end % values_per_scale == 0 for end in ends[:-1])
    return pieces, sum(entry[:2] == ("wait", "default") for entry in log)


def test_small_tensors_share_a_buffer_and_are_not_divided(log, tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "BUFFER_BYTES", 8 * staging._ALIGNMENT)
    pieces, handed_over = staged(log, tmp_path, [100] * 33)
    assert all(len(each) == 1 for each in pieces.values())
    assert handed_over == 5  # 8 in each, but the last


@pytest.mark.parametrize("seed", range(30))
def test_tensors_of_any_size_arrive_in_whole_scales(log, tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    scale = rng.choice([1, 7, 64])
    dtype = rng.choice([torch.float32, torch.float16, torch.uint8])
    room = 4096
    monkeypatch.setattr(staging, "BUFFER_BYTES", room)
    sizes = [rng.choice([1, scale, scale * 3 + 1, 500, 1024, 1025, 4096, 9000]) for _ in range(rng.randint(1, 30))]
    pieces, handed_over = staged(log, tmp_path, sizes, dtype=dtype, values_per_scale=scale)
    for each in pieces.values():
        values = sum(len(values) for _, values in each)
        most = room // dtype.itemsize // scale * scale
        assert len(each) == -(-values // most)
    assert handed_over <= sum(len(each) for each in pieces.values())


def test_what_is_taken_has_been_copied_and_its_place_is_free_again_only_afterwards(stored, log):
    delivered(stored, log, taken=("big", "half", "other"))
    takes = [at for at, entry in enumerate(log) if entry[0] == "take"]
    assert len(takes) > 2 * transfer._WINDOW  # places are used again
    waited_for = []
    for number, at in enumerate(takes):
        waits = [entry for entry in log[:at] if entry[:2] == ("wait", "default")]
        copied = waits[-1][2]
        assert log.index(("record", "copies", copied)) < at
        worked = next(entry[2] for entry in log[at:] if entry[:2] == ("record", "default"))
        waited_for.append(worked)
        if number >= transfer._WINDOW:
            earlier = waited_for[number - transfer._WINDOW]
            begun = takes[number - transfer._WINDOW]
            assert ("wait", "copies", earlier) in log[begun:at]


def test_what_came_home_is_announced_only_when_the_default_stream_waits_for_its_copy(stored, log, monkeypatch):
    copy = torch._foreach_copy_

    def copying(*args, **kwargs):
        log.append(("home",))
        copy(*args, **kwargs)

    monkeypatch.setattr(torch, "_foreach_copy_", copying)
    delivered(stored, log)
    homes = [at for at, entry in enumerate(log) if entry == ("home",)]
    records = [at for at, entry in enumerate(log) if entry[:2] == ("record", "copies")]
    waits = [at for at, entry in enumerate(log) if entry[:2] == ("wait", "default")]
    assert len(homes) == len(records) == len(waits) > 4  # of each extent one
    for home, record, wait in zip(homes, records, waits, strict=True):
        assert home < record < wait
        assert log[record][2] is log[wait][2]
    assert min(at for at, entry in enumerate(log) if entry[0] == "arrived") > waits[0]


def test_what_is_staged_does_not_wait_for_the_end_of_a_large_home_behind_it(log, tmp_path):
    save_file({"a": torch.randn(8), "b": torch.randn(4000)}, tmp_path / "w.safetensors")
    stored = {"a": torch.zeros(8), "b": torch.zeros(4000)}, open_checkpoint(tmp_path / "w.safetensors").tensors
    assert stored[1]["a"].offset < stored[1]["b"].offset
    delivered(stored, log, taken=("a",))
    steps = [entry for entry in log if entry[0] in ("take", "arrived")]
    assert steps.index(("take", "a")) < len(steps) - 3  # of the home, most has yet to come
    assert steps[-1] == ("arrived", "b")


def test_streams_meet_before_the_first_copy_and_after_the_last(stored, log):
    delivered(stored, log)
    meetings = [at for at, entry in enumerate(log) if entry[0] == "wait_stream"]
    assert log[meetings[0]] == ("wait_stream", "copies", "default")
    assert log[meetings[-1]] == ("wait_stream", "default", "copies")
    assert meetings[0] == 0
    assert meetings[-1] > max(at for at, entry in enumerate(log) if entry[0] == "record")


def test_an_error_waits_for_the_copies(stored, log):
    _, entries = stored
    before = open_and_running()

    def take(values, begin):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transfer.read_all([ReadTask(entries["big"], CPU, take)])
    assert ("synchronize", "copies") in log
    assert not open_and_running() - before


def test_copies_are_asked_for_by_a_thread_of_their_own_and_what_came_is_worked_on_by_the_caller(stored, log):
    threads = {"set": set(), "take": set(), "arrived": set()}
    log.append = lambda entry: threads.get(entry[0], set()).add(threading.get_ident()) or list.append(log, entry)
    delivered(stored, log, taken=("big", "half"))
    assert threads["take"] == threads["arrived"] == {threading.get_ident()}
    assert threads["set"].isdisjoint(threads["take"])


def test_devices_take_turns_and_each_keeps_its_order(tmp_path):
    tensors = {f"t{n}": torch.zeros(64, dtype=torch.uint8) for n in range(9)}
    save(tensors, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    places = [torch.device("cuda", int(n > 4)) for n in range(9)]
    ways = [ReadTask(checkpoint.tensors[f"t{n}"], device, lambda piece, begin: None) for n, device in enumerate(places)]
    extents = transfer._in_turns(transfer.cut(ways, 64))
    assert [extent.device.index for extent in extents] == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    for index in (0, 1):
        offsets = [extent.offset for extent in extents if extent.device.index == index]
        assert offsets == sorted(offsets)
    assert sum(extent.nbytes for extent in extents) == 9 * 64
