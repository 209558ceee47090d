"""A loaded model saves by the library that its class comes from, and comes back with the same bits."""

import json
import warnings

import pytest
import torch
from architectures import build, inputs
from checkpoints import contents, empty, empty_like, save_checkpoint
from comparisons import assert_same_bits, outputs, state_of
from models import GPT
from references import dequantize_by_hand, quantize_as_bitsandbytes
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertModel, PretrainedConfig, PreTrainedModel

from bigload import BnbQuantizationConfig, load_and_quantize_model

MODES = ("nf4", "nf4-dq", "fp4", "int8")
ARCHITECTURES = ("llama", "llama_tied", "gpt2", "t5", "bert")
OF_TRANSFORMERS = ("is_quantized", "quantization_method", "hf_quantizer")


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


@pytest.fixture(params=ARCHITECTURES)
def name(request):
    return request.param


def loaded(full, mode, folder, **fields):
    save_checkpoint(full, folder)
    config = BnbQuantizationConfig.from_mode(mode, **fields)
    return load_and_quantize_model(empty_like(full), config, folder, device_map="cpu")


def test_from_pretrained_restores_what_save_pretrained_wrote_bit_by_bit(tmp_path, name, mode):
    """Saved before it ran and after it, the files are the same, so one reading shows both."""
    model = loaded(build(name), mode, tmp_path / "full")
    before = state_of(model)
    model.save_pretrained(tmp_path / "fresh")
    outputs(model, **inputs(name))
    model.save_pretrained(tmp_path / "saved")
    assert contents(tmp_path / "saved") == contents(tmp_path / "fresh")
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    assert_same_bits(again.state_dict(), before)
    assert [type(module) for module in again.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(outputs(again, **inputs(name)), outputs(model, **inputs(name)))


def test_saved_config_lists_the_modules_that_were_not_quantized(tmp_path, name, mode):
    skipped = {"llama": "k_proj", "llama_tied": "up_proj", "gpt2": "c_fc", "t5": "wi", "bert": "query"}[name]
    model = loaded(build(name), mode, tmp_path / "full", skip_modules=[skipped])
    model.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    plain = {path for path, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")}
    assert any(path.endswith(skipped) for path in plain)
    assert set(written["llm_int8_skip_modules"]) == plain
    assert written["quant_method"] == "bitsandbytes"
    assert (written["load_in_4bit"], written["load_in_8bit"]) == (mode != "int8", mode == "int8")
    again = type(model).from_pretrained(tmp_path / "saved")
    assert_same_bits(again.state_dict(), model.state_dict())


class Endings(PreTrainedModel):
    """A head whose path is the ending of another layer's."""

    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.in_proj = nn.Linear(64, 64)
        self.proj = nn.Linear(64, 8)
        self.post_init()

    def forward(self, x):
        return self.proj(self.in_proj(x))


def test_saved_skip_list_names_no_quantized_module_by_its_ending(tmp_path, mode):
    model = loaded(Endings(PretrainedConfig()), mode, tmp_path / "full")
    assert type(model.in_proj) is not nn.Linear
    assert type(model.proj) is nn.Linear
    model.save_pretrained(tmp_path / "saved")
    again = Endings.from_pretrained(tmp_path / "saved")
    assert_same_bits(again.state_dict(), model.state_dict())


def test_saving_a_model_that_lies_on_the_cpu_warns_of_no_offloading(tmp_path):
    model = loaded(build("llama"), "nf4", tmp_path / "full")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*offloaded modules")
        model.save_pretrained(tmp_path / "saved")


def test_state_dict_of_a_plain_module_is_a_file_with_the_bits_it_had_before_it_ran(tmp_path, mode):
    full = GPT()
    model = load_and_quantize_model(GPT(), mode, save_checkpoint(full, tmp_path / "full"), device_map="cpu").eval()
    before = state_of(model)
    with torch.no_grad():
        model(torch.randint(0, 96, (2, 12)))
    save_file(model.state_dict(), tmp_path / "quantized.safetensors")
    saved = load_file(tmp_path / "quantized.safetensors")
    assert_same_bits(saved, before)
    # And they say what was loaded.
    path = "transformer.h.1.mlp.c_proj"
    expected = quantize_as_bitsandbytes(full.get_submodule(path).weight.detach(), mode)
    assert torch.equal(saved[f"{path}.weight"], expected["weight"])
    scales = f"{path}.SCB" if mode == "int8" else f"{path}.weight.absmax"
    parts = expected | {"SCB" if mode == "int8" else "absmax": saved[scales]}
    restored, original = dequantize_by_hand(parts, (64, 256)), dequantize_by_hand(expected, (64, 256))
    assert torch.equal(restored, original)


def test_loaded_model_of_transformers_carries_all_that_its_own_loader_sets(tmp_path, name, mode):
    full = build(name)
    model = loaded(full, mode, tmp_path)
    full.save_pretrained(tmp_path / "own")
    quantization = BnbQuantizationConfig.from_mode(mode).to_transformers()
    theirs = type(full).from_pretrained(tmp_path / "own", quantization_config=quantization, device_map={"": "cpu"})
    assert model.is_quantized is theirs.is_quantized is True
    assert model.quantization_method == theirs.quantization_method
    assert type(model.hf_quantizer) is type(theirs.hf_quantizer)
    assert model.hf_quantizer.pre_quantized is False
    assert model.config.quantization_config is model.hf_quantizer.quantization_config
    assert type(model.config.quantization_config) is type(theirs.config.quantization_config)
    inside = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    assert all(module.config._is_quantized for module in inside)
    assert (model.is_loaded_in_4bit, model.is_loaded_in_8bit) == (mode != "int8", mode == "int8")


class Wrapped(PreTrainedModel):
    """A model of transformers with another one inside, of its own config."""

    config_class = PretrainedConfig

    def __init__(self, config, inner):
        super().__init__(config)
        self.inner = inner
        self.post_init()


def test_config_of_every_model_inside_says_that_it_is_quantized(mode):
    inner = build("bert")
    model = load_and_quantize_model(Wrapped(PretrainedConfig(), inner), mode, device_map="cpu")
    assert model.config is not inner.config
    assert isinstance(model.inner, BertModel)
    assert model.config._is_quantized
    assert model.inner.config._is_quantized


def test_full_model_of_the_same_config_is_not_called_quantized(tmp_path):
    full = build("llama")
    save_checkpoint(full, tmp_path / "full")
    model = empty(type(full), full.config)
    load_and_quantize_model(model, "nf4", tmp_path / "full", device_map="cpu")
    full.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_plain_module_carries_accelerates_attributes_only(mode):
    model = load_and_quantize_model(GPT(), mode, device_map="cpu")
    assert (model.is_loaded_in_4bit, model.is_loaded_in_8bit) == (mode != "int8", mode == "int8")
    assert isinstance(model.hf_device_map, dict)
    assert not [name for name in (*OF_TRANSFORMERS, "config") if hasattr(model, name)]


def test_model_of_which_nothing_was_quantized_carries_nothing_that_says_so(tmp_path, name, mode):
    model = loaded(build(name), mode, tmp_path, skip_modules=["*"])
    assert not [attribute for attribute in OF_TRANSFORMERS if hasattr(model, attribute)]
    assert not hasattr(model.config, "quantization_config")
    inside = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    assert not any(getattr(module.config, "_is_quantized", False) for module in inside)
    assert (model.is_loaded_in_4bit, model.is_loaded_in_8bit) == (False, False)
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
