"""Mixtures whose blocks rest elsewhere compute, and train what lies around them, as those that are on the device."""

import dataclasses

import pytest
import torch
from checkpoints import empty, offloaded
from comparisons import assert_same_bits, outputs
from mixtures import MIXTURES, TOKENS, config, mixture, unpacked, weights_of_experts
from streaming import engines_of

from bigload import (
    BnbQuantizationConfig,
    OffloadConfig,
    OffloadError,
    QuantizationError,
    dequantize_model,
    load_and_quantize_model,
    plan_device_map,
    save_quantized_model,
)
from bigload.pipeline.execute import execute
from bigload.quantization.formats import FourBit, Plain

pytestmark = pytest.mark.usefixtures("small_parts_stream")
NAMES = ("qwen3_moe", "gpt_oss", "llama4")  # a plain one, one that is transposed and has biases, one with own arguments
AWAY = ["model.layers.0", "model.layers.2"]


def build(name):
    return MIXTURES[name][0](config(name, num_hidden_layers=3))


@pytest.fixture(params=[*zip(NAMES, ("nf4", "nf4-dq", "fp4"), strict=True)], ids="-".join)
def models(request, tmp_path, device):
    """Return a mixture that is wholly on the device, and one of which two blocks rest on the disk."""
    name, mode = request.param
    mixture(name, num_hidden_layers=3).save_pretrained(tmp_path / "source")
    asked = BnbQuantizationConfig.from_mode(mode, torch_dtype="fp32", bnb_4bit_compute_dtype="fp32")
    whole = load_and_quantize_model(empty(lambda: build(name)), asked, tmp_path / "source", device_map=device)
    how = {"config": asked, "home": "disk", "offload": OffloadConfig(slots=1)}  # one block overwrites the other's
    part = offloaded(lambda: build(name), tmp_path / "source", device, AWAY, tmp_path / "cache", **how)
    return unpacked(whole.eval()), unpacked(part.eval())


def streamed_experts(model):
    names = {each for engine in engines_of(model) for group in engine.groups for each in group.store.tensors}
    return {name for name in names if "experts" in name}


def gradients(model, device):
    """The gradients of an embedded input, and of the routers' weights, after one backward."""
    model.requires_grad_(False)
    routers = [p for n, p in model.named_parameters() if n.endswith((".gate.weight", ".router.weight"))][1:2]
    for router in routers:
        router.requires_grad_(True)
    embedded = model.get_input_embeddings()(TOKENS.to(device)).detach().requires_grad_(True)
    out = model(inputs_embeds=embedded, use_cache=False).logits
    (out.float() ** 2).mean().backward()
    return out.detach(), embedded.grad, *(router.grad for router in routers)


def test_it_computes_and_differentiates_as_the_resident_one(models, device):
    whole, part = models
    assert any(name.endswith("experts.gate_up_proj.absmax") for name in streamed_experts(part))
    for tokens in (TOKENS, TOKENS[:1, :1], TOKENS):
        assert torch.equal(outputs(part, tokens.to(device)), outputs(whole, tokens.to(device)))
    expected, found = gradients(whole, device), gradients(part, device)
    assert len(found) == 3
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert all(one.isfinite().all() and one.any() for one in found)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(part.generate(TOKENS.to(device), **options), whole.generate(TOKENS.to(device), **options))


def test_with_checkpointed_blocks_gradients_are_the_same(models, device):
    whole, part = models
    expected = gradients(whole, device)
    part.train()
    part.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(torch.equal(one, other) for one, other in zip(gradients(part, device), expected, strict=True))


def test_backward_after_remove_is_that_of_the_resident_one(models, device):
    whole, part = models
    expected = gradients(whole, device)
    part.requires_grad_(False)
    embedded = part.get_input_embeddings()(TOKENS.to(device)).detach().requires_grad_(True)
    out = part(inputs_embeds=embedded, use_cache=False).logits
    with part.offload.materialize(part):
        assert_same_bits(
            {name: weight.data.view(torch.uint8) for name, weight in weights_of_experts(part).items()},
            {name: weight.data.view(torch.uint8) for name, weight in weights_of_experts(whole).items()},
        )
    (out.float() ** 2).mean().backward()
    assert torch.equal(embedded.grad, expected[1])
    part.offload.remove()
    assert all(torch.equal(one, other) for one, other in zip(gradients(part, device), expected, strict=True))
    assert_same_bits(part.state_dict(), whole.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_a_state_that_is_loaded_counts_as_in_the_resident_one(name, tmp_path, device):
    """Packed bytes come with their scales."""
    mixture(name, num_hidden_layers=3).save_pretrained(tmp_path / "source")
    asked = BnbQuantizationConfig.from_mode("nf4-dq", torch_dtype="fp32", bnb_4bit_compute_dtype="fp32")
    how = {"config": asked, "home": "cpu", "offload": OffloadConfig(slots=1)}
    part = offloaded(lambda: build(name), tmp_path / "source", device, AWAY, tmp_path / "cache", **how).eval()
    whole = load_and_quantize_model(empty(lambda: build(name)), asked, tmp_path / "source", device_map=device).eval()
    whole, part = unpacked(whole), unpacked(part)
    before = outputs(whole, TOKENS.to(device))
    assert torch.equal(outputs(part, TOKENS.to(device)), before)
    state = {key: tensor.clone() for key, tensor in whole.state_dict().items() if ".experts." in key}
    for key, tensor in state.items():
        if key.endswith("proj"):
            state[key] = tensor.flip(0)
        elif key.endswith("nested_absmax"):
            state[key] = 2 * tensor
    for model in (whole, part):
        assert not model.load_state_dict(state, strict=False).unexpected_keys
    expected = outputs(whole, TOKENS.to(device))
    assert not torch.equal(expected, before)
    assert torch.equal(outputs(part, TOKENS.to(device)), expected)
    assert_same_bits(part.state_dict(), whole.state_dict())


def test_weights_in_files_refuse_a_state(models):
    whole, part = models
    before = {key: tensor.clone() for key, tensor in part.state_dict().items()}
    state = {key: tensor.clone() for key, tensor in whole.state_dict().items() if ".experts." in key}
    with pytest.raises(OffloadError, match=r"are in files, .* call model\.offload\.remove\(\) first"):
        part.load_state_dict(state, strict=False)
    assert_same_bits(part.state_dict(), before)
    part.offload.remove()
    assert not part.load_state_dict(state, strict=False).unexpected_keys


def test_state_and_saved_folder_are_those_of_the_resident_one(models, device, tmp_path):
    whole, part = models
    assert_same_bits(part.state_dict(), whole.state_dict())
    save_quantized_model(part, tmp_path / "saved")
    again = load_and_quantize_model(
        empty(lambda: type(whole)(whole.config)), None, tmp_path / "saved", device_map=device
    )
    assert_same_bits(again.state_dict(), whole.state_dict())
    with pytest.raises(QuantizationError, match="offloaded"):
        dequantize_model(part)
    part.offload.remove()
    dequantize_model(part)


def test_a_bias_that_is_trained_gets_its_gradient(device, tmp_path):
    mixture("gpt_oss", num_hidden_layers=3).save_pretrained(tmp_path / "source")
    asked = BnbQuantizationConfig.from_mode("nf4", torch_dtype="fp32", bnb_4bit_compute_dtype="fp32")
    grads = []
    for away in ([], AWAY):
        model = offloaded(
            lambda: build("gpt_oss"), tmp_path / "source", device, away, tmp_path / "cache", config=asked, home="disk"
        )
        unpacked(model).requires_grad_(False)
        bias = model.model.layers[0].mlp.experts.down_proj_bias.requires_grad_(True)
        model(TOKENS.to(device)).logits.square().mean().backward()
        grads.append(bias.grad)
    assert grads[0].any()
    assert torch.equal(*grads)


def test_experts_cannot_be_copied_while_they_are_away(models):
    _, part = models
    import copy

    with pytest.raises(OffloadError):
        copy.deepcopy(part)


def test_what_the_cpu_computes_in_float32_is_planned_plain():
    asked = BnbQuantizationConfig.from_mode("nf4", torch_dtype="bf16")
    plan = plan_device_map(
        empty(lambda: build("gpt_oss")),
        asked,
        device_map={"": 0, "model.layers.1": "cpu"},
        offload=OffloadConfig(execute="cpu"),
    )
    first, second = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"
    assert second not in plan.experts
    assert first in plan.experts
    assert plan.plain_experts == {second: "the CPU computes them, in float32"}
    by_name = {planned.tensor.name: planned for planned in plan.tensors}
    assert isinstance(by_name[f"{first}.gate_up_proj"].format, FourBit)
    kept = by_name[f"{second}.gate_up_proj"]
    assert kept.format == Plain(torch.float32)
    assert kept.shape == kept.tensor.shape


@pytest.mark.parametrize("name", NAMES)
def test_what_is_planned_for_the_cpu_in_float32_is_the_models_own_layout(name, tmp_path):
    full = mixture(name, num_hidden_layers=3)
    full.save_pretrained(tmp_path)
    plan = plan_device_map(empty(lambda: build(name)), "nf4", tmp_path, device_map="cpu")
    assert plan.experts
    on_cpu = dataclasses.replace(plan, tensors=tuple(each.on_cpu() for each in plan.tensors), layers={}, experts={})
    state = full.state_dict()
    found = execute(on_cpu)
    assert {key for key in state if "experts" in key} <= found.keys()
    for key, tensor in state.items():
        assert torch.equal(found[key], tensor.float())


@pytest.mark.cuda
@pytest.mark.parametrize("name", NAMES)
def test_what_the_cpu_computes_in_float32_is_loaded_plain(name, tmp_path):
    full = mixture(name, num_hidden_layers=3)
    full.save_pretrained(tmp_path)
    asked = BnbQuantizationConfig.from_mode("nf4", torch_dtype="bf16")
    model = load_and_quantize_model(
        empty(lambda: build(name)),
        asked,
        tmp_path,
        device_map={"": 0, "model.layers.1": "cpu"},
        offload=OffloadConfig(execute="cpu"),
    )
    state = full.state_dict()
    plain = {key: p for key, p in model.named_parameters() if "layers.1." in key and "experts" in key}
    assert plain
    for key, parameter in plain.items():
        assert torch.equal(parameter.cpu(), state[key].float())
    assert outputs(model, TOKENS.cuda()).isfinite().all()


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", NAMES)
def test_several_gpus_compute_what_one_does(name, tmp_path):
    mixture(name, num_hidden_layers=3).save_pretrained(tmp_path)
    asked = BnbQuantizationConfig.from_mode("nf4", torch_dtype="bf16")
    one = load_and_quantize_model(empty(lambda: build(name)), asked, tmp_path, device_map={"": 0})
    two = load_and_quantize_model(
        empty(lambda: build(name)), asked, tmp_path, device_map={"": 0, "model.layers.1": 1, "model.layers.2": 1}
    )
    assert torch.equal(outputs(two, TOKENS.cuda()).cpu(), outputs(one, TOKENS.cuda()).cpu())
