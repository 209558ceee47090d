"""Loaded mixtures whose experts rest elsewhere, some of them cached, do all that resident ones do, in the same bits."""

import copy
import dataclasses
import threading

import pytest
import torch
from checkpoints import empty
from comparisons import assert_same_bits, outputs
from mixtures import MIXTURES, TOKENS, config, mixture, unpacked
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
from bigload.model.quantizable_experts import weights_of
from bigload.planning import planner
from bigload.planning.placing.accounts import PlacedUnit

pytestmark = pytest.mark.usefixtures("small_parts_stream")
# A plain one, one that is transposed and has biases, one with own arguments, one with experts that all tokens visit.
NAMES = [("qwen3_moe", "nf4"), ("gpt_oss", "nf4-dq"), ("llama4", "fp4"), ("deepseek_v3", "nf4-dq")]
LAYERS = 2


def build(name):
    return MIXTURES[name][0](config(name, num_hidden_layers=LAYERS))


def asked(mode):
    return BnbQuantizationConfig.from_mode(mode, torch_dtype="fp32", bnb_4bit_compute_dtype="fp32")


def paths_of(name, mode="nf4"):
    plan = plan_device_map(empty(lambda: build(name)), mode, device_map="cpu")
    return list(dict.fromkeys(path for path, _ in weights_of(plan.experts).values()))


@pytest.fixture(params=NAMES, ids="-".join)
def source(request, tmp_path):
    name, mode = request.param
    mixture(name, num_hidden_layers=LAYERS).save_pretrained(tmp_path / "source")
    return name, mode, tmp_path


@pytest.fixture
def load(source, device):
    """Return what loads a mixture: wholly on the device, or with its experts away and so many of them cached."""
    name, mode, folder = source

    def loaded(cached=None, **options):
        device_map, away = {"": device}, "cpu" if device.type == "cuda" else "disk"
        if cached is not None:
            device_map |= dict.fromkeys(paths_of(name), away)
            options = {"offload": OffloadConfig(expert_cache=cached, slots=1), "offload_folder": folder / "cache"}
        model = load_and_quantize_model(
            empty(lambda: build(name)), asked(mode), folder / "source", device_map=device_map, **options
        )
        return unpacked(model.eval())

    return loaded


def gradients(model, device):
    model.requires_grad_(False)
    routers = [p for n, p in model.named_parameters() if n.endswith((".gate.weight", ".router.weight"))][1:2]
    for router in routers:
        router.requires_grad_(True)
        router.grad = None
    embedded = model.get_input_embeddings()(TOKENS.to(device)).detach().requires_grad_(True)
    out = model(inputs_embeds=embedded, use_cache=False).logits
    (out.float() ** 2).mean().backward()
    return out.detach(), embedded.grad, *(router.grad for router in routers)


@pytest.mark.parametrize("cached", [0, 0.25, 0.5, 1.0])
def test_logits_tokens_and_gradients_are_those_of_resident_experts(load, device, cached):
    whole, part = load(), load(cached)
    for tokens in (TOKENS, TOKENS[:1, :1], TOKENS[:, :2], TOKENS):
        assert torch.equal(outputs(part, tokens.to(device)), outputs(whole, tokens.to(device)))
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = whole.generate(TOKENS[:1].to(device), **options)
    assert torch.equal(part.generate(TOKENS[:1].to(device), **options), expected)
    stats = part.offload.stats()
    assert stats.expert_misses
    assert bool(stats.expert_hits) == (cached >= 0.5 or (cached == 0.25 and "Llama4" in type(part).__name__))
    expected, found = gradients(whole, device), gradients(part, device)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    part.train()
    part.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(torch.equal(one, other) for one, other in zip(gradients(part, device), expected, strict=True))


def test_the_map_and_the_plan_say_where_they_are(load, device):
    part = load(0.5)
    plan = part.offload.plan
    assert {torch.device(place) for place in part.hf_device_map.values()} == {device}
    away = [planned.tensor.name for planned in plan.tensors if planned.home is not None]
    assert away
    assert all(".experts." in name for name in away)
    resident = {name: p for name, p in part.named_parameters() if name not in away}
    assert all(p.device == device for p in resident.values())
    held = [cache for engine in engines_of(part) for cache in engine.pool.caches._caches.values()]
    assert len(held) == len({name.rpartition(".")[0] for name in away})
    account = next(account for account in plan.accounts if account.place == device)
    memories = [cache._book._memory.whole.nbytes for cache in held]
    rounded = 512 if device.type == "cuda" else 1
    assert account.cache == sum(-(-nbytes // rounded) * rounded for nbytes in memories) > 0


def test_state_saved_folder_and_removal_are_those_of_resident_experts(load, device, tmp_path):
    whole, part = load(), load(0.5)
    outputs(part, TOKENS.to(device))
    assert_same_bits(part.state_dict(), whole.state_dict())
    save_quantized_model(part, tmp_path / "saved")
    again = load_and_quantize_model(
        empty(lambda: type(whole)(whole.config)), None, tmp_path / "saved", device_map=device
    )
    assert_same_bits(again.state_dict(), whole.state_dict())
    with pytest.raises(QuantizationError, match="offloaded"):
        dequantize_model(part)
    with pytest.raises(OffloadError, match="cannot be copied"):
        copy.deepcopy(part)
    with part.offload.materialize(part):
        assert all(p.device == device for p in part.parameters())
        assert torch.equal(outputs(part, TOKENS.to(device)), outputs(whole, TOKENS.to(device)))
    part.offload.remove()
    assert not hasattr(part, "offload")
    assert torch.equal(outputs(part, TOKENS.to(device)), outputs(whole, TOKENS.to(device)))
    assert_same_bits(part.state_dict(), whole.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(gradients(part, device), gradients(whole, device), strict=True))
    dequantize_model(part)


def test_threads_run_one_model(load, device):
    whole, part = load(), load(0.5)
    prompts = [TOKENS[:1, n : n + 2].to(device) for n in range(6)]
    expected = [outputs(whole, prompt) for prompt in prompts]
    wrong = []

    def work(first):
        for turn in range(4):
            number = (first + turn) % len(prompts)
            if not torch.equal(outputs(part, prompts[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_experts_in_host_memory_are_cached_on_the_cpu_too(name, tmp_path, monkeypatch):
    """With the CPU in the place of a GPU, as a load onto a GPU leaves them: in one piece of memory for each module."""
    mixture(name, num_hidden_layers=LAYERS).save_pretrained(tmp_path)
    whole = load_and_quantize_model(empty(lambda: build(name)), asked("nf4-dq"), tmp_path, device_map="cpu").eval()
    place, cpu = planner.place_units, torch.device("cpu")

    def placed(*given):
        made = place(*given)
        units = [PlacedUnit(u.unit.by_expert(), cpu, cpu, 2) if u.unit.is_block else u for u in made.units]
        return dataclasses.replace(made, units=tuple(units))

    with monkeypatch.context() as patch:
        patch.setattr(planner, "place_units", placed)
        patch.setattr(planner, "only_device", lambda request: None)
        part = load_and_quantize_model(empty(lambda: build(name)), asked("nf4-dq"), tmp_path, device_map="cpu").eval()
    whole, part = unpacked(whole), unpacked(part)
    for tokens in (TOKENS, TOKENS[:1, :1], TOKENS[:1, :1], TOKENS[:1, :2]):
        assert torch.equal(outputs(part, tokens), outputs(whole, tokens))
    assert part.offload.stats().expert_hits
    state = {key: tensor.clone() for key, tensor in whole.state_dict().items() if ".experts." in key}
    for key in state:
        state[key] = state[key].flip(0) if key.endswith("proj") else state[key]
    before = outputs(whole, TOKENS[:1, :2])
    for model in (whole, part):
        model.load_state_dict(state, strict=False)
    assert not torch.equal(outputs(whole, TOKENS[:1, :2]), before)
    for tokens in (TOKENS[:1, :1], TOKENS[:1, :2]):
        assert torch.equal(outputs(part, tokens), outputs(whole, tokens))


@pytest.mark.cuda
def test_a_mixture_that_does_not_fit_runs_within_its_budget(tmp_path):
    name, gpu = "qwen3_moe", torch.device("cuda", 0)
    fields = {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 16, "num_hidden_layers": 8}

    def large():
        return MIXTURES[name][0](config(name, **fields))

    mixture(name, **fields).save_pretrained(tmp_path)
    whole = load_and_quantize_model(empty(large), "nf4", tmp_path, device_map={"": 0}).eval()
    needed = plan_device_map(empty(large), "nf4", tmp_path, device_map=0).accounts[0].needed
    budgets = {0: needed - 20 * 2**20, "cpu": "8GiB"}
    part = load_and_quantize_model(empty(large), "nf4", tmp_path, device_map="auto", max_memory=budgets).eval()
    assert any(placed.cached for placed in part.offload.plan.units)
    options = {"max_new_tokens": 32, "do_sample": False}
    prompt = TOKENS[:1].to(gpu)
    assert torch.equal(part.generate(prompt, **options), whole.generate(prompt, **options))
    before = torch.cuda.memory_allocated()
    part.generate(prompt, **options)
    assert torch.cuda.memory_allocated() == before
    for _ in range(3):
        assert torch.equal(outputs(part, TOKENS.to(gpu)), outputs(whole, TOKENS.to(gpu)))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_adapters_are_trained_as_around_resident_experts(load, device, checkpointed):
    import peft

    losses = []
    for cached in (None, 0.25, 0.5):
        model = peft.prepare_model_for_kbit_training(load(cached), use_gradient_checkpointing=checkpointed)
        torch.manual_seed(3)
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "q_a_proj", "o_proj"], init_lora_weights=False)
        tuned = peft.get_peft_model(model, lora).train()
        trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
        assert all(parameter.device == device for parameter in trained)
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        losses.append([])
        for step in range(3):
            given = TOKENS.to(device).roll(step, 1)
            loss = tuned(input_ids=given, labels=given).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
    assert len({float(loss) for loss in losses[0]}) == 3
    for found in losses[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found, losses[0], strict=True))
