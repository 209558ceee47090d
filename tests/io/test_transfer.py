"""What is delivered equals what safetensors reads, however it is cut and timed; failures leave nothing behind."""

import contextlib
import json
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from checkpoints import empty, save_checkpoint, stored
from comparisons import assert_same_bits, equal
from failures import act_at, fail_at, raising, raising_at
from models import GPT
from resources import open_files
from safetensors.torch import load, save_file

import bigload.io.transfer as room
from bigload import BnbQuantizationConfig, CheckpointError, PlacementError, load_and_quantize_model
from bigload.checkpoint.checkpoint import open_checkpoint
from bigload.io import native_feed, threaded_feed
from bigload.io.program import ReadTask
from bigload.io.transfer import read_all

CPU = torch.device("cpu")
NAMES = {torch.uint8: "U8", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
# As a checkpoint's tensors lie: in this order, what follows an odd number of bytes is misaligned.
ODD = {
    "bytes": torch.arange(13, dtype=torch.uint8),
    "doubles": torch.linspace(-3, 3, 41, dtype=torch.float64),
    "one byte": torch.tensor([7], dtype=torch.uint8),
    "halves": torch.linspace(0, 1, 301).bfloat16().view(7, 43),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "nothing": torch.empty(0, 3),
    "more bytes": torch.arange(200, dtype=torch.uint8).view(2, 100),
    "large": torch.linspace(-9, 9, 3001),
    "last byte": torch.tensor(9, dtype=torch.uint8),
}
WAYS = ("homes", "take", "mixed")


def write_by_hand(path, tensors):
    """Write safetensors in the order given, the data from an odd byte of the file on."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (len(text) % 2 == 0)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def stored_in(*paths):
    return [tensor for path in paths for tensor in open_checkpoint(path).tensors.values()]


class Receiver:
    """Takes deliveries of one kind and keeps what came, and how."""

    def __init__(self, way, take=lambda: None):
        self.way, self.on_take = way, take
        self.values, self.pieces, self.arrived, self.order, self.threads = {}, {}, {}, [], set()

    def task(self, index, tensor):
        name, numel = tensor.name, tensor.nbytes // tensor.dtype.itemsize
        home = torch.zeros(numel, dtype=tensor.dtype)
        self.values[name], self.pieces[name], self.arrived[name] = home.view(tensor.shape), [], 0

        def take(piece, begin):
            self.on_take()
            assert piece.dtype == tensor.dtype
            assert piece.is_contiguous()
            home[begin : begin + len(piece)] = piece
            self.pieces[name].append((begin, len(piece)))
            self.order.append(name)
            self.threads.add(threading.get_ident())

        def arrived(count):
            self.arrived[name] += count

        has_home = self.way == "homes" or (self.way == "mixed" and index % 2 == 0)
        return ReadTask(tensor, CPU, take, home.view(torch.uint8) if has_home else None, arrived=arrived)

    def receive(self, tensors, **options):
        read_all([self.task(index, tensor) for index, tensor in enumerate(tensors)], **options)
        return self.values


def received(tensors, way="take", **options):
    return Receiver(way, **options).receive(tensors)


def assert_is_whole(found, path):
    assert_same_bits(found, load(path.read_bytes()))


@pytest.fixture
def odd(tmp_path):
    return write_by_hand(tmp_path / "odd.safetensors", ODD)


@pytest.mark.parametrize("block", [64, 2**22])
@pytest.mark.parametrize("threads", ["1", "2", "12"])
@pytest.mark.parametrize("ring", ["1KiB", "3000", "1MiB"])
@pytest.mark.parametrize("way", WAYS)
def test_values_are_those_of_the_file(odd, monkeypatch, executor, way, ring, threads, block):
    monkeypatch.setenv("BIGLOAD_RING_BYTES", ring)
    monkeypatch.setenv("BIGLOAD_THREADS", threads)
    for each in (native_feed, threaded_feed):
        monkeypatch.setattr(each, "_READ_BYTES", block)
    assert_is_whole(received(stored_in(odd), way), odd)


@pytest.mark.parametrize("way", WAYS)
def test_usual_knobs_read_an_unusual_file(odd, executor, way):
    assert_is_whole(received(stored_in(odd), way), odd)


@pytest.mark.parametrize("way", WAYS)
def test_every_dtype_arrives(tmp_path, tiny, way):
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    dtypes += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8]
    dtypes += [torch.bool, torch.complex64]
    path = tmp_path / "all.safetensors"
    save_file({str(dtype): torch.arange(300).remainder(2 + i).to(dtype) for i, dtype in enumerate(dtypes)}, path)
    assert_is_whole(received(stored_in(path), way), path)


@pytest.mark.parametrize("way", WAYS)
def test_shards_that_end_within_a_slot_do_not_mix(tmp_path, tiny, way):
    paths = []
    for i, numel in enumerate((1, 100, 128, 129, 300)):
        tensors = {f"{i} a": torch.full((numel,), float(i)), f"{i} b": torch.full((numel, 2), i + 0.5)}
        paths.append(tmp_path / f"{i}.safetensors")
        save_file(tensors, paths[-1])
    found = received(stored_in(*paths), way)
    for i, path in enumerate(paths):
        assert_is_whole({name: value for name, value in found.items() if name.startswith(str(i))}, path)


@pytest.mark.parametrize("way", WAYS)
def test_tensors_left_out_leave_the_others_right(odd, tiny, way):
    wanted = stored_in(odd)[1::2]
    found = received(wanted, way)
    expected = load(odd.read_bytes())
    assert all(equal(found[tensor.name], expected[tensor.name]) for tensor in wanted)


def test_one_tensor_may_be_delivered_twice(odd, tiny):
    tensors = [tensor for tensor in stored_in(odd) if tensor.name == "large"] * 2
    homes = [torch.empty(3001), torch.empty(3001)]
    read_all([ReadTask(tensor, CPU, None, home.view(torch.uint8)) for tensor, home in zip(tensors, homes, strict=True)])
    assert all(torch.equal(home, ODD["large"]) for home in homes)


def test_nothing_to_deliver_is_no_work(odd, monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", raising(AssertionError("a thread for nothing")))
    read_all([])
    received([tensor for tensor in stored_in(odd) if not tensor.nbytes])


def test_pieces_come_in_order_to_the_callers_thread(odd, tiny):
    receiver = Receiver("take")
    tensors = stored_in(odd)
    receiver.receive(tensors)
    assert list(dict.fromkeys(receiver.order)) == [tensor.name for tensor in tensors if tensor.nbytes]
    assert receiver.threads == {threading.get_ident()}
    for name, pieces in receiver.pieces.items():
        ends = [begin + count for begin, count in pieces]
        assert [begin for begin, _ in pieces] == [0, *ends][: len(pieces)]
        assert ([0, *ends])[-1] == ODD[name].numel()
    assert len(receiver.pieces["large"]) >= 12_004 // 512


def test_values_of_one_scale_stay_in_one_piece(odd, tiny):
    pieces = []
    (tensor,) = (tensor for tensor in stored_in(odd) if tensor.name == "large")
    read_all([ReadTask(tensor, CPU, lambda values, begin: pieces.append((begin, len(values))), values_per_scale=100)])
    assert [begin % 100 for begin, _ in pieces] == [0] * len(pieces)
    assert [count % 100 for _, count in pieces[:-1]] == [0] * (len(pieces) - 1)
    assert sum(count for _, count in pieces) == 3001


def test_home_is_filled_without_take(odd, tiny):
    receiver = Receiver("homes", take=raising(AssertionError("taken")))
    assert_is_whole(receiver.receive(stored_in(odd)), odd)


@pytest.mark.parametrize("way", WAYS)
def test_all_values_are_told_to_have_arrived_once(odd, tiny, way):
    receiver = Receiver(way)
    receiver.receive(stored_in(odd))
    assert receiver.arrived == {name: tensor.numel() for name, tensor in ODD.items()}


@pytest.mark.parametrize("way", WAYS)
def test_values_are_there_when_they_are_told_to_have_arrived(odd, tiny, way):
    receiver, wrong = Receiver(way), []
    tasks = [receiver.task(index, tensor) for index, tensor in enumerate(stored_in(odd))]

    def checked(one):
        def arrived(count):
            name = one.tensor.name
            receiver.arrived[name] += count
            if receiver.arrived[name] == ODD[name].numel() and not equal(receiver.values[name], ODD[name]):
                wrong.append(name)

        return ReadTask(one.tensor, CPU, one.take, one.home, arrived=arrived)

    read_all([checked(one) for one in tasks])
    assert wrong == []


@pytest.mark.parametrize("way", WAYS)
def test_bytes_are_counted_as_they_arrive_in_the_callers_thread(odd, tiny, way):
    seen, threads = [], set()

    def on_bytes(count):
        seen.append(count)
        threads.add(threading.get_ident())

    Receiver(way).receive(stored_in(odd), on_bytes=on_bytes)
    assert sum(seen) == sum(tensor.nbytes for tensor in ODD.values())
    assert len(seen) > 20
    assert threads == {threading.get_ident()}


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_as_many_threads_read_as_asked(odd, monkeypatch, tiny_threads, threads):
    monkeypatch.setenv("BIGLOAD_THREADS", str(threads))
    read, readers, all_came = os.preadv, set(), threading.Event()

    def watched(*args):
        readers.add(threading.get_ident())
        if len(readers) >= threads:
            all_came.set()
        assert all_came.wait(60)
        return read(*args)

    monkeypatch.setattr(os, "preadv", watched)
    received([tensor for tensor in stored_in(odd) if tensor.name == "large"])  # of which 16 blocks are read ahead
    assert len(readers) == threads
    assert threading.get_ident() not in readers


@pytest.mark.parametrize("limit", [1, 100])
@pytest.mark.parametrize("way", WAYS)
def test_reads_that_return_less_than_asked_are_continued(odd, monkeypatch, tiny_threads, way, limit):
    """As the system may, on signals and network file systems; in the middle of any of several buffers."""
    read = os.preadv

    def short(descriptor, buffers, offset):
        allowed, left = [], limit
        for buffer in buffers:
            allowed.append(buffer[:left])
            left -= len(allowed[-1])
        return read(descriptor, [buffer for buffer in allowed if len(buffer)], offset)

    monkeypatch.setattr(os, "preadv", short)
    assert_is_whole(received(stored_in(odd), way), odd)


@pytest.mark.parametrize("threads", ["1", "2", "12"])
@pytest.mark.parametrize("call", [1, 2, 30, 150])
@pytest.mark.parametrize("way", ["homes", "take"])
def test_failing_read_in_any_thread_is_an_error_that_names_the_file(
    odd, monkeypatch, tiny_threads, nothing_left, way, call, threads
):
    monkeypatch.setenv("BIGLOAD_THREADS", threads)
    tensors = stored_in(odd)
    fail_at(monkeypatch, os, "preadv", call, OSError(5, "Input/output error"))
    with pytest.raises(CheckpointError, match=r"odd\.safetensors.*Input/output error"):
        received(tensors, way)


def test_file_that_is_gone_is_an_error_that_names_it(odd, tiny, nothing_left):
    tensors = stored_in(odd)
    odd.unlink()
    with pytest.raises(CheckpointError, match=r"odd\.safetensors.*No such file"):
        received(tensors)


def test_other_errors_of_a_thread_come_up_as_they_are(odd, monkeypatch, tiny_threads, nothing_left):
    fail_at(monkeypatch, os, "preadv", 30, MemoryError("in a thread"))
    with pytest.raises(MemoryError, match="in a thread"):
        received(stored_in(odd))


@pytest.mark.parametrize("way", WAYS)
def test_file_that_was_cut_names_a_tensor_that_it_lacks(odd, tiny, nothing_left, way):
    tensors = stored_in(odd)
    by_name = {tensor.name: tensor for tensor in tensors}
    os.truncate(odd, by_name["more bytes"].offset + 150)
    with pytest.raises(CheckpointError, match=r"'(more bytes|large|last byte)'.*truncated meanwhile"):
        received(tensors, way)


@pytest.mark.parametrize("call", [2, 8, 20])
@pytest.mark.parametrize("way", ["homes", "take"])
def test_file_that_is_cut_while_it_is_read_is_an_error(odd, monkeypatch, tiny_threads, nothing_left, way, call):
    tensors = stored_in(odd)
    act_at(monkeypatch, os, "preadv", call, lambda: os.truncate(odd, tensors[0].offset))
    with pytest.raises(CheckpointError, match="truncated meanwhile"):
        received(tensors, way)


@pytest.mark.parametrize("call", [1, 2, 20])
@pytest.mark.parametrize("threads", ["1", "12"])
@pytest.mark.parametrize("error", [ValueError("in take"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_consumer_that_raises_leaves_nothing_running(odd, monkeypatch, tiny, nothing_left, call, threads, error):
    monkeypatch.setenv("BIGLOAD_THREADS", threads)
    with pytest.raises(type(error)) as raised:
        received(stored_in(odd), take=raising_at(call, error))
    assert raised.value is error


@pytest.mark.parametrize("way", ["homes", "take"])
def test_progress_that_raises_leaves_nothing_running(odd, tiny, nothing_left, way):
    with pytest.raises(ValueError, match="in on_bytes"):
        Receiver(way).receive(stored_in(odd), on_bytes=raising_at(3, ValueError("in on_bytes")))


def test_delivery_that_is_stopped_reads_no_further(odd, monkeypatch, tiny_threads):
    """Straight into homes, where no window holds the readers back."""
    read, sizes = os.preadv, []

    def slowly(*args):
        time.sleep(0.005)
        sizes.append(read(*args))
        return sizes[-1]

    monkeypatch.setattr(os, "preadv", slowly)
    with pytest.raises(KeyboardInterrupt):
        Receiver("homes").receive(stored_in(odd), on_bytes=raising(KeyboardInterrupt()))
    assert sum(sizes) < sum(tensor.nbytes for tensor in ODD.values()) / 2


@pytest.mark.parametrize("started", [0, 1, 3])
def test_threads_that_cannot_be_started_leave_nothing_running(odd, monkeypatch, tiny_threads, nothing_left, started):
    """As where a container's limit of processes is near."""
    fail_at(monkeypatch, threading.Thread, "start", started + 1, RuntimeError("can't start new thread"))
    with contextlib.suppress(RuntimeError):
        assert_is_whole(received(stored_in(odd)), odd)  # with the threads there are: right too


def test_memory_that_failed_to_be_had_for_the_way_names_the_device(tmp_path, monkeypatch):
    """A GPU has a window, which may be what does not fit."""
    save_checkpoint(GPT(), tmp_path)
    monkeypatch.setattr(room, "_window", raising(torch.OutOfMemoryError("CUDA out of memory")))
    model = empty(GPT)
    with pytest.raises(PlacementError, match=r"cpu.? ran out of memory"):
        load_and_quantize_model(model, "nf4", tmp_path, device_map="cpu")


def test_second_delivery_after_a_failed_one_is_right(odd, tiny):
    for call in range(1, 30, 3):
        with pytest.raises(KeyboardInterrupt):
            received(stored_in(odd), take=raising_at(call, KeyboardInterrupt()))
        assert_is_whole(received(stored_in(odd)), odd)


def test_unquantized_load_of_shards_equals_what_safetensors_reads(tmp_path, tiny):
    save_checkpoint(GPT(tied=True), tmp_path, shards=3, dtype=torch.bfloat16)
    expected = stored(tmp_path)
    config = BnbQuantizationConfig.from_mode("nf4", skip_modules=["*"])
    model = empty(GPT, tied=True)
    found = load_and_quantize_model(model, config, tmp_path, device_map="cpu").state_dict()
    assert found.keys() - expected.keys() == {"lm_head.weight"}
    assert_same_bits({name: found[name] for name in expected}, expected)


def sleep_sometimes(chance=0.3, most_s=0.002, rng=random):
    if rng.random() < chance:
        time.sleep(rng.random() * most_s)


@pytest.mark.parametrize("slow", ["readers", "consumer", "both"])
@pytest.mark.parametrize("threads", ["1", "3", "12"])
@pytest.mark.parametrize("way", ["take", "mixed"])
def test_slow_ends_neither_deadlock_nor_mix_values(odd, monkeypatch, tiny_threads, nothing_left, way, threads, slow):
    monkeypatch.setenv("BIGLOAD_THREADS", threads)
    rng = random.Random(f"{way} {threads} {slow}")
    read = os.preadv

    def slowly(*args):
        sleep_sometimes(rng=rng)
        received = read(*args)
        sleep_sometimes(rng=rng)
        return received

    if slow != "consumer":
        monkeypatch.setattr(os, "preadv", slowly)
    take = (lambda: None) if slow == "readers" else (lambda: sleep_sometimes(rng=rng))
    for _ in range(2):
        assert_is_whole(received(stored_in(odd), way, take=take), odd)


def test_readers_wait_while_the_consumer_holds_memory(odd, monkeypatch, tiny_threads):
    """A window of three batches of 512 bytes: no more than that can have been read of what has not been taken."""
    read, filled = os.preadv, []

    def counting(*args):
        filled.append(read(*args))
        return filled[-1]

    (tensor,) = (tensor for tensor in stored_in(odd) if tensor.name == "large")
    ahead = []

    def take(values, begin):
        time.sleep(0.02)
        ahead.append(sum(filled) - begin * 4)

    monkeypatch.setattr(os, "preadv", counting)
    read_all([ReadTask(tensor, CPU, take)])
    assert max(ahead) <= 3 * 512
    assert sum(filled) == tensor.nbytes


def test_as_few_files_are_open_at_once_as_said(tmp_path, monkeypatch, tiny):
    monkeypatch.setattr(room, "_FILES", 2)
    opened, most = os.open, []

    def counting(*args, **options):
        most.append(sum(name.startswith(str(tmp_path)) for _, name in open_files()))
        return opened(*args, **options)

    paths = [tmp_path / f"{number}.safetensors" for number in range(7)]
    for number, path in enumerate(paths):
        save_file({f"{number}": torch.full((300,), float(number))}, path)
    tensors = stored_in(*paths)
    monkeypatch.setattr(os, "open", counting)
    found = received(tensors)
    assert max(most) == 1  # of those that were open when another was opened
    assert all(torch.equal(found[f"{n}"], torch.full((300,), float(n))) for n in range(7))


@pytest.mark.parametrize("way", WAYS)
def test_two_deliveries_at_once_do_not_disturb_each_other(tmp_path, monkeypatch, tiny, way):
    paths = []
    for seed in range(4):
        shifted = {name: tensor + seed for name, tensor in ODD.items()}
        paths.append(write_by_hand(tmp_path / f"{seed}.safetensors", shifted))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda path: received(stored_in(path), way, take=sleep_sometimes), paths * 2))
    for values, path in zip(found, paths * 2, strict=True):
        assert_is_whole(values, path)


def test_what_is_to_be_done_meanwhile_is_done_once_and_before_anything_arrives(tmp_path, tiny, executor, monkeypatch):
    monkeypatch.setattr(room, "_FILES", 2)
    for number in range(5):
        save_file({f"{number}": torch.full((1000,), float(number))}, tmp_path / f"{number}.safetensors")
    done = []
    receiver = Receiver("take", lambda: done.append("taken"))
    found = receiver.receive(stored_in(*sorted(tmp_path.iterdir())), meanwhile=lambda: done.append("meanwhile"))
    assert all(torch.equal(found[str(number)], torch.full((1000,), float(number))) for number in range(5))
    assert done[0] == "meanwhile"
    assert done.count("meanwhile") == 1


def test_an_error_meanwhile_ends_the_reads(odd, tiny, executor):
    receiver = Receiver("homes")
    with pytest.raises(ValueError, match="meanwhile"):
        receiver.receive(stored_in(odd), meanwhile=raising(ValueError("meanwhile")))
    assert not any(receiver.arrived.values())
    assert_is_whole(received(stored_in(odd), "homes"), odd)
