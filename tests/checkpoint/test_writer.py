"""Files of weights: their sizes and index, few descriptors, and durable before the folder is in place."""

import errno
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from checkpoints import quantized, stored
from comparisons import assert_same_bits
from resources import open_files
from safetensors import safe_open

from bigload import (
    CheckpointError,
    ConfigError,
    save_quantized_model,
)
from bigload.checkpoint import writer


def weight_of(name):
    """Return the name of the weight that a part belongs to, and any other name as it is."""
    layer, weight, _ = name.partition(".weight.")
    if weight:
        return f"{layer}.weight"
    layer, _, last = name.rpartition(".")
    return f"{layer}.weight" if last in ("SCB", "weight_format") else name


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
def test_files_hold_no_more_than_asked_and_an_index_names_each_tensor_once(tmp_path, device, mode):
    """A larger weight has a file of its own, with all its parts: diffusers reads each file by itself."""
    model = quantized(tmp_path / "source", device, mode)
    save_quantized_model(model, tmp_path / "saved", "4KB")
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    found = {}
    for file in sorted((tmp_path / "saved").glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            sizes = {name: opened.get_tensor(name).nbytes for name in opened.keys()}  # noqa: SIM118
            assert opened.metadata() == {"format": "pt"}
        assert len(set(map(weight_of, sizes))) == 1 or sum(sizes.values()) <= 4000
        assert found.keys().isdisjoint(sizes)
        assert {weight_of(name) for name in sizes}.isdisjoint(map(weight_of, found))
        found |= dict.fromkeys(sizes, file.name)
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.state_dict().values())
    save_quantized_model(model, tmp_path / "one")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "README.md",
        "bigload.json",
        "model.safetensors",
    ]


def test_writes_that_take_less_than_given_are_continued(tmp_path, device, monkeypatch):
    model, write = quantized(tmp_path / "source", device), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, buffer, offset: write(descriptor, buffer[:777], offset))
    save_quantized_model(model, tmp_path / "saved")
    assert_same_bits(stored(tmp_path / "saved"), model.state_dict())


@pytest.mark.parametrize("size", [0, -1, "much", 1.5, None, "0GB"])
def test_size_that_is_none_is_refused(tmp_path, device, size):
    with pytest.raises(ConfigError, match="max_shard_size"):
        save_quantized_model(quantized(tmp_path / "source", device), tmp_path / "saved", size)
    assert not (tmp_path / "saved").exists()


def test_many_files_need_no_more_descriptors_than_few(tmp_path, device, monkeypatch):
    model = quantized(tmp_path / "source", device)
    before, most, write = open_files(), [], os.pwrite

    def watched(*arguments):
        most.append(len(open_files() - before))
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", watched)
    save_quantized_model(model, tmp_path / "saved", 1)
    assert max(most) <= 2 + 4  # the folder, the file, and those that wait for the disk
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 8


def test_dtype_that_safetensors_lacks_is_an_error(tmp_path, device, monkeypatch):
    model = quantized(tmp_path / "source", device)
    monkeypatch.delitem(writer._NAMES, torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"is torch\.bfloat16, which safetensors files cannot hold"):
        save_quantized_model(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("call", [1, 3, 8])
def test_disk_that_fails_when_a_file_is_made_durable_is_an_error(tmp_path, device, monkeypatch, call):
    model, sync, calls = quantized(tmp_path / "source", device), os.fsync, itertools.count(1)

    def failing(descriptor):
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(CheckpointError, match="No space left"):
        save_quantized_model(model, tmp_path / "saved", 1)
    assert not (tmp_path / "saved").exists()
    monkeypatch.undo()
    save_quantized_model(model, tmp_path / "saved", 1)
    assert_same_bits(stored(tmp_path / "saved"), model.state_dict())


def test_large_files_go_to_the_disk_while_they_are_written(tmp_path, device, monkeypatch):
    monkeypatch.setattr("bigload.checkpoint.writer._SYNC_BYTES", 2**10)
    monkeypatch.setattr("bigload.checkpoint.writer._STAGED_BYTES", 2**10)
    model, sync, synced = quantized(tmp_path / "source", device), os.fsync, []

    def watched(descriptor):
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    save_quantized_model(model, tmp_path / "saved")
    assert synced.count("model.safetensors.partial") > 1
    assert_same_bits(stored(tmp_path / "saved"), model.state_dict())
