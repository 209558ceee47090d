"""Masks of decode steps are made by the graph that uses them; whoever else gets one gets what `generate` makes."""

import functools

import pytest
import torch
from models import llama
from static_caches import given
from transformers import StaticCache
from transformers.generation import utils

from bigload import capture_decode

STEPS = 9
HOW = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "pad_token_id": 0, "do_sample": False, "max_cache_len": 32}
HOW |= {"cache_implementation": "static", "return_dict_in_generate": True, "output_logits": True}
HOW |= {"disable_compile": True}


@pytest.fixture
def made(monkeypatch):
    """List the masks that transformers makes, as the arguments that it makes them from."""
    calls, make = [], utils.create_masks_for_generate

    def noting(**arguments):
        calls.append(arguments)
        return make(**arguments)

    monkeypatch.setattr(utils, "create_masks_for_generate", noting)
    return calls


@pytest.fixture
def model(device):
    return llama().to(device).eval()


def prompt(model, padded=2, length=6):
    tokens = torch.arange(1, 1 + 2 * length, device=model.device).view(2, length)
    mask = torch.ones_like(tokens)
    mask[0, :padded] = 0
    return {"inputs": tokens, "attention_mask": mask}


def generated(model, **how):
    out = model.generate(**how, **HOW)
    return torch.stack([*out.logits])


def test_no_mask_is_made_for_steps_that_are_replayed(model, captures, made):
    expected = generated(model, **prompt(model))
    each = len(made)
    made.clear()
    with capture_decode(model) as capture:
        assert torch.equal(generated(model, **prompt(model)), expected)
        assert capture.stats().replayed == STEPS - 2
        assert len(made) == each - (STEPS - 2) + 1  # that of the capture counts for all of them
        made.clear()
        assert torch.equal(generated(model, **prompt(model)), expected)
        assert len(made) == each - (STEPS - 1)
    made.clear()
    assert torch.equal(generated(model, **prompt(model)), expected)
    assert len(made) == each
    assert "create_masks_for_generate" not in vars(model)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_of_shorter_and_longer_prompts_and_other_padding(attention, model, captures):
    model.set_attn_implementation(attention)
    prompts = [prompt(model), prompt(model, 5, 12), prompt(model, 0, 3), prompt(model, 1, 12), prompt(model, 3, 4)]
    expected = [generated(model, **each) for each in prompts]
    capture = capture_decode(model)
    for each, logits in zip(prompts, expected, strict=True):
        assert torch.equal(generated(model, **each), logits)
    assert (capture.stats().captures, capture.stats().uncaptured) == (1, 1)


def test_a_hook_of_the_model_is_given_the_mask_itself(model, captures):
    seen = []
    expected = generated(model, **prompt(model))
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    capture = capture_decode(model)
    assert torch.equal(generated(model, **prompt(model)), expected)
    assert len(seen) == STEPS
    assert all(isinstance(mask, torch.Tensor) and mask.dim() == 4 for mask in seen[1:])
    assert capture.stats().replayed == STEPS - 2


def test_a_model_that_prepares_its_inputs_itself_is_given_the_mask_itself(model, captures):
    own, seen = model.prepare_inputs_for_generation, []

    def prepared(*args, **kwargs):
        inputs = own(*args, **kwargs)
        seen.append(inputs["attention_mask"])
        return inputs

    expected = generated(model, **prompt(model))
    capture = capture_decode(model)
    model.prepare_inputs_for_generation = prepared
    assert torch.equal(generated(model, **prompt(model)), expected)
    assert all(isinstance(mask, torch.Tensor) for mask in seen)
    assert capture.stats().replayed == STEPS - 2


@pytest.mark.parametrize("where", ["forward", "__call__"])
def test_what_is_put_around_the_method_of_a_model_is_given_the_mask_itself(where, model, captures, monkeypatch):
    expected, seen = generated(model, **prompt(model)), []
    capture = capture_decode(model)
    holder = model if where == "forward" else type(model)
    own = getattr(holder, where)

    @functools.wraps(own)
    def around(*args, **kwargs):
        seen.append(kwargs["attention_mask"].dim())
        return own(*args, **kwargs)

    monkeypatch.setattr(holder, where, around, raising=False)
    assert torch.equal(generated(model, **prompt(model)), expected)
    assert seen[1:] == [4] * (STEPS - 1)
    assert capture.stats().replayed == STEPS - 2


def test_where_no_graph_can_make_the_mask_it_is_made_as_before_and_the_step_captured(
    model, captures, monkeypatch, warned
):
    make = utils.create_masks_for_generate

    def reads_on_the_host(**arguments):
        mask = arguments["attention_mask"]
        assert mask is None or mask.sum().item() > 0
        return make(**arguments)

    monkeypatch.setattr(utils, "create_masks_for_generate", reads_on_the_host)
    expected = generated(model, **prompt(model))
    capture = capture_decode(model)
    assert torch.equal(generated(model, **prompt(model)), expected)
    assert capture.stats().replayed == STEPS - 4  # the second step was not captured, and then the first of a kind
    assert warned() == []
    assert torch.equal(generated(model, **prompt(model)), expected)
    assert capture.stats().captures == 1


@pytest.mark.parametrize("reason", ["gradients", "training", "hidden states"])
def test_steps_that_are_not_captured_are_given_the_mask_itself(reason, model, captures):
    if reason == "training":
        model.train()
    more = {"output_hidden_states": True} if reason == "hidden states" else {}
    expected = generated(model, **prompt(model), **more)
    own = model.forward
    capture = capture_decode(model)
    assert torch.equal(generated(model, **prompt(model), **more), expected)
    if reason == "gradients":
        inputs = dict(given(model, StaticCache(config=model.config, max_cache_len=24)))
        with torch.no_grad():
            model(prompt(model)["inputs"], **inputs)
        step = model.prepare_inputs_for_generation(
            prompt(model)["inputs"],
            next_sequence_length=1,
            attention_mask=torch.ones(2, 7, device=model.device),
            **inputs,
        )
        out = model(**step).logits
        assert out.requires_grad
    else:
        assert capture.stats().replayed == 0
    capture.remove()
    assert model.forward == own
