"""Whatever stops a load in the middle leaves the model as it came, and nothing open or running behind."""

import gc
import os

import bitsandbytes as bnb
import pytest
import torch
from checkpoints import empty, save_checkpoint
from comparisons import identity_of
from failures import fail_at
from models import GPT
from resources import open_and_running

from bigload import CheckpointError, PlacementError, load_and_quantize_model
from bigload.io import transfer
from bigload.io.feed import Feed
from bigload.io.native_feed import NativeFeed, library
from bigload.io.threaded_feed import ThreadedFeed
from bigload.pipeline import execute
from bigload.quantization.quantizer import Quantizer


@pytest.fixture
def folder(tmp_path):
    return save_checkpoint(GPT(), tmp_path, shards=3)


@pytest.fixture
def model():
    return empty(GPT)


def check_untouched_then_loads(model, folder, expected, monkeypatch):
    before = identity_of(model)
    held_before = open_and_running()
    with pytest.raises(expected):
        load_and_quantize_model(model, "nf4", folder, device_map="cpu")
    assert not open_and_running() - held_before
    assert identity_of(model) == before
    monkeypatch.undo()
    model = load_and_quantize_model(model, "nf4", folder, device_map="cpu")
    assert isinstance(model.transformer["h"][0].attn.c_attn, bnb.nn.Linear4bit)
    model(torch.zeros(1, 4, dtype=torch.long))
    assert not open_and_running() - held_before


@pytest.mark.parametrize("call", [1, 7, 20])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error")], ids=["ctrl-c", "disk"])
def test_interrupted_while_reading(model, folder, monkeypatch, call, error):
    load_and_quantize_model(GPT(), "nf4", folder, device_map="cpu")  # what is made once per process is made now
    monkeypatch.setenv("BIGLOAD_RING_BYTES", "4KiB")  # many reads
    if isinstance(error, OSError):
        monkeypatch.setattr(transfer, "library", lambda: None)
        fail_at(monkeypatch, os, "preadv", call, error)
        check_untouched_then_loads(model, folder, CheckpointError, monkeypatch)
    else:
        fail_at(monkeypatch, NativeFeed if library() else ThreadedFeed, "take", call, error)
        check_untouched_then_loads(model, folder, KeyboardInterrupt, monkeypatch)


def test_interrupted_while_quantizing(model, folder, monkeypatch):
    fail_at(monkeypatch, Quantizer, "add", 3, KeyboardInterrupt())
    check_untouched_then_loads(model, folder, KeyboardInterrupt, monkeypatch)


def test_out_of_memory_names_device_and_tensor(model, folder, monkeypatch):
    fail_at(monkeypatch, Quantizer, "add", 3, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(PlacementError, match=r"cpu ran out of memory at 'transformer\.h\.0"):
        load_and_quantize_model(model, "nf4", folder, device_map="cpu")


@pytest.mark.parametrize("call", [1, 3])
def test_memory_that_a_plain_tensor_lacks_names_device_and_tensor(model, folder, monkeypatch, call):
    fail_at(monkeypatch, execute, "allocate", call, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(PlacementError, match=r"cpu ran out of memory at 'transformer\.(h\.0\.ln_1|wte|wpe)"):
        load_and_quantize_model(model, "nf4", folder, device_map="cpu")
    monkeypatch.undo()
    load_and_quantize_model(model, "nf4", folder, device_map="cpu")


@pytest.mark.parametrize("call", [1, 3, 40])
def test_interrupted_while_the_model_is_changed(model, folder, monkeypatch, call):
    """The exchange itself is undone: the edits go through a dict that raises at the n-th of them."""

    import bigload.pipeline.assembly as room

    apply = room.apply_edits

    def interrupted(edits, then):
        class Raising(dict):
            def __setitem__(self, key, value):
                raise KeyboardInterrupt

        apply([*edits[:call], (Raising(), "key", None), *edits[call:]], then)

    monkeypatch.setattr(room, "apply_edits", interrupted)
    check_untouched_then_loads(model, folder, KeyboardInterrupt, monkeypatch)


def test_file_that_is_cut_while_it_is_read(model, folder, monkeypatch):
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    opened = Feed._open

    def cutting(self):
        os.truncate(shard, len(whole) // 2)
        opened(self)

    monkeypatch.setattr(Feed, "_open", cutting)
    with pytest.raises(CheckpointError, match="truncated meanwhile"):
        load_and_quantize_model(model, "nf4", folder, device_map="cpu")
    monkeypatch.undo()
    shard.write_bytes(whole)
    load_and_quantize_model(model, "nf4", folder, device_map="cpu")


@pytest.mark.cuda
def test_failed_load_gives_the_gpu_its_memory_back(model, folder, monkeypatch):
    load_and_quantize_model(GPT(), "nf4", folder, device_map=0)
    gc.collect()  # bitsandbytes' layers and their weights refer to each other
    before = torch.cuda.memory_allocated()
    fail_at(monkeypatch, Quantizer, "add", 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        load_and_quantize_model(model, "nf4", folder, device_map=0)
    monkeypatch.undo()  # lets go of the exception, whose traceback holds what had landed
    gc.collect()
    assert torch.cuda.memory_allocated() == before
