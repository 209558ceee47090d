"""A model that holds its weights already is quantized from them, in place."""

import bitsandbytes as bnb
import pytest
import torch
from checkpoints import save_checkpoint
from comparisons import relative_error, state_of
from models import GPT
from references import dequantized_reference, quantize_as_bitsandbytes
from torch import nn

from bigload import BnbQuantizationConfig, ConfigError, QuantizationError, load_and_quantize_model


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "int8"])
def test_loaded_model_is_quantized_where_it_is(device, mode):
    full = GPT(tied=True).eval()
    x = torch.randint(0, 96, (2, 12))
    reference = dequantized_reference(full, mode, {"lm_head"}, torch.float32)(x)
    weight = full.transformer["h"][0].attn.c_attn.weight.detach().clone()
    model = load_and_quantize_model(full, mode, device_map=device)
    assert model is full
    parts = quantize_as_bitsandbytes(weight.to(device), mode)
    assert torch.equal(model.transformer["h"][0].attn.c_attn.weight.data, parts["weight"])
    assert model.lm_head.weight is model.transformer["wte"].weight
    with torch.no_grad():
        assert relative_error(model(x.to(device)), reference) < 0.008


def test_weights_that_do_not_change_are_not_copied():
    model = GPT(tied=True)
    kept = {name: parameter for name, parameter in model.named_parameters() if "h." not in name}
    config = BnbQuantizationConfig.from_mode("nf4", torch_dtype="fp32")
    load_and_quantize_model(model, config, device_map="cpu")
    assert len(kept) >= 4
    assert all(model.get_parameter(name) is parameter for name, parameter in kept.items())
    biases = [module.bias for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(biases) == 8


def test_auto_dtype_is_the_models_own():
    model = load_and_quantize_model(GPT().bfloat16(), "nf4", device_map="cpu")
    assert model.transformer["wte"].weight.dtype == torch.bfloat16
    assert model.transformer["h"][0].attn.c_attn.weight.quant_state.dtype == torch.bfloat16


def test_a_real_model_takes_the_weights_of_the_checkpoint_it_is_given(tmp_path):
    saved = GPT()
    save_checkpoint(saved, tmp_path)
    model = load_and_quantize_model(GPT(), "nf4", tmp_path, device_map="cpu")
    assert torch.equal(model.transformer["wte"].weight, saved.transformer["wte"].weight)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_buffers_are_cast_with_the_weights_so_that_batch_norm_runs(dtype):
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 8)).eval()
    model[1].running_mean.normal_()
    x = torch.randn(4, 64)
    expected = model(x)
    config = BnbQuantizationConfig.from_mode("int8", torch_dtype=dtype)
    model = load_and_quantize_model(model, config, device_map="cpu")
    assert model[1].running_mean.dtype == model[1].weight.dtype == config.torch_dtype
    assert model[1].num_batches_tracked.dtype == torch.int64
    with torch.no_grad():
        assert relative_error(model(x.to(config.torch_dtype)), expected) < 0.02  # int8 and 16-bit rounding


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_a_float64_model_becomes_a_float32_one_as_a_float64_checkpoint_does(mode):
    model = load_and_quantize_model(GPT().double(), mode, device_map="cpu")
    assert model.lm_head.weight.dtype == torch.float32


def test_loading_a_second_time_is_refused_and_changes_nothing(tmp_path):
    save_checkpoint(GPT(), tmp_path)
    for first in ("nf4", "int8", "int8-training"):
        model = load_and_quantize_model(GPT(), first, device_map="cpu")
        before = state_of(model)
        for second, location in (("nf4", None), ("int8", tmp_path)):
            with pytest.raises(ConfigError, match=r"c_attn\.weight.*already"):
                load_and_quantize_model(model, second, location, device_map="cpu")
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert model.is_loaded_in_4bit == (first == "nf4")


def test_a_failure_leaves_the_real_model_as_it_was():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.LayerNorm(64))
    with torch.no_grad():
        model[1].weight[3, 3] = 1e5  # more than float16 holds
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    with pytest.raises(QuantizationError, match=r"'1\.weight'"):
        load_and_quantize_model(model, "int8", device_map="cpu")
    after = model.state_dict(keep_vars=True)
    assert all(id(after[name]) == key and torch.equal(after[name], value) for name, (key, value) in before.items())
    assert type(model[0]) is nn.Linear
    load_and_quantize_model(model, "nf4", device_map="cpu")
    assert isinstance(model[0], bnb.nn.Linear4bit)
