"""The place of a cache that is no more is lent to the next one, and to no other at the same time."""

import random

import pytest
import torch
from models import llama
from static_caches import given
from transformers import StaticCache

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
