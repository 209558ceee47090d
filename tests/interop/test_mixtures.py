"""Mixtures of experts of transformers: their fused experts are planned, loaded, run, saved and dequantized in 4 bit."""

import copy
import functools

import pytest
import torch
from checkpoints import empty
from comparisons import assert_same_bits, equal, outputs, relative_error
from mixtures import MIXTURES, TOKENS, config, mixture, unpacked, weights_of_experts
from references import quantize_as_bitsandbytes

from bigload import (
    BnbQuantizationConfig,
    QuantizationError,
    dequantize_model,
    load_and_quantize_model,
    plan_device_map,
    quantize_checkpoint,
    save_quantized_model,
)
from bigload.quantization.saved_experts import quantized_experts

MODES = ("nf4", "nf4-dq", "fp4")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Return what writes a family's checkpoint, in transformers' own layout, once for all tests."""

    @functools.cache
    def save(name):
        folder = tmp_path_factory.mktemp(name)
        model = mixture(name)
        model.save_pretrained(folder)
        return folder, {key: tensor.clone() for key, tensor in model.state_dict().items()}

    return save


def built(name):
    return empty(lambda: MIXTURES[name][0](config(name)))


def in_fp32(mode, **fields):
    return BnbQuantizationConfig.from_mode(mode, torch_dtype="fp32", bnb_4bit_compute_dtype="fp32", **fields)


def parts_of(weight):
    state = weight.quant_state
    parts = {"weight": weight.data, "absmax": state.absmax, "code": state.code}
    if state.nested:
        parts |= {"offset": state.offset, "nested_absmax": state.state2.absmax, "nested_code": state.state2.code}
    return parts


def bytes_held(model):
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        for parameter in module._parameters.values():
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                tensors += [part for part in parts_of(parameter).values() if part is not parameter.data]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_have_the_bits_that_bitsandbytes_makes_and_the_planned_bytes(stored, device, name):
    folder, full = stored(name)
    for mode in MODES:
        asked = BnbQuantizationConfig.from_mode(mode, torch_dtype="bf16")
        plan = plan_device_map(built(name), asked, folder, device_map=device)
        model = load_and_quantize_model(built(name), asked, folder, device_map=device)
        assert sum(plan.device_bytes.values()) == bytes_held(model)
        found = weights_of_experts(model)
        assert found
        assert plan.experts.keys() == quantized_experts(model).keys()
        assert not plan.plain_experts
        for key, weight in found.items():
            assert type(weight).__name__ == "Params4bit"
            assert not weight.requires_grad
            module = model.get_submodule(key.rpartition(".")[0])
            values = full[key].to(device)
            values = values.mT if module.quantized_experts.is_transposed else values
            assert tuple(weight.quant_state.shape) == tuple(values.shape)
            if mode == "nf4-dq":  # one offset for the tensor
                assert_same_bits(parts_of(weight), quantize_as_bitsandbytes(values.contiguous(), mode))
                continue
            each = [quantize_as_bitsandbytes(expert.contiguous(), mode) for expert in values]
            assert equal(weight.data, torch.cat([one["weight"] for one in each]))
            assert equal(weight.quant_state.absmax, torch.cat([one["absmax"] for one in each]))
        routers = [key for key in model.state_dict() if "router" in key or ".gate.weight" in key]
        assert not any("absmax" in key for key in routers)


@pytest.mark.parametrize("name", MIXTURES)
def test_models_saved_converted_and_dequantized_are_the_same_model(stored, device, tmp_path, name):
    (folder, full), tokens = stored(name), TOKENS.to(device)
    for mode in MODES:
        asked = in_fp32(mode)
        model = load_and_quantize_model(built(name), asked, folder, device_map=device).eval()
        save_quantized_model(model, tmp_path / mode)
        again = load_and_quantize_model(built(name), None, tmp_path / mode, device_map=device).eval()
        assert_same_bits(again.state_dict(), model.state_dict())
        assert weights_of_experts(again).keys() == weights_of_experts(model).keys()
        assert torch.equal(outputs(unpacked(again), tokens), outputs(unpacked(model), tokens))
        if device.type == "cpu" and mode != "nf4":
            quantize_checkpoint(folder, tmp_path / f"{mode} converted", asked, model=built(name), device="cpu")
            made = load_and_quantize_model(built(name), None, tmp_path / f"{mode} converted", device_map="cpu")
            assert_same_bits(made.state_dict(), model.state_dict())
        plain = dequantize_model(again)
        assert not quantized_experts(plain)
        assert {key: tensor.shape for key, tensor in plain.state_dict().items()} == {
            k: t.shape for k, t in full.items()
        }
        assert all("forward" not in vars(module) for module in plain.modules() if "Experts" in type(module).__name__)
        assert relative_error(outputs(model, tokens), outputs(plain, tokens)) < (1e-5 if device.type == "cpu" else 1e-4)
        if mode == "nf4":
            options = {"max_new_tokens": 5, "do_sample": False}
            assert torch.equal(model.generate(tokens, **options), plain.generate(tokens, **options))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_save_pretrained_is_refused_and_both_remedies_save(stored, tmp_path, name):
    """transformers takes merged experts apart as it saves, and what is quantized there stops it half-way."""
    folder, _ = stored(name)
    model = load_and_quantize_model(built(name), "nf4", folder, device_map="cpu")
    with pytest.raises(QuantizationError, match=r"as transformers reads none: save the model with .*, or call"):
        model.save_pretrained(tmp_path / "refused")
    save_quantized_model(model, tmp_path / "saved")
    again = load_and_quantize_model(built(name), None, tmp_path / "saved", device_map="cpu")
    assert_same_bits(again.state_dict(), model.state_dict())
    with pytest.raises(QuantizationError, match="save_pretrained"):
        copy.deepcopy(again).save_pretrained(tmp_path / "refused")
    dequantize_model(again).save_pretrained(tmp_path / "plain")
    plain = MIXTURES[name][0].from_pretrained(tmp_path / "plain")
    assert_same_bits(plain.state_dict(), again.state_dict())
