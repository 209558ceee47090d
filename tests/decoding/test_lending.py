"""The place of a cache that is no more is lent to the next one, and to no other at the same time."""

import copy
import gc
import random

import pytest
import torch
from models import llama, t5
from static_caches import given
from transformers import EncoderDecoderCache, StaticCache

from bigload import capture_decode


@torch.no_grad()
def turns(model, tokens, seed):
    """Decode with two caches at a time by turns, with positions of the caller's or without, five times over."""
    chance, logits = random.Random(seed), []
    for _ in range(5):
        caches = []
        for _ in range(2):
            caches.append(StaticCache(config=model.config, max_cache_len=32))
            logits.append(model(tokens + chance.randrange(40), **given(model, caches[-1])).logits)
            for _ in range(5):
                more = {"position_ids": torch.full_like(tokens[:, :1], 20)} if chance.random() < 0.5 else {}
                logits.append(model(tokens[:, :1], **more, **given(model, chance.choice(caches))).logits)
    return logits


@pytest.mark.parametrize("seed", [1, 7, 8, 11])
def test_caches_that_graphs_moved_to_and_fro_are_lent_as_one_place_each(seed, device, captures):
    model, tokens = llama().to(device).eval(), torch.arange(1, 11, device=device).view(2, 5)
    expected = turns(model, tokens, seed)
    capture = capture_decode(model)
    for found, logits in zip(turns(model, tokens, seed), expected, strict=True):
        assert torch.equal(found, logits)
    assert capture.stats().replayed == 48


@torch.no_grad()
def after_its_copy(model, tokens):
    """Generate, keep a shallow copy of the cache alone, generate again, and go on with the copy."""
    logits = []
    for offset in range(3):
        cache = StaticCache(config=model.config, max_cache_len=32)
        logits.append(model(tokens + offset, **given(model, cache)).logits)
        logits += [model(tokens[:, :1] + offset, **given(model, cache)).logits for _ in range(3)]
        if offset == 0:
            kept = copy.copy(cache)
        del cache
        gc.collect()
    before = [layer.keys.clone() for layer in kept.layers]
    logits += [model(tokens[:, 1:2], **given(model, kept)).logits for _ in range(3)]
    return logits, before


def test_a_place_is_not_lent_while_somebody_has_the_layers_that_lie_there(device, captures):
    model, tokens = llama().to(device).eval(), torch.arange(1, 11, device=device).view(2, 5)
    expected, before = after_its_copy(model, tokens)
    capture = capture_decode(model)
    found, kept = after_its_copy(model, tokens)
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, kept, before))
    assert capture.stats().replayed > 6


@torch.no_grad()
def around_kept_caches(model, tokens):
    """Decode with two caches in a wrapper, drop it, decode with others, and go on with the two in another wrapper."""
    encoded, logits = model.get_encoder()(tokens), []

    def step(caches, ids):
        held = EncoderDecoderCache(*caches)
        logits.append(model(decoder_input_ids=ids, encoder_outputs=encoded, **given(model, held)).logits)
        return held

    pairs = [[StaticCache(config=model.config, max_cache_len=size) for size in (16, 5)] for _ in range(2)]
    for number, pair in enumerate(pairs):
        step(pair, tokens[:, :2] + number)
        held = EncoderDecoderCache(*pair)
        for ids in range(4):
            more = {"decoder_input_ids": torch.full_like(tokens[:, :1], 5 + ids), "encoder_outputs": encoded}
            logits.append(model(**more, **given(model, held)).logits)
        del held
        gc.collect()
    for ids in range(3):
        step(pairs[0], torch.full_like(tokens[:, :1], 25 + ids))
    return logits


def test_a_place_is_not_used_again_while_somebody_has_the_caches_in_a_wrapper_that_is_gone(device, captures):
    model, tokens = t5().to(device).eval(), torch.arange(1, 11, device=device).view(2, 5)
    expected = around_kept_caches(model, tokens)
    capture = capture_decode(model)
    assert all(map(torch.equal, around_kept_caches(model, tokens), expected))
    assert capture.stats().replayed > 4
