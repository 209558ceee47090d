"""A Plan is executed as written: several sources to one parameter, transposes, each byte once and in file order."""

import itertools
import os
import weakref
from pathlib import Path

import pytest
import torch
from checkpoints import PLAIN, empty, save_checkpoint
from failures import raising
from models import GPT
from references import quantize_as_bitsandbytes
from safetensors.torch import save_file
from torch import nn

from bigload import BnbQuantizationConfig, load_and_quantize_model, release_buffers
from bigload.checkpoint.checkpoint import open_checkpoint
from bigload.io import ring, transfer
from bigload.model.tensors import ModelTensor
from bigload.pipeline import sinks
from bigload.pipeline.execute import execute
from bigload.planning.plan import Plan
from bigload.planning.planned_tensors import PlannedTensor
from bigload.planning.sources import Source
from bigload.quantization.formats import FourBit, Plain

CONFIG = BnbQuantizationConfig.from_mode("nf4").resolved(torch.float32)


def plan_of(shape, sources, fmt, device):
    tensor = ModelTensor(("made",), torch.empty(shape, device="meta"), True, True)
    return Plan((PlannedTensor(tensor, shape, tuple(sources), fmt, device),), {}, {"": device}, CONFIG)


@pytest.fixture
def stored(tmp_path):
    """Three matrices in two files."""
    tensors = {"a": torch.randn(40, 60), "b": torch.randn(40, 60), "c": torch.randn(60, 40)}
    save_file({"a": tensors["a"], "c": tensors["c"]}, tmp_path / "one.safetensors")
    save_file({"b": tensors["b"]}, tmp_path / "two.safetensors")
    entries = {}
    for name in ("one", "two"):
        entries |= open_checkpoint(tmp_path / f"{name}.safetensors").tensors
    return tensors, entries


@pytest.mark.parametrize("ring", ["1KiB", "3000", "2MiB"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_several_sources_fill_the_regions_of_one_parameter(stored, device, monkeypatch, ring, dtype):
    monkeypatch.setenv("BIGLOAD_RING_BYTES", ring)
    tensors, entries = stored
    sources = [
        Source(entries["b"], region=(1, slice(0, 40))),
        Source(entries["a"], region=(0, slice(0, 40))),
        Source(entries["c"], region=(1, slice(40, 80)), transposed=True),
        Source(tensors["a"] + 1, region=(0, slice(40, 80))),
    ]
    made = execute(plan_of((2, 80, 60), sources, Plain(dtype), device))["made"]
    expected = torch.stack([torch.cat([tensors["a"], tensors["a"] + 1]), torch.cat([tensors["b"], tensors["c"].T])])
    assert torch.equal(made.cpu(), expected.to(dtype))


def test_regions_that_are_columns_are_filled_too(stored, device):
    tensors, entries = stored
    sources = [
        Source(entries["a"], region=(slice(None), slice(0, 60))),
        Source(entries["b"], region=(..., slice(60, 120))),
    ]
    made = execute(plan_of((40, 120), sources, Plain(torch.float32), device))["made"]
    assert torch.equal(made.cpu(), torch.cat([tensors["a"], tensors["b"]], dim=1))


def test_transposed_weight_is_quantized_as_its_transpose(tmp_path, device):
    weight = torch.randn(128, 64)
    save_file({"w": weight}, tmp_path / "w.safetensors")
    entry = open_checkpoint(tmp_path / "w.safetensors").tensors["w"]
    fmt = FourBit("nf4", 64, False, torch.uint8)
    made = execute(plan_of((64, 128), [Source(entry, transposed=True)], fmt, device))["made"]
    expected = quantize_as_bitsandbytes(weight.T.contiguous().to(device), "nf4")
    assert torch.equal(made.data, expected["weight"])
    assert torch.equal(made.quant_state.absmax, expected["absmax"])


def test_weights_that_are_put_together_are_held_one_at_a_time(tmp_path, monkeypatch):
    names = [f"w{i}" for i in range(4)]
    save_file({name: torch.randn(128, 64) for name in names}, tmp_path / "w.safetensors")
    entries = open_checkpoint(tmp_path / "w.safetensors").tensors
    fmt = FourBit("nf4", 64, False, torch.uint8)
    held, most = weakref.WeakSet(), []
    allocate = sinks.allocate

    def watched(*asked):
        made = allocate(*asked)
        held.add(made)
        most.append(len(held))
        return made

    monkeypatch.setattr(sinks, "allocate", watched)
    planned = [
        PlannedTensor(
            ModelTensor((name,), torch.empty(64, 128, device="meta"), True, True),
            (64, 128),
            (Source(entries[name], transposed=True),),
            fmt,
            torch.device("cpu"),
        )
        for name in names
    ]
    made = execute(Plan(tuple(planned), {}, {"": torch.device("cpu")}, CONFIG))
    assert made.keys() == set(names)
    assert max(most) == 1


def test_empty_and_zero_dimensional_tensors_arrive(tmp_path, device):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scalar = nn.Parameter(torch.tensor(3.5))
            self.empty = nn.Parameter(torch.empty(0, 4))
            self.register_buffer("count", torch.tensor(9))

    save_checkpoint(Odd(), tmp_path)
    model = empty(Odd)
    model.count.zero_()
    model = load_and_quantize_model(model, "nf4", tmp_path, device_map=device)
    assert model.scalar.item() == 3.5
    assert model.empty.shape == (0, 4)
    assert model.count.item() == 9
    assert not model.empty.is_meta


@pytest.mark.parametrize("threads", [1, 4])
def test_each_byte_is_read_once_and_in_file_order(tmp_path, monkeypatch, threads):
    reads = []
    read = os.preadv

    def watched(descriptor, buffers, offset):
        reads.append((Path(f"/proc/self/fd/{descriptor}").readlink(), offset, sum(map(len, buffers))))
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(transfer, "library", lambda: None)
    monkeypatch.setattr(os, "preadv", watched)
    monkeypatch.setenv("BIGLOAD_THREADS", str(threads))
    monkeypatch.setenv("BIGLOAD_RING_BYTES", "8KiB")
    save_checkpoint(GPT(), tmp_path, shards=3)
    model = empty(GPT)
    seen = []
    monkeypatch.setattr("tqdm.tqdm.update", lambda self, count=1: seen.append(count))
    load_and_quantize_model(model, "nf4", tmp_path, device_map="cpu")
    assert threads > 1 or reads == sorted(reads)  # several begin in this order, but the system runs them in any
    reads.sort()
    assert all(a[0] != b[0] or a[1] + a[2] <= b[1] for a, b in itertools.pairwise(reads))
    total = sum(tensor.nbytes for tensor in open_checkpoint(tmp_path).tensors.values())
    assert sum(count for *_, count in reads) == total == sum(seen)


@pytest.mark.cuda
def test_pinned_ring_is_kept_for_the_next_load_until_it_is_released(tmp_path, monkeypatch):
    own, made = ring.Ring, []
    monkeypatch.setattr(ring, "Ring", lambda *args, **kwargs: made.append(1) or own(*args, **kwargs))
    save_checkpoint(GPT(), tmp_path)
    release_buffers()
    for _ in range(3):
        load_and_quantize_model(empty(GPT), "nf4", tmp_path, device_map=0)
    assert len(made) == 1
    release_buffers()
    load_and_quantize_model(empty(GPT), "nf4", tmp_path, device_map=0)
    assert len(made) == 2


@pytest.mark.parametrize("order", ["gate up", "up gate", "gates first"])
@pytest.mark.parametrize("ring", ["4KiB", "2MiB"])
def test_what_lies_together_in_the_file_and_in_the_weight_is_read_as_one(tmp_path, device, monkeypatch, ring, order):
    monkeypatch.setenv("BIGLOAD_RING_BYTES", ring)
    key = {
        "gate up": lambda number, name: f"{number} {name}",
        "up gate": lambda number, name: f"{number} {'ba'[name == 'up']}",
        "gates first": lambda number, name: f"{name} {number}",
    }[order]
    weights = {key(number, name): torch.randn(32, 64) for number in range(4) for name in ("gate", "up")}
    save_file(weights, tmp_path / "w.safetensors")
    entries = open_checkpoint(tmp_path / "w.safetensors").tensors
    halves = {"gate": slice(0, 32), "up": slice(32, 64)}
    sources = [
        Source(entries[key(number, name)], region=(number, half, slice(0, 64)))
        for name, half in halves.items()
        for number in range(4)
    ]
    fmt = FourBit("nf4", 64, False, torch.uint8)
    plan = plan_of((4, 64, 64), sources, fmt, device)
    tasks = sinks.QuantizeSink(plan.tensors[0], fmt, torch.float32).tasks()
    assert len(tasks) == (1 if order == "gate up" else 8)
    if order == "gate up":
        assert tasks[0].tensor.name == "0 gate to 3 up"  # for errors
    made = execute(plan)["made"]
    whole = torch.stack([torch.cat([weights[key(number, name)] for name in halves]) for number in range(4)])
    expected = quantize_as_bitsandbytes(whole.view(-1, 64).to(device), "nf4")
    assert torch.equal(made.data, expected["weight"])
    assert torch.equal(made.quant_state.absmax, expected["absmax"])


def test_an_error_that_is_no_shortage_of_memory_is_not_taken_for_one(tmp_path, monkeypatch):
    folder, model = save_checkpoint(GPT(), tmp_path), empty(GPT)
    monkeypatch.setattr("bigload.pipeline.execute.allocate", raising(RuntimeError("of another kind")))
    with pytest.raises(RuntimeError, match=r"^of another kind$"):
        load_and_quantize_model(model, PLAIN | {"torch_dtype": "fp32"}, folder, device_map="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())
