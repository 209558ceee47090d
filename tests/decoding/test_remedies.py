"""Each remedy that a message of captured steps names, tried: what was not captured then is."""

import copy

import pytest
import torch
from models import llama
from static_caches import given
from torch import nn
from transformers import DynamicCache, StaticCache

from bigload import ConfigError, capture_decode


@pytest.fixture
def model(device):
    return llama().to(device).eval()


def decoded(model, cache=None):
    cache = StaticCache(config=model.config, max_cache_len=24) if cache is None else cache
    tokens = torch.arange(1, 6, device=model.device).view(1, 5)
    model(tokens, **given(model, cache))
    for step in range(4):
        model(tokens[:, step : step + 1], **given(model, cache))


def test_steps_are_captured_without_gradients_in_eval_mode_and_with_a_static_cache(model, captures, warned):
    capture = capture_decode(model)
    decoded(model)
    assert "call it under torch.no_grad()" in warned()[-1]
    with torch.no_grad():
        decoded(model.train())
        assert "call model.eval()" in warned()[-1]
        decoded(model.eval(), DynamicCache())
        assert "generate with cache_implementation='static'" in warned()[-1]
        assert capture.stats().replayed == 0
        model.generate(
            torch.arange(1, 6, device=model.device).view(1, 5),
            max_new_tokens=6,
            min_new_tokens=6,
            pad_token_id=0,
            cache_implementation="static",
        )
    assert capture.stats().replayed == 4


def test_what_is_removed_can_be_captured_again_and_copied(model, captures):
    capture = capture_decode(model)
    with pytest.raises(ConfigError, match="call remove"):
        capture_decode(model)
    with pytest.raises(ConfigError, match="call remove"):
        copy.deepcopy(model)
    capture.remove()
    copy.deepcopy(model)
    capture_decode(model).remove()


class Sums(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(2))

    def writing(self, x, sums):
        return sums.add_(x) * 2

    def with_cache(self, x, cache):
        return cache.total.add_(x) * 2

    def with_buffer(self, x):
        return self.total.add_(x) * 2


class Cache:
    def __init__(self, device):
        self.total = torch.zeros(2, device=device)


@torch.no_grad()
def test_what_a_step_changes_is_captured_in_a_cache_object_and_in_a_buffer(device, captures, warned):
    x, expected = torch.ones(2, device=device), [2.0, 4.0, 6.0, 8.0]
    for step, kept in {
        "writing": torch.zeros(2, device=device),
        "with_cache": Cache(device),
        "with_buffer": None,
    }.items():
        model = Sums().to(device).eval()
        with capture_decode(model, step=step) as capture:
            given = () if kept is None else (kept,)
            assert [getattr(model, step)(x, *given)[0].item() for _ in expected] == expected
            assert capture.stats().replayed == (0 if step == "writing" else 3)
    (message,) = warned()
    assert "keep what a step changes in a cache object or a buffer" in message
