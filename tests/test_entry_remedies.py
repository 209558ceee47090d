"""What errors of the entry points, pipeline/ and quantization/ ask for is done. tests/test_remedies.py lists them."""

import shutil

import accelerate
import bitsandbytes as bnb
import pytest
import torch
from checkpoints import empty, save_checkpoint
from models import Layers, Net, Pair
from torch import nn
from transformers import BertConfig, BertModel

from bigload import (
    BnbQuantizationConfig,
    dequantize_model,
    load_and_quantize_model,
    plan_device_map,
    quantize_checkpoint,
    save_quantized_model,
)
from bigload.cli import main
from bigload.errors import CheckpointError, ConfigError, PlacementError, QuantizationError
from bigload.hardware import free_memory
from bigload.notation import MODES
from bigload.pipeline import execute


@pytest.fixture
def stored(tmp_path):
    torch.manual_seed(0)
    return save_checkpoint(Layers(), tmp_path / "stored")


def quantized(device="cpu"):
    return load_and_quantize_model(Layers(), "nf4", device_map=device)


def test_a_mode_and_a_device_that_exist_are_taken(stored):
    with pytest.raises(ConfigError, match=f"choose one of {', '.join(MODES)}"):
        load_and_quantize_model(empty(), "nf5", stored)
    with pytest.raises(PlacementError, match=r"use 'cpu' or 'cuda:N'"):
        load_and_quantize_model(empty(), "nf4", stored, device_map="mps:0")
    for mode in MODES:
        assert load_and_quantize_model(empty(), mode, stored, device_map="cpu")


def test_prompt_is_left_out_for_a_model_that_generates_nothing(tmp_path, capsys):
    sizes = {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    BertModel(BertConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path)
    assert main(["load", str(tmp_path), "--device-map", "cpu", "--prompt", "a"]) == 1
    assert "does not generate text; leave --prompt out" in capsys.readouterr().err
    assert main(["load", str(tmp_path), "--device-map", "cpu"]) == 0


def test_checkpoint_is_quantized_where_and_from_what_the_error_says(stored, tmp_path):
    with pytest.raises(CheckpointError, match="pass an empty one as model="):
        quantize_checkpoint(stored, tmp_path / "made", "nf4", device="cpu")
    with pytest.raises(CheckpointError, match=r"overlaps the checkpoint's folder .*: name another folder"):
        quantize_checkpoint(stored, stored / "made", "nf4", model=empty(), device="cpu")
    quantize_checkpoint(stored, tmp_path / "made", "nf4", model=empty(), device="cpu")
    with pytest.raises(CheckpointError, match="is quantized already; give the original checkpoint"):
        quantize_checkpoint(tmp_path / "made", tmp_path / "other", "int8", model=empty(), device="cpu")
    quantize_checkpoint(stored, tmp_path / "other", "int8", model=empty(), device="cpu")
    assert load_and_quantize_model(empty(), None, tmp_path / "other", device_map="cpu")


class Noted(nn.LayerNorm):
    """Keeps a note beside its tensors."""

    as_tensor = False

    def get_extra_state(self):
        return torch.tensor([7]) if self.as_tensor else {"note": 7}

    def set_extra_state(self, state):
        self.note = int(state[0]) if self.as_tensor else state["note"]


def test_extra_state_is_saved_as_a_tensor_or_loaded_without_quantizing_beforehand(tmp_path):
    def build():
        return Net(a=nn.Linear(64, 64), b=nn.Linear(64, 64), norm=Noted(64))

    folder = tmp_path / "stored"
    folder.mkdir()
    torch.save(build().state_dict(), folder / "pytorch_model.bin")
    words = "safetensors cannot hold: load the model with load_and_quantize_model instead"
    with pytest.raises(CheckpointError, match=words):
        quantize_checkpoint(folder, tmp_path / "made", "nf4", model=empty(build), device="cpu")
    model = load_and_quantize_model(empty(build), "nf4", folder, device_map="cpu")
    assert model.norm.note == 7
    with pytest.raises(QuantizationError, match="let get_extra_state return a tensor"):
        save_quantized_model(model, tmp_path / "saved")
    model.norm.as_tensor = True
    save_quantized_model(model, tmp_path / "saved")
    again = empty(build)
    again.norm.as_tensor = True
    assert load_and_quantize_model(again, None, tmp_path / "saved", device_map="cpu").norm.note == 7


@pytest.mark.cuda
def test_model_that_accelerate_dispatches_is_dequantized_without_its_hooks():
    model = accelerate.dispatch_model(quantized("cuda:0"), {"": 0}, force_hooks=True)
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())
    with pytest.raises(QuantizationError, match=r"call remove_hook_from_submodules\(model\) first"):
        dequantize_model(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert type(dequantize_model(model).c_proj) is nn.Linear


def test_layer_with_a_hook_of_accelerate_is_dequantized_without_it():
    model = quantized()
    expected = model(torch.ones(2, 160))
    accelerate.hooks.add_hook_to_module(model.c_proj, accelerate.hooks.ModelHook())
    with pytest.raises(QuantizationError, match=r"call remove_hook_from_submodules\(model\) first"):
        dequantize_model(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    torch.testing.assert_close(model(torch.ones(2, 160)), expected)
    assert type(dequantize_model(model).c_proj) is nn.Linear


def test_disk_that_says_what_is_free_is_taken(stored, tmp_path, monkeypatch):
    def usage(path, known=shutil.disk_usage):
        if "broken" in str(path):
            raise OSError(5, "Input/output error")
        return known(path)

    (tmp_path / "broken").mkdir()
    monkeypatch.setattr(free_memory.shutil, "disk_usage", usage)
    options = {"device_map": "auto", "max_memory": {"cpu": "1GiB"}}
    with pytest.raises(PlacementError, match="choose another folder"):
        plan_device_map(empty(), "nf4", stored, offload_folder=tmp_path / "broken", **options)
    assert plan_device_map(empty(), "nf4", stored, offload_folder=tmp_path / "whole", **options)


@pytest.mark.parametrize("remedy", [{"skip_modules": ["a"]}, {"torch_dtype": "bf16"}, "nf4"], ids=str)
@pytest.mark.parametrize("beforehand", [False, True], ids=["loaded", "file to file"])
def test_values_too_large_for_a_format_are_loaded_in_another(remedy, beforehand, tmp_path):
    model = Net(a=nn.Linear(64, 64), b=nn.Linear(64, 64), norm=nn.LayerNorm(64))
    with torch.no_grad():
        model.a.weight[0, 0] = 1e6
    folder = save_checkpoint(model, tmp_path / "stored")
    build = lambda: empty(Net, a=nn.Linear(64, 64), b=nn.Linear(64, 64), norm=nn.LayerNorm(64))  # noqa: E731

    def load(config):
        if beforehand:
            return quantize_checkpoint(folder, tmp_path / "made", config, model=build(), device="cpu")
        return load_and_quantize_model(build(), config, folder, device_map="cpu")

    mode, fields = ("nf4", {"torch_dtype": "fp16"}) if "torch_dtype" in remedy else ("int8", {})
    words = r"if the checkpoint's own are finite, add (these|it) to skip_modules or choose another mode or torch_dtype"
    with pytest.raises(QuantizationError, match=words):
        load(BnbQuantizationConfig.from_mode(mode, **fields))
    load(remedy if isinstance(remedy, str) else BnbQuantizationConfig.from_mode(mode, **fields | remedy))


def test_memory_that_ran_out_is_enough_once_some_is_free(stored, monkeypatch):
    make, full = execute._make_sink, [True]

    def short_of_memory(*given, **named):
        if full:
            raise torch.OutOfMemoryError("none left")
        return make(*given, **named)

    monkeypatch.setattr(execute, "_make_sink", short_of_memory)
    with pytest.raises(PlacementError, match="choose a smaller mode or free memory there"):
        load_and_quantize_model(empty(), "int8", stored, device_map="cpu")
    full.clear()
    assert load_and_quantize_model(empty(), "int8", stored, device_map="cpu")


@pytest.mark.parametrize("remedy", ["merge", "the adapter's own"])
def test_model_with_an_adapter_is_saved_merged_or_by_peft(remedy, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(quantized(), peft.LoraConfig(target_modules=["c_proj"]))
    with pytest.raises(QuantizationError, match=r"its own save_pretrained, or call merge_and_unload\(\) first"):
        save_quantized_model(model, tmp_path / "saved")
    if remedy == "merge":
        save_quantized_model(model.merge_and_unload(), tmp_path / "saved")
        assert load_and_quantize_model(empty(), None, tmp_path / "saved", device_map="cpu")
    else:
        model.save_pretrained(tmp_path / "adapter")
        assert peft.PeftModel.from_pretrained(quantized(), tmp_path / "adapter")


def test_layers_that_are_not_quantized_or_were_packed_are_saved_after_a_move_or_a_load(stored, tmp_path):
    model = nn.Sequential(bnb.nn.Linear4bit(64, 64), bnb.nn.Linear4bit(64, 64))
    with pytest.raises(QuantizationError, match="not quantized yet; move the model to its device first"):
        save_quantized_model(model, tmp_path / "one")
    save_quantized_model(model.to("cpu"), tmp_path / "one")
    packed = load_and_quantize_model(empty(), "nf4", stored, device_map="cpu")
    packed.c_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(QuantizationError, match=r"load the model again \(one that bigload loaded may run before\)"):
        save_quantized_model(packed, tmp_path / "other")
    again = load_and_quantize_model(empty(), "nf4", stored, device_map="cpu").eval()
    again(torch.ones(2, 160))
    save_quantized_model(again, tmp_path / "other")
    assert load_and_quantize_model(empty(), None, tmp_path / "other", device_map="cpu")


def test_model_that_is_whole_is_saved_and_one_that_is_plain_as_any_other(stored, tmp_path):
    with pytest.raises(ConfigError, match="save it as any other model"):
        save_quantized_model(Pair(), tmp_path / "plain")
    save_checkpoint(Pair(), tmp_path / "plain")
    assert load_and_quantize_model(empty(Pair), "nf4", tmp_path / "plain", device_map="cpu")
    model = quantized()
    model.norm.to("meta")
    with pytest.raises(QuantizationError, match="nothing to save; load the weights first"):
        save_quantized_model(model, tmp_path / "saved")
    save_quantized_model(load_and_quantize_model(empty(), "nf4", stored, device_map="cpu"), tmp_path / "saved")
