"""What the errors of this wing ask for is done, and the load or the save goes on. tests/test_remedies.py lists them."""

import json
import os
import shutil

import pytest
import torch
from checkpoints import empty, save, save_checkpoint
from models import Layers, Pair
from references import quantized_state
from safetensors.torch import save_file

from bigload import load_and_quantize_model, save_quantized_model
from bigload.errors import CheckpointError, ConfigError


def cut(file):
    os.truncate(file, file.stat().st_size - 8)


def lfs_pointer(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def overlong_header(file):
    file.write_bytes((2**40).to_bytes(8, "little") + file.read_bytes()[8:])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (cut, r"the file has \d+; download it again"),
        (overlong_header, "its first bytes say .*; download it again"),
        (lfs_pointer, "git lfs pull"),
        (os.remove, "shards that are not in its folder: .*; download the checkpoint again"),
    ],
)
def test_file_that_is_fetched_again_is_loaded(tmp_path, spoil, words):
    folder = save_checkpoint(Pair(), tmp_path / "there", shards=2)
    here = shutil.copytree(folder, tmp_path / "here")
    file = sorted(here.glob("*.safetensors"))[0]
    spoil(file)
    with pytest.raises(CheckpointError, match=words):
        load_and_quantize_model(empty(Pair), "nf4", here)
    shutil.copy(folder / file.name, file)
    assert load_and_quantize_model(empty(Pair), "nf4", here)


def test_file_that_is_named_is_loaded(tmp_path):
    state = Pair().state_dict()
    for name in ("one", "other"):
        save_file(state, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"several .* files, .*: name the one to load"):
        load_and_quantize_model(empty(Pair), "nf4", tmp_path)
    with pytest.raises(CheckpointError, match="say where the weights are"):
        load_and_quantize_model(empty(Pair), "nf4", "")
    assert load_and_quantize_model(empty(Pair), "nf4", tmp_path / "one.safetensors")


class Harmful:
    def __reduce__(self):
        return os.getcwd, ()


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ({"model": Pair().state_dict(), "epoch": 3}, "'model'.* save that part alone"),
        ({**Pair().state_dict(), "optimizer": Harmful()}, "save its state_dict alone, best as safetensors"),
    ],
    ids=["more", "code"],
)
def test_state_dict_that_is_saved_alone_is_loaded(tmp_path, held, words):
    torch.save(held, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=words):
        load_and_quantize_model(empty(Pair), "nf4", tmp_path)
    torch.save(held.get("model", Pair().state_dict()), tmp_path / "pytorch_model.bin")
    assert load_and_quantize_model(empty(Pair), "nf4", tmp_path)
    save_file(Pair().state_dict(), tmp_path / "model.safetensors")
    assert load_and_quantize_model(empty(Pair), "nf4", tmp_path)


@pytest.mark.parametrize("remedy", ["remove it", "save again", "newer"])
def test_record_that_is_damaged_is_removed_or_written_again(tmp_path, remedy):
    model = load_and_quantize_model(Pair(), "nf4", device_map="cpu")
    save_quantized_model(model, tmp_path / "saved")
    record = tmp_path / "saved" / "bigload.json"
    said = json.loads(record.read_text())
    if remedy == "newer":
        record.write_text(json.dumps(said | {"format_version": 10**6}))
        words = "install a newer one"
    else:
        record.write_text("{")
        words = "remove it to load the weights without it, or save the model again"
    with pytest.raises(CheckpointError, match=words):
        load_and_quantize_model(empty(Pair), None, tmp_path / "saved")
    if remedy == "remove it":
        record.unlink()
    elif remedy == "newer":
        record.write_text(json.dumps(said))  # which a version that writes it reads
    else:
        save_quantized_model(model, tmp_path / "saved", overwrite=True)
    again = load_and_quantize_model(empty(Pair), None, tmp_path / "saved")
    assert torch.equal(again.fc1.weight.data.cpu(), model.fc1.weight.data)


def test_folder_of_another_name_is_written(tmp_path):
    model = load_and_quantize_model(Pair(), "nf4", device_map="cpu")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full" / "notes").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="is a file: name a folder"):
        save_quantized_model(model, tmp_path / "file")
    with pytest.raises(CheckpointError, match="not empty: name another folder"):
        save_quantized_model(model, tmp_path / "full")
    with pytest.raises(CheckpointError, match="replaces checkpoints only; name another folder"):
        save_quantized_model(model, tmp_path / "full", overwrite=True)
    save_quantized_model(model, tmp_path / "another")
    assert load_and_quantize_model(empty(Pair), None, tmp_path / "another")


def test_config_that_contradicts_is_left_out_or_the_original_is_loaded(tmp_path):
    full = Layers().to(torch.float16)
    save(quantized_state(full, "nf4", "cpu"), tmp_path / "quantized")
    save_checkpoint(full, tmp_path / "original")
    words = "pass None for the checkpoint's own config, or give the original checkpoint"
    with pytest.raises(ConfigError, match=words):
        load_and_quantize_model(empty(Layers), "int8", tmp_path / "quantized", device_map="cpu")
    for config, folder in ((None, "quantized"), ("int8", "original")):
        assert load_and_quantize_model(empty(Layers), config, tmp_path / folder, device_map="cpu")


def test_original_of_what_another_method_quantized_is_loaded(tmp_path):
    state = Pair().state_dict()
    packed = {
        "fc1.qweight": torch.zeros(8, 128, dtype=torch.int32),
        "fc1.qzeros": torch.zeros(1, 16, dtype=torch.int32),
    }
    packed |= {"fc1.scales": torch.ones(1, 128, dtype=torch.float16), "fc1.g_idx": torch.zeros(64, dtype=torch.int32)}
    save({name: value for name, value in state.items() if name != "fc1.weight"} | packed, tmp_path / "gptq")
    save(state, tmp_path / "original")
    with pytest.raises(CheckpointError, match="Use the original checkpoint, or load this one with the library"):
        load_and_quantize_model(empty(Pair), "nf4", tmp_path / "gptq")
    assert load_and_quantize_model(empty(Pair), "nf4", tmp_path / "original")
