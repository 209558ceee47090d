"""What is saved comes back with the same bits, layers and dtypes; a folder is there whole or not at all."""

import errno
import itertools
import json
import os
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from checkpoints import contents, empty, loaded, quantized, save, save_checkpoint, stored
from comparisons import assert_same_bits, equal, state_of
from failures import fail_at
from models import GPT, Layers
from references import FOUR_BIT, quantized_state
from resources import open_and_running, open_files
from safetensors import safe_open
from torch import nn

from bigload import (
    BnbQuantizationConfig,
    CheckpointError,
    ConfigError,
    QuantizationError,
    load_and_quantize_model,
    save_quantized_model,
)
from bigload.checkpoint import writer
from bigload.quantization.layers import quantized_layers

MODES = (*FOUR_BIT, "int8")
FORMATS = [
    *[(mode, size, storage) for mode in FOUR_BIT for size in (64, 128) for storage in (torch.uint8, torch.bfloat16)],
    ("int8", 64, torch.uint8),
]


def described(model):
    """All that may differ between two models with the same tensors."""
    return [
        (path, type(module).__name__, getattr(module, "compute_dtype", None), module.training)
        for path, module in model.named_modules()
    ]


@pytest.mark.parametrize("max_shard_size", ["5GB", 2_000, 1])
@pytest.mark.parametrize(("mode", "blocksize", "storage"), FORMATS, ids=str)
def test_model_comes_back_bit_for_bit(tmp_path, device, mode, blocksize, storage, max_shard_size):
    """With 1 byte each part of a weight is in a file of its own."""
    model = quantized(tmp_path / "source", device, mode, bnb_4bit_blocksize=blocksize, bnb_4bit_quant_storage=storage)
    save_quantized_model(model, tmp_path / "saved", max_shard_size)
    assert_same_bits(stored(tmp_path / "saved"), model.state_dict())
    again = loaded(tmp_path / "saved", device).eval()
    assert_same_bits(again.state_dict(), model.state_dict())
    assert described(again) == described(model)
    x = torch.randn(3, 160, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("mode", MODES)
def test_files_are_those_that_bitsandbytes_own_state_dict_gives(tmp_path, device, mode):
    full = Layers().bfloat16()
    state = quantized_state(full, mode, device)
    model = load_and_quantize_model(empty(), None, save(state, tmp_path / "own"), device_map=device)
    save_quantized_model(model, tmp_path / "saved")
    assert_same_bits(stored(tmp_path / "saved"), state)


@pytest.mark.parametrize("mode", MODES)
def test_saved_after_it_ran_it_is_what_was_loaded(tmp_path, device, mode):
    """On CPUs with AVX512-BF16 bitsandbytes packs weights when they run, on others it caches; int8 moves its scales."""
    model = quantized(tmp_path / "source", device, mode)
    fresh = state_of(model)
    x = torch.randn(3, 160, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        before = model(x)
    model.train()(x.requires_grad_()).float().sum().backward()
    model.eval()
    save_quantized_model(model, tmp_path / "saved")
    assert_same_bits(stored(tmp_path / "saved"), fresh)
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "saved", device).eval()(x), before)


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_a_choice_of_layers_and_dtypes_comes_back(tmp_path, device, mode):
    model = quantized(
        tmp_path / "source",
        device,
        mode,
        skip_modules=["proj", "head"],
        keep_in_fp32_modules=["norm"],
        bnb_4bit_compute_dtype="fp16",
    )
    model.head.half()  # by hand: no rule says so
    save_quantized_model(model, tmp_path / "saved")
    again = loaded(tmp_path / "saved", device).eval()
    assert_same_bits(again.state_dict(), model.state_dict())
    assert described(again) == described(model)
    assert (again.norm.weight.dtype, again.head.weight.dtype) == (torch.float32, torch.float16)
    assert type(again.proj) is nn.Linear
    assert quantized_layers(again).keys() == {"c_proj", "odd"}


def test_what_the_weights_do_not_say_may_be_chosen_anew(tmp_path, device):
    save_quantized_model(quantized(tmp_path / "source", device, "nf4"), tmp_path / "saved")
    again = loaded(
        tmp_path / "saved", device, config=BnbQuantizationConfig.from_mode("nf4", bnb_4bit_compute_dtype="fp32")
    ).eval()
    assert again.c_proj.compute_dtype == torch.float32
    assert again.norm.weight.dtype == torch.bfloat16  # as it was saved
    with pytest.raises(ConfigError, match="quantized already"):
        loaded(tmp_path / "saved", device, config="fp4").eval()
    save_quantized_model(quantized(tmp_path / "source", device, "int8"), tmp_path / "int8")
    config = BnbQuantizationConfig.from_mode("int8", llm_int8_threshold=3.0)
    assert loaded(tmp_path / "int8", device, config=config).eval().c_proj.state.threshold == 3.0


def test_threshold_and_compute_dtype_come_back(tmp_path, device):
    model = quantized(tmp_path / "source", device, "int8", llm_int8_threshold=2.5)
    save_quantized_model(model, tmp_path / "int8")
    assert loaded(tmp_path / "int8", device).eval().c_proj.state.threshold == 2.5
    model = quantized(tmp_path / "source", device, "nf4", bnb_4bit_compute_dtype="fp32")
    save_quantized_model(model, tmp_path / "nf4")
    assert loaded(tmp_path / "nf4", device).eval().c_proj.compute_dtype == torch.float32


def test_trainable_main_weights_come_back_with_their_layers(tmp_path, device):
    model = quantized(tmp_path / "source", device, "int8-training", skip_modules=["proj"])
    save_quantized_model(model, tmp_path / "saved")
    again = loaded(tmp_path / "saved", device).eval()
    assert_same_bits(again.state_dict(), model.state_dict())
    assert quantized_layers(again).keys() == quantized_layers(model).keys()
    assert again.c_proj.state.has_fp16_weights
    assert again.c_proj.weight.requires_grad


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(96, 64)
        self.body = nn.Linear(64, 64)
        self.proj = nn.Linear(64, 64)
        self.sub_proj = nn.Linear(64, 64)
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.sub_proj(self.proj(self.body(self.embedding(x)))))


@pytest.mark.parametrize("made_on_meta", [False, True])
def test_tied_weights_are_stored_once_and_tied_again(tmp_path, device, made_on_meta):
    """torch's own meta device unties them, as accelerate's `init_empty_weights` does."""
    model = quantized(tmp_path / "source", device, build=Tied)
    save_quantized_model(model, tmp_path / "saved")
    assert "head.weight" not in stored(tmp_path / "saved")
    with torch.device("meta"):
        untied = Tied()
    untied.head.weight = nn.Parameter(torch.empty(96, 64, device="meta"))
    target = untied if made_on_meta else empty(Tied)
    again = load_and_quantize_model(target, None, tmp_path / "saved", device_map=device, strict=True)
    assert again.head.weight is again.embedding.weight
    assert_same_bits(again.state_dict(), model.state_dict())


def test_a_subclass_of_linear_that_was_named_quantizable_is_quantized_again(tmp_path, device):
    class Own(nn.Linear):
        def merged(self):
            return self.weight

    def build():
        return nn.ModuleDict({"fc": Own(64, 64), "plain": Own(64, 64), "head": nn.Linear(64, 2)})

    save_checkpoint(build(), tmp_path / "source")
    config = BnbQuantizationConfig.from_mode("nf4", skip_modules=["plain"])
    model = load_and_quantize_model(empty(build), config, tmp_path / "source", device_map=device, quantizable=[Own])
    save_quantized_model(model, tmp_path / "saved")
    again = load_and_quantize_model(empty(build), None, tmp_path / "saved", device_map=device)
    assert quantized_layers(again).keys() == {"fc", "head"}
    assert_same_bits(again.state_dict(), model.state_dict())


def test_model_that_is_itself_a_layer(tmp_path, device):
    torch.manual_seed(0)
    layer = nn.Linear(64, 64).bfloat16()
    model = load_and_quantize_model(layer, BnbQuantizationConfig.from_mode("nf4", skip_modules=[]), device_map=device)
    save_quantized_model(model, tmp_path / "saved")
    again = load_and_quantize_model(empty(nn.Linear, 64, 64), None, tmp_path / "saved", device_map=device)
    assert isinstance(again, bnb.nn.Linear4bit)
    assert_same_bits(again.state_dict(), model.state_dict())


def test_model_whose_layers_bitsandbytes_made_itself_is_saved_too(tmp_path, device):
    torch.manual_seed(0)
    model = nn.Sequential(bnb.nn.Linear4bit(128, 64, quant_type="nf4", compute_dtype=torch.bfloat16), nn.Linear(64, 4))
    model = model.to(device)
    if device.type == "cpu":
        model[0].weight = model[0].weight.to("cpu")
        model[0].weight._quantize("cpu") if not model[0].weight.bnb_quantized else None
    save_quantized_model(model, tmp_path / "saved")
    again = load_and_quantize_model(
        empty(lambda: nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 4))), None, tmp_path / "saved", device_map=device
    )
    assert_same_bits(again.state_dict(), model.state_dict())


def test_files_hold_no_more_than_asked_and_an_index_names_each_tensor_once(tmp_path, device):
    model = quantized(tmp_path / "source", device)
    save_quantized_model(model, tmp_path / "saved", "4KB")
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    found = {}
    for file in sorted((tmp_path / "saved").glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            sizes = {name: opened.get_tensor(name).nbytes for name in opened.keys()}  # noqa: SIM118
            assert opened.metadata() == {"format": "pt"}
        assert len(sizes) == 1 or sum(sizes.values()) <= 4000
        found |= dict.fromkeys(sizes, file.name)
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.state_dict().values())
    save_quantized_model(model, tmp_path / "one")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["bigload.json", "model.safetensors"]


# What is refused, and what is left of it.


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


def test_writes_that_take_less_than_given_are_continued(tmp_path, device, monkeypatch):
    model, write = quantized(tmp_path / "source", device), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, buffer, offset: write(descriptor, buffer[:777], offset))
    save_quantized_model(model, tmp_path / "saved")
    assert_same_bits(stored(tmp_path / "saved"), model.state_dict())


def test_folder_under_a_file_is_refused(tmp_path, device):
    (tmp_path / "file").write_text("")
    model = quantized(tmp_path / "source", device)
    for target in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(CheckpointError, match=r"is a file|cannot be written"):
            save_quantized_model(model, target)


@pytest.mark.parametrize("size", [0, -1, "much", 1.5, None, "0GB"])
def test_size_that_is_none_is_refused(tmp_path, device, size):
    with pytest.raises(ConfigError, match="max_shard_size"):
        save_quantized_model(quantized(tmp_path / "source", device), tmp_path / "saved", size)
    assert not (tmp_path / "saved").exists()


def test_models_that_cannot_come_back_are_refused(tmp_path, device):
    with pytest.raises(ConfigError, match="no layer that bitsandbytes quantized"):
        save_quantized_model(GPT(), tmp_path / "saved")
    model = quantized(tmp_path / "source", device)
    model.norm.to("meta")
    with pytest.raises(QuantizationError, match=r"'norm\.weight'.*on meta"):
        save_quantized_model(model, tmp_path / "saved")
    one, other = quantized(tmp_path / "source", device, "nf4"), quantized(tmp_path / "source", device, "int8")
    one.odd = other.odd
    with pytest.raises(QuantizationError, match=r"'c_proj'.*'odd'.*another way"):
        save_quantized_model(one, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_weights_that_bitsandbytes_packed_are_refused(tmp_path):
    model = quantized(tmp_path / "source", "cpu")
    model.c_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(QuantizationError, match="'c_proj': packed by bitsandbytes"):
        save_quantized_model(model, tmp_path / "saved")


def test_overwriting_what_is_no_checkpoint_is_refused(tmp_path, device, monkeypatch):
    model = quantized(tmp_path / "source", device)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    (tmp_path / "here").mkdir()
    for target in (tmp_path / "notes", tmp_path):
        with pytest.raises(CheckpointError, match="something else"):
            save_quantized_model(model, target, overwrite=True)
    monkeypatch.chdir(tmp_path / "here")
    for target in (".", tmp_path / "here"):
        with pytest.raises(CheckpointError, match="name a folder inside it"):
            save_quantized_model(model, target)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"
    save_quantized_model(model, "inside/")
    assert (tmp_path / "here" / "inside" / "model.safetensors").is_file()


class SharedLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = self.first
        self.head = nn.Linear(64, 4)


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
def test_layer_under_two_names_is_stored_once_with_all_its_parts(tmp_path, device, mode):
    model = quantized(tmp_path / "source", device, mode, SharedLayer)
    save_quantized_model(model, tmp_path / "saved")
    assert not any(name.startswith("second.") for name in stored(tmp_path / "saved"))
    again = loaded(tmp_path / "saved", device, build=SharedLayer).eval()
    assert again.second is again.first
    assert_same_bits(again.state_dict(), model.state_dict())


def test_layers_that_were_never_quantized_or_have_adapters_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    for layer in (bnb.nn.Linear4bit(64, 64), bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)):
        with pytest.raises(QuantizationError, match="'0': not quantized yet"):
            save_quantized_model(nn.Sequential(layer), tmp_path / "saved")
    adapted = peft.get_peft_model(quantized(tmp_path / "source", "cpu"), peft.LoraConfig(target_modules=["c_proj"]))
    with pytest.raises(QuantizationError, match="merge_and_unload"):
        save_quantized_model(adapted, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_layers_that_compute_differently_are_refused(tmp_path, device):
    model = quantized(tmp_path / "source", device)
    model.odd.compute_dtype = torch.float32
    with pytest.raises(QuantizationError, match=r"'c_proj', 'odd' are quantized, or compute, each in another way"):
        save_quantized_model(model, tmp_path / "saved")


def test_extra_state_that_is_no_tensor_is_refused(tmp_path, device):
    model = quantized(tmp_path / "source", device)
    type(model.norm).get_extra_state, before = (lambda self: 7), type(model.norm).get_extra_state
    try:
        with pytest.raises(QuantizationError, match=r"'norm\._extra_state': extra state"):
            save_quantized_model(model, tmp_path / "saved")
    finally:
        type(model.norm).get_extra_state = before


def test_compiled_model_is_saved_under_its_own_names(tmp_path, device):
    model = quantized(tmp_path / "source", device)
    save_quantized_model(torch.compile(model), tmp_path / "saved")
    assert_same_bits(stored(tmp_path / "saved"), model.state_dict())


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


# The record beside the weights.


def changed_record(folder, **changes):
    path = folder / "bigload.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2, this bigload knows 1"),
        ({"format_version": "1"}, "damaged: it names no format_version"),
        ({"layers": "all"}, "damaged.*no list of names"),
        ({"ties": [1]}, "damaged.*no list of names"),
        ({"config": {"load_in_4bit": "yes"}}, "damaged.*load_in_4bit"),
        ({"config": {"load_in_2bit": True}}, "damaged.*load_in_2bit"),
        ({"config": None}, "damaged"),
    ],
)
def test_damaged_record_is_refused(tmp_path, device, changes, message):
    save_quantized_model(quantized(tmp_path / "source", device), tmp_path / "saved")
    changed_record(tmp_path / "saved", **changes)
    with pytest.raises(CheckpointError, match=message):
        loaded(tmp_path / "saved", device).eval()


def test_record_that_is_no_json_is_refused_and_one_of_other_weights_has_no_say(tmp_path, device, caplog):
    model = quantized(tmp_path / "source", device, bnb_4bit_compute_dtype="fp32")
    save_quantized_model(model, tmp_path / "saved")
    changed_record(tmp_path / "saved", layout="of others")
    again = loaded(tmp_path / "saved", device).eval()
    assert again.c_proj.compute_dtype == torch.bfloat16  # the checkpoint's own, since nothing says otherwise
    assert equal(again.c_proj.weight.data, model.c_proj.weight.data)
    assert "written with other weights" in caplog.text
    (tmp_path / "saved" / "bigload.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"bigload\.json' is damaged"):
        loaded(tmp_path / "saved", device).eval()


def test_recorded_layer_that_the_model_lacks_is_an_error(tmp_path, device):
    save_quantized_model(quantized(tmp_path / "source", device, "int8-training"), tmp_path / "saved")
    changed_record(tmp_path / "saved", layers=["norm"])
    with pytest.raises(CheckpointError, match="'norm': quantized when it was saved"):
        loaded(tmp_path / "saved", device).eval()


def test_dtype_that_safetensors_lacks_is_an_error(tmp_path, device, monkeypatch):
    model = quantized(tmp_path / "source", device)
    monkeypatch.delitem(writer._NAMES, torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"is torch\.bfloat16, which safetensors files cannot hold"):
        save_quantized_model(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_record_of_what_was_there_before_has_no_say(tmp_path, device, caplog):
    """Another library saved another model over ours."""
    model = quantized(tmp_path / "source", device, "nf4", bnb_4bit_compute_dtype="fp32")
    save_quantized_model(model, tmp_path / "saved")
    save(quantized_state(Layers().bfloat16(), "fp4", device), tmp_path / "saved")
    again = load_and_quantize_model(empty(), None, tmp_path / "saved", device_map=device)
    assert again.c_proj.weight.quant_type == again.c_proj.weight.quant_state.quant_type == "fp4"
    assert "written with other weights" in caplog.text


def test_a_torch_dtype_that_is_asked_for_counts(tmp_path, device):
    save_quantized_model(quantized(tmp_path / "source", device, "nf4"), tmp_path / "saved")
    config = BnbQuantizationConfig.from_mode("nf4", torch_dtype="fp32")
    assert loaded(tmp_path / "saved", device, config=config).eval().norm.weight.dtype == torch.float32


# Files made lasting beside the writing.


@pytest.mark.parametrize("call", [1, 3, 8])
def test_disk_that_fails_when_a_file_is_made_lasting_is_an_error(tmp_path, device, monkeypatch, call):
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
