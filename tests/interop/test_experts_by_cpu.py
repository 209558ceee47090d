"""Experts that the CPU computes where they rest, in 4 bit: those that a call visits, in the bits of resident ones."""

import copy
import dataclasses

import pytest
import torch
from checkpoints import empty
from comparisons import assert_same_bits, outputs
from mixtures import MIXTURES, TOKENS, config, mixture, unpacked

from bigload import (
    BnbQuantizationConfig,
    OffloadConfig,
    OffloadError,
    dequantize_model,
    load_and_quantize_model,
    plan_device_map,
    save_quantized_model,
)
from bigload.planning import planner
from bigload.planning.placing.accounts import PlacedUnit
from bigload.quantization.packed_experts import PackedExperts

pytestmark = pytest.mark.usefixtures("small_parts_stream")
CPU = torch.device("cpu")
FAMILIES = [("qwen3_moe", "nf4"), ("gpt_oss", "nf4-dq"), ("llama4", "fp4")]


def asked(mode):
    return BnbQuantizationConfig.from_mode(mode, torch_dtype="fp32", bnb_4bit_compute_dtype="fp32")


def build(name):
    return empty(lambda: MIXTURES[name][0](config(name)))


@pytest.fixture(params=FAMILIES, ids="-".join)
def pair(request, tmp_path, monkeypatch):
    """Return a resident mixture, and one whose experts the CPU computes for a block on, here, the CPU."""
    name, mode = request.param
    mixture(name).save_pretrained(tmp_path)
    whole = load_and_quantize_model(build(name), asked(mode), tmp_path, device_map="cpu").eval()
    place = planner.place_units

    def placed(*given):
        made = place(*given)
        units = [PlacedUnit(u.unit.by_expert(), CPU, CPU, by_cpu=True) if u.unit.is_block else u for u in made.units]
        return dataclasses.replace(made, units=tuple(units))

    with monkeypatch.context() as patch:
        patch.setattr(planner, "place_units", placed)
        patch.setattr(planner, "only_device", lambda request: None)
        part = load_and_quantize_model(build(name), asked(mode), tmp_path, device_map="cpu").eval()
    return unpacked(whole), unpacked(part)


def gradients(model):
    model.requires_grad_(False)
    trained = [p for n, p in model.named_parameters() if n.endswith((".gate.weight", ".router.weight", "proj_bias"))]
    for each in trained:
        each.requires_grad_(True)
    embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_(True)
    out = model(inputs_embeds=embedded, use_cache=False).logits
    return out.detach(), *torch.autograd.grad(out.float().square().mean(), [embedded, *trained])


def test_logits_tokens_and_gradients_are_those_of_resident_experts(pair):
    whole, part = pair
    assert all(placed.by_cpu for placed in part.offload.plan.offloaded)
    assert part.offload.plan.offloaded
    for tokens in (TOKENS, TOKENS[:1, :1]):
        assert torch.equal(outputs(part, tokens), outputs(whole, tokens))
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(part.generate(TOKENS[:1], **options), whole.generate(TOKENS[:1], **options))
    expected = gradients(whole)
    assert all(torch.equal(one, other) for one, other in zip(gradients(part), expected, strict=True))
    part.train()
    part.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(torch.equal(one, other) for one, other in zip(gradients(part), expected, strict=True))
    assert part.offload.stats().nbytes == 0


def test_of_each_module_those_that_a_token_visits_are_read(pair, monkeypatch):
    _, part = pair
    read, own = [], PackedExperts.dequantize

    def counted(self, expert, dtype):
        read.append(expert)
        return own(self, expert, dtype)

    monkeypatch.setattr(PackedExperts, "dequantize", counted)
    outputs(part, TOKENS[:1, :1])
    plan = part.offload.plan
    assert len(read) == 2 * len(plan.experts) * plan.experts_per_token  # two weights of each


def test_state_saved_folder_and_removal_are_those_of_resident_experts(pair, tmp_path):
    whole, part = pair
    assert_same_bits(part.state_dict(), whole.state_dict())
    save_quantized_model(part, tmp_path / "saved")
    again = load_and_quantize_model(empty(lambda: type(whole)(whole.config)), None, tmp_path / "saved")
    assert_same_bits(again.state_dict(), whole.state_dict())
    away = {"": 0} | dict.fromkeys(part.offload.plan.experts, "cpu")  # of what is stored quantized, too
    made = plan_device_map(
        empty(lambda: type(whole)(whole.config)),
        None,
        tmp_path / "saved",
        device_map=away,
        offload=OffloadConfig(execute="cpu"),
    )
    assert [placed.by_cpu for placed in made.offloaded] == [True] * len(part.offload.plan.experts)
    with pytest.raises(OffloadError, match="cannot be copied"):
        copy.deepcopy(part)
    state = {key: tensor.clone() for key, tensor in whole.state_dict().items() if ".experts." in key}
    state = {key: tensor.flip(0) if key.endswith("proj") else tensor for key, tensor in state.items()}
    before = outputs(whole, TOKENS)
    for model in (whole, part):
        assert not model.load_state_dict(state, strict=False).unexpected_keys
    assert not torch.equal(outputs(whole, TOKENS), before)
    assert torch.equal(outputs(part, TOKENS), outputs(whole, TOKENS))
    part.offload.remove()
    assert not hasattr(part, "offload")
    assert torch.equal(outputs(part, TOKENS), outputs(whole, TOKENS))
    assert_same_bits(part.state_dict(), whole.state_dict())
    dequantize_model(part)


def test_weights_at_rest_are_read_as_plain_tensors_whatever_device_the_rest_computes_on(pair, monkeypatch):
    """Of a weight at rest beside a GPU, torch's operators would each be looked at."""
    whole, part = pair
    own, seen = PackedExperts.dequantize, []

    def noted(self, expert, dtype):
        seen.append(own(self, expert, dtype))
        return seen[-1]

    parameters = [p for n, p in part.named_parameters() if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    homes = {id(p._home): p._home for p in parameters}
    for home in homes.values():
        monkeypatch.setattr(home, "device", torch.device("cuda", 0))
    assert type(parameters[0].data) is not torch.Tensor
    monkeypatch.setattr(PackedExperts, "dequantize", noted)
    assert torch.equal(outputs(part, TOKENS), outputs(whole, TOKENS))
    assert {type(each) for each in seen} == {torch.Tensor}
    assert all(torch.equal(one, other) for one, other in zip(gradients(part), gradients(whole), strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize(("name", "mode"), FAMILIES)
def test_a_gpu_computes_all_but_the_experts(name, mode, tmp_path):
    mixture(name).save_pretrained(tmp_path)
    how = {"offload": OffloadConfig(execute="cpu")}
    whole = load_and_quantize_model(build(name), asked(mode), tmp_path, device_map={"": 0}).eval()
    away = dict.fromkeys(experts_of(whole), "cpu")
    part = load_and_quantize_model(build(name), asked(mode), tmp_path, device_map={"": 0} | away, **how).eval()
    assert all(placed.by_cpu for placed in part.offload.plan.offloaded)
    packed = [p for n, p in part.named_parameters() if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert {p.device for p in packed} == {CPU}
    found, expected = outputs(part, TOKENS.cuda()), outputs(whole, TOKENS.cuda())
    assert found.device.type == "cuda"
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()
    assert all(grad.isfinite().all() for grad in gradients_on_gpu(part))
    part.offload.remove()
    assert all(p.device.type == "cuda" for p in part.parameters())
    assert torch.equal(outputs(part, TOKENS.cuda()), expected)


def experts_of(model):
    return [path for path, module in model.named_modules() if "quantized_experts" in vars(module)]


def gradients_on_gpu(model):
    model.requires_grad_(False)
    embedded = model.get_input_embeddings()(TOKENS.cuda()).detach().requires_grad_(True)
    model(inputs_embeds=embedded, use_cache=False).logits.float().square().mean().backward()
    return [embedded.grad]


def test_they_are_not_moved_or_cast_with_the_model(pair):
    whole, part = pair
    expected = outputs(whole, TOKENS)
    part.to(CPU)
    experts = part.get_submodule(next(iter(part.offload.plan.experts)))
    with pytest.raises(OffloadError):
        experts.to("meta")
    assert torch.equal(outputs(part, TOKENS), expected)
    with part.offload.materialize(part):
        assert torch.equal(outputs(part, TOKENS), expected)
