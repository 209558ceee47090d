"""A folder that is written is there whole or not at all, and what was there before is lost only when asked."""

import errno
import os
from pathlib import Path

import pytest
from checkpoints import contents, loaded, quantized
from comparisons import assert_same_bits
from failures import fail_at
from resources import open_and_running

from bigload import (
    CheckpointError,
    save_quantized_model,
)


def test_folder_that_is_not_empty_is_replaced_only_when_asked(tmp_path, device):
    model = quantized(tmp_path / "source", device)
    target = tmp_path / "saved"
    target.mkdir()
    save_quantized_model(model, target)  # an empty one
    first = contents(target)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"not empty.*overwrite=True"):
        save_quantized_model(model, target)
    assert contents(target).keys() == first.keys() | {"notes.txt"}
    save_quantized_model(model, target, overwrite=True)
    assert contents(target) == first | {"notes.txt": b"mine"}  # as a tokenizer would be
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved", "source"]


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("call", [1, 2, 9])
@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), CheckpointError, r"saved' cannot be written.*No space left"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=["disk full", "ctrl-c"],
)
def test_save_that_fails_leaves_what_was_there(tmp_path, device, monkeypatch, exists, call, error, raised, message):
    model, target = quantized(tmp_path / "source", device), tmp_path / "saved"
    if exists:
        save_quantized_model(model, target)
    before, held_before = contents(tmp_path), open_and_running()
    fail_at(monkeypatch, os, "pwrite", call, error)
    with pytest.raises(raised, match=message):
        save_quantized_model(model, target, overwrite=True)
    monkeypatch.undo()
    assert contents(tmp_path) == before
    assert target.exists() == exists
    assert len(list(tmp_path.iterdir())) == 1 + exists
    assert not open_and_running() - held_before
    save_quantized_model(model, target, overwrite=True)
    assert_same_bits(loaded(target, device).eval().state_dict(), model.state_dict())


def test_replacing_that_is_interrupted_leaves_the_old_folder(tmp_path, device, monkeypatch):
    model, target = quantized(tmp_path / "source", device), tmp_path / "saved"
    save_quantized_model(model, target)
    before, rename = contents(target), Path.rename

    def failing(self, other):
        if other == target and self.name.startswith(".saved-") and (self / "bigload.json").exists() and not moved:
            moved.append(self)
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, other)

    moved = []
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save_quantized_model(model, target, overwrite=True)
    assert moved
    assert contents(target) == before
    assert len(list(tmp_path.iterdir())) == 2


def test_folder_under_a_file_is_refused(tmp_path, device):
    (tmp_path / "file").write_text("")
    model = quantized(tmp_path / "source", device)
    for target in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(CheckpointError, match=r"is a file|cannot be written"):
            save_quantized_model(model, target)


def test_overwriting_what_is_no_checkpoint_is_refused(tmp_path, device, monkeypatch):
    model = quantized(tmp_path / "source", device)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    (tmp_path / "here").mkdir()
    for target in (tmp_path / "notes", tmp_path):
        with pytest.raises(CheckpointError, match="replaces checkpoints only"):
            save_quantized_model(model, target, overwrite=True)
    monkeypatch.chdir(tmp_path / "here")
    for target in (".", tmp_path / "here"):
        with pytest.raises(CheckpointError, match="name a folder inside it"):
            save_quantized_model(model, target)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"
    save_quantized_model(model, "inside/")
    assert (tmp_path / "here" / "inside" / "model.safetensors").is_file()
