"""Each kind of bad input is one clear BigloadError, and the same model object loads from a good checkpoint after it."""

import struct

import bitsandbytes as bnb
import pytest
import torch
from checkpoints import INDEX_NAME, empty, save, save_checkpoint, stored, write_index
from comparisons import identity_of
from models import GPT

from bigload import (
    BigloadError,
    BnbQuantizationConfig,
    CheckpointError,
    ConfigError,
    PlacementError,
    load_and_quantize_model,
)

NO_SUCH_GPU = f"cuda:{torch.cuda.device_count() + 5}"


def edit(folder, change):
    state = stored(folder)
    change(state)
    return save(state, folder)


def cut(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    return folder


def overwrite(folder, start, raw):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[start : start + len(raw)] = raw
    path.write_bytes(bytes(data))
    return folder


def empty_folder(folder):
    (folder / "model.safetensors").unlink()
    (folder / "notes.txt").write_text("nothing here")
    return folder


def index_of_missing_shard(folder):
    return write_index({"lm_head.weight": "model-00002-of-00002.safetensors"}, folder / INDEX_NAME)


def transposed_head(state):
    state["lm_head.weight"] = state["lm_head.weight"].T.contiguous()


def without_two(state):
    del state["transformer.wte.weight"], state["transformer.h.1.attn.c_attn.bias"]


def with_int8(state):
    state["transformer.h.0.attn.c_attn.weight"] = torch.ones(192, 64, dtype=torch.int8)


def with_infinity(state):
    state["transformer.h.0.attn.c_attn.weight"][0, 0] = float("inf")


# name: (what is done to a good checkpoint, arguments, the error, what its message must name)
BAD_CHECKPOINTS = {
    "no such path": (lambda f: f / "nowhere", CheckpointError, ["nowhere"]),
    "folder without weights": (empty_folder, CheckpointError, ["notes.txt", "model.safetensors"]),
    "truncated file": (lambda f: cut(f, -100), CheckpointError, ["model.safetensors", "truncated"]),
    "header longer than the file": (
        lambda f: overwrite(f, 0, struct.pack("<Q", 2**40)),
        CheckpointError,
        ["model.safetensors", str(2**40)],
    ),
    "header that is not JSON": (lambda f: overwrite(f, 8, b"}{"), CheckpointError, ["model.safetensors", "JSON"]),
    "missing shard": (index_of_missing_shard, CheckpointError, ["model-00002-of-00002.safetensors"]),
    "wrong shape": (lambda f: edit(f, transposed_head), CheckpointError, ["lm_head.weight", "(64, 96)", "(96, 64)"]),
    "missing keys": (
        lambda f: edit(f, without_two),
        CheckpointError,
        ["transformer.wte.weight", "transformer.h.1.attn.c_attn.bias"],
    ),
    "already quantized": (lambda f: edit(f, with_int8), CheckpointError, ["c_attn.weight", "int8"]),
    "infinite weight": (lambda f: edit(f, with_infinity), BigloadError, ["transformer.h.0.attn.c_attn.weight"]),
    "pickled checkpoint": (lambda f: (f / "model.safetensors").rename(f / "m.bin"), CheckpointError, ["m.bin"]),
}

BAD_ARGUMENTS = {
    "unknown mode": ({"bnb_quantization_config": "nf5"}, ConfigError, ["nf5", "nf4-dq"]),
    "no config": ({"bnb_quantization_config": None}, ConfigError, ["None"]),
    "config of the wrong type": ({"bnb_quantization_config": 4}, ConfigError, ["int"]),
    "both modes": ({"bnb_quantization_config": {"load_in_4bit": True, "load_in_8bit": True}}, ConfigError, ["both"]),
    "neither mode": ({"bnb_quantization_config": {}}, ConfigError, ["neither"]),
    "no weights": ({"weights_location": None}, CheckpointError, ["weights_location", "transformer.wte.weight"]),
    "no such device": ({"device_map": NO_SUCH_GPU}, PlacementError, [NO_SUCH_GPU]),
    "no device at all": ({"device_map": "gpu please"}, PlacementError, ["gpu please"]),
    "no such device in a map": ({"device_map": {"": 99}}, PlacementError, ["cuda:99"]),
    "uncovered blocks": ({"device_map": {"transformer": "cpu"}}, PlacementError, ["lm_head.weight"]),
    "budget too small": ({"max_memory": {"cpu": "10KB"}}, PlacementError, ["cpu", "9.77 KiB"]),
    "budget without meaning": ({"max_memory": {"cpu": "much"}}, PlacementError, ["much"]),
    "budget that is no dict": ({"max_memory": 5}, PlacementError, ["max_memory", "5"]),
    "budget for no device": ({"max_memory": {"gpu": 5}}, PlacementError, ["max_memory", "gpu"]),
    "empty path": ({"weights_location": ""}, CheckpointError, ["weights_location"]),
    "path that is none": ({"weights_location": 7}, CheckpointError, ["7"]),
    "negative budget": ({"max_memory": {"cpu": -1}}, PlacementError, ["-1"]),
}


def check_refused_and_loadable_after(tmp_path, error, words, **arguments):
    good = save_checkpoint(GPT(), tmp_path / "good")
    model = empty(GPT)
    before = identity_of(model)
    call = {"bnb_quantization_config": "int8", "weights_location": good, "device_map": "cpu"} | arguments
    with pytest.raises(error) as caught:
        load_and_quantize_model(model, **call)
    assert isinstance(caught.value, BigloadError)
    for word in words:
        assert word in str(caught.value)
    assert identity_of(model) == before
    model = load_and_quantize_model(model, "nf4", good, device_map="cpu")
    assert isinstance(model.transformer["h"][1].attn.c_attn, bnb.nn.Linear4bit)
    model(torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoint_is_refused(tmp_path, case):
    spoil, error, words = BAD_CHECKPOINTS[case]
    bad = spoil(save_checkpoint(GPT(), tmp_path / "bad"))
    check_refused_and_loadable_after(tmp_path, error, words, weights_location=bad)


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_argument_is_refused(tmp_path, case):
    arguments, error, words = BAD_ARGUMENTS[case]
    check_refused_and_loadable_after(tmp_path, error, words, **arguments)


def test_disk_without_a_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("bigload.planning.units.RESIDENT_BYTES", 2000)
    for device_map in ("disk", {"": "cpu", "transformer.h.1": "disk"}):
        check_refused_and_loadable_after(
            tmp_path, PlacementError, ["transformer.h.", "offload_folder"], device_map=device_map
        )


def test_leftover_tensors_warn_and_under_strict_are_an_error(tmp_path, logged):
    bad = save_checkpoint(GPT(), tmp_path / "bad")
    edit(bad, lambda state: state.update(extra=torch.zeros(3)))
    model = empty(GPT)
    with pytest.raises(CheckpointError, match="extra") as caught:
        load_and_quantize_model(model, "nf4", bad, device_map="cpu", strict=True)
    assert caught.value.unexpected_keys == ["extra"]
    load_and_quantize_model(model, "nf4", bad, device_map="cpu")
    assert "extra" in logged.text


def test_errors_are_also_the_builtins_that_accelerate_raises():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(PlacementError, ValueError)
    assert issubclass(CheckpointError, RuntimeError)
    with pytest.raises(ValueError, match="both"):
        BnbQuantizationConfig(load_in_4bit=True, load_in_8bit=True)
