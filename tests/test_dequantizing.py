"""A dequantized model is a plain one with the values that its quantized layers compute with."""

import pytest
import torch
from checkpoints import empty, loaded, quantized, save_checkpoint, stored
from comparisons import equal, relative_error
from models import GPT, Layers, llama
from references import FOUR_BIT, dequantize_by_hand, quantize_as_bitsandbytes
from torch import nn

from bigload import (
    BnbQuantizationConfig,
    ConfigError,
    QuantizationError,
    dequantize_model,
    load_and_quantize_model,
    save_quantized_model,
)
from bigload.pipeline import dequantizing
from bigload.quantization.layers import quantized_layers

MODES = (*FOUR_BIT, "int8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_weights_are_what_the_format_says(tmp_path, device, mode, dtype):
    model, full = quantized(tmp_path, device, mode, dtype=dtype), Layers().to(dtype)
    full.load_state_dict(stored(tmp_path))
    plain = dequantize_model(model)
    assert plain is model
    assert [type(module) for module in plain.modules()] == [type(module) for module in full.modules()]
    for path in ("c_proj", "proj", "odd"):
        weight = full.get_submodule(path).weight.detach()
        by_hand = dequantize_by_hand(quantize_as_bitsandbytes(weight.to(device), mode), weight.shape)
        found = plain.get_submodule(path).weight
        assert found.dtype == dtype
        # One rounding to the dtype, and of the order in which three factors are multiplied.
        assert relative_error(found, by_hand) < 2 * torch.finfo(dtype).eps
    for name in ("c_proj.bias", "norm.weight", "head.weight"):
        assert equal(plain.get_parameter(name).cpu(), full.get_parameter(name))


@pytest.mark.parametrize("mode", MODES)
def test_outputs_are_those_of_the_quantized_model(tmp_path, device, mode):
    model = quantized(tmp_path, device, mode, dtype=torch.float32)
    x = torch.randn(7, 160, device=device)
    with torch.no_grad():
        before = model(x)
        after = dequantize_model(model)(x)
    # int8 multiplies rounded activations too; the 4-bit kernel of CPUs with AVX512-BF16 computes in bfloat16.
    assert relative_error(after, before) < (0.03 if mode == "int8" else 0.01)


def test_another_dtype_is_that_of_weights_and_biases_and_of_nothing_else(tmp_path, device):
    model = quantized(tmp_path, device)
    plain = dequantize_model(model, torch.float32)
    assert {plain.c_proj.weight.dtype, plain.c_proj.bias.dtype, plain.proj.weight.dtype} == {torch.float32}
    assert {plain.norm.weight.dtype, plain.head.weight.dtype} == {torch.bfloat16}


def test_trainable_main_weights_stay_themselves(tmp_path, device):
    model = quantized(tmp_path, device, "int8-training")
    plain = dequantize_model(model)
    assert type(plain.c_proj) is nn.Linear
    assert equal(plain.c_proj.weight.detach().cpu(), stored(tmp_path)["c_proj.weight"])
    assert plain.c_proj.weight.requires_grad


def test_hooks_modes_and_own_attributes_stay(tmp_path, device):
    model = quantized(tmp_path, device)
    calls = []
    handle = model.c_proj.register_forward_hook(lambda module, args, out: calls.append(module))
    model.c_proj.register_load_state_dict_pre_hook(lambda module, *args: calls.append(module))
    model.proj.train()
    model.odd.note = "mine"
    plain = dequantize_model(model)
    assert (plain.c_proj.training, plain.proj.training) == (False, True)
    assert plain.odd.note == "mine"
    x = torch.randn(2, 160, device=device, dtype=torch.bfloat16)
    plain(x)
    assert calls == [plain.c_proj]
    handle.remove()
    plain(x)
    plain.load_state_dict(plain.state_dict())
    assert calls == [plain.c_proj, plain.c_proj]
    left = set(vars(plain.c_proj)) - set(vars(nn.Linear(1, 1)))
    assert left == set()


def test_int8_after_it_ran_is_what_it_was(tmp_path, device):
    """Then bitsandbytes keeps the scales in the layer's state, no more with the weight."""
    one = quantized(tmp_path, device, "int8")
    other = quantized(tmp_path, device, "int8")
    with torch.no_grad():
        one(torch.randn(2, 160, device=device, dtype=torch.bfloat16))
    assert equal(dequantize_model(one).c_proj.weight, dequantize_model(other).c_proj.weight.cpu().to(device))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(96, 64)
        self.first = nn.Linear(64, 64)
        self.second = self.first
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.embedding.weight


def test_ties_and_shared_layers_stay(tmp_path, device):
    save_checkpoint(Shared(), tmp_path)
    plain = dequantize_model(loaded(tmp_path, device, "nf4", Shared))
    assert type(plain.first) is nn.Linear
    assert plain.second is plain.first
    assert plain.head.weight is plain.embedding.weight


def test_model_that_is_itself_a_layer(device):
    layer = nn.Linear(64, 64)
    model = load_and_quantize_model(layer, BnbQuantizationConfig.from_mode("nf4", skip_modules=[]), device_map=device)
    plain = dequantize_model(model)
    assert type(plain) is nn.Linear
    assert not plain.is_loaded_in_4bit


def test_a_subclass_of_linear_is_made_again(tmp_path, device):
    class Own(nn.Linear):
        def merged(self):
            return self.weight

    def build():
        return nn.Sequential(Own(64, 64), nn.Linear(64, 2))

    save_checkpoint(build(), tmp_path)
    model = load_and_quantize_model(empty(build), "nf4", tmp_path, device_map=device, quantizable=[Own])
    assert type(dequantize_model(model)[0]) is Own


def test_it_may_be_quantized_again(tmp_path, device):
    """To the same bits: the values of a code are quantized to themselves."""
    model = quantized(tmp_path, device)
    packed = model.c_proj.weight.data.clone()
    again = load_and_quantize_model(dequantize_model(model), "nf4", device_map=device)
    assert again.is_loaded_in_4bit
    assert equal(again.c_proj.weight.data, packed)


def test_failure_leaves_the_model_quantized(tmp_path, device, monkeypatch):
    model = quantized(tmp_path, device)
    before, own = {path: id(layer) for path, layer in quantized_layers(model).items()}, dequantizing.dequantize_4bit

    def failing(packed, state, dtype):
        if state.shape == (35, 128):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(packed, state, dtype)

    monkeypatch.setattr(dequantizing, "dequantize_4bit", failing)
    with pytest.raises(torch.OutOfMemoryError):
        dequantize_model(model)
    assert {path: id(layer) for path, layer in quantized_layers(model).items()} == before
    monkeypatch.undo()
    assert not quantized_layers(dequantize_model(model))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, "fp16"], ids=str)
def test_dtype_that_weights_cannot_be_is_refused(tmp_path, device, dtype):
    model = quantized(tmp_path, device)
    with pytest.raises(ConfigError, match="dtype is"):
        dequantize_model(model, dtype)


def test_models_without_layers_of_bitsandbytes_or_with_adapters_are_refused(tmp_path, device):
    peft = pytest.importorskip("peft")
    with pytest.raises(ConfigError, match="no layer that bitsandbytes quantized"):
        dequantize_model(GPT())
    model = quantized(tmp_path, device)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_proj"]))
    with pytest.raises(QuantizationError, match=r"c_proj'.*merge_and_unload"):
        dequantize_model(adapted)


def test_layers_that_others_changed_are_refused(tmp_path):
    hooks = pytest.importorskip("accelerate.hooks")
    model = quantized(tmp_path, torch.device("cpu"))
    model.proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(QuantizationError, match="'proj': packed by bitsandbytes"):
        dequantize_model(model)
    model.proj.weight.quant_state.packing_format_for_cpu = False
    hooks.add_hook_to_module(model.odd, hooks.AlignDevicesHook(execution_device="cpu"))
    with pytest.raises(QuantizationError, match="'odd': dispatched by accelerate"):
        dequantize_model(model)
    hooks.remove_hook_from_module(model.odd)
    assert not quantized_layers(dequantize_model(model))


def test_what_was_saved_reloaded_and_dequantized_is_what_was_dequantized_at_once(tmp_path, device):
    model = quantized(tmp_path / "source", device)
    save_quantized_model(model, tmp_path / "saved")
    again = dequantize_model(loaded(tmp_path / "saved", device))
    assert equal(again.c_proj.weight.cpu(), dequantize_model(model).c_proj.weight.cpu())


def test_model_of_transformers_within_another_is_quantized_no_more(tmp_path, device):
    pytest.importorskip("transformers")

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm = llama(False)

    save_checkpoint(Wrapper().lm, tmp_path)
    model = Wrapper()
    model.lm = loaded(tmp_path, device, "nf4", lambda: llama(False))
    assert model.lm.is_quantized
    plain = dequantize_model(model)
    assert not getattr(plain.lm, "is_quantized", False)
    assert not plain.lm.is_loaded_in_4bit
    plain.lm.half()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_int8_of_a_model_that_is_mostly_float32_comes_back_in_the_dtype_it_was_loaded_in(device, dtype):
    class Mostly(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.kept, self.norm = nn.Linear(64, 64), nn.Linear(64, 512), nn.LayerNorm(512)

        def forward(self, x):
            return self.norm(self.kept(self.fc(x).float()))

    config = {"load_in_8bit": True, "keep_in_fp32_modules": ["kept", "norm"], "skip_modules": [], "torch_dtype": dtype}
    model = load_and_quantize_model(Mostly(), BnbQuantizationConfig(**config), device_map=device).eval()
    x = torch.randn(3, 64, device=device, dtype=dtype)
    with torch.no_grad():
        before = model(x)
        after = dequantize_model(model)(x)
    assert (model.fc.weight.dtype, model.fc.bias.dtype) == (dtype, dtype)
    assert model.kept.weight.dtype == torch.float32
    assert relative_error(after, before) < 0.03
    assert not {"loaded_as", "loaded_dtype"} & vars(model.fc).keys()
