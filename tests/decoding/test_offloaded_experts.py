"""Offloaded experts in captured steps, where the GPU keeps the book of their cache.

On the CPU a book stands in for the GPU's that has room for all experts, and a forward that reads nothing on the host.
"""

import contextlib
import dataclasses

import pytest
import torch
from mixtures import mixture
from static_caches import given
from streaming import group_of, poison
from transformers import StaticCache

from bigload import capture_decode, load_and_quantize_model
from bigload.offload.engine import Engine
from bigload.offload.leaves import Leaf
from bigload.offload.on_device import gpu_book
from bigload.offload.on_device.gpu_book import GpuBook
from bigload.quantization.packed_experts import BOOK, TABLE
from bigload.quantization.saved_experts import quantized_experts


class BookOfAll(GpuBook):
    """Brings all experts in each call, by operators alone."""

    def __init__(self, memory, store):
        self._memory, self._store, self._device = memory, store, memory.whole.device
        self._table, self._book = memory.tensors[TABLE], memory.tensors[BOOK]
        self._parts_begin = len(self._book)
        self._changes, self._changes_seen, self._shared_nbytes = 0, -1, 0
        self.places = gpu_book._PlacesInTable(self._table)
        self.followed = 0

    def _admit(self, ids, pairs, is_first):
        self._table.copy_(torch.arange(self._memory.experts))

    def _fetch(self, pairs):
        for part in self._memory.sliced:
            target = self._memory.tensors[part]
            target.copy_(self._store.source_of(self._memory.prefix + part).view(target.shape))

    def follow(self):
        self.followed += 1

    def count(self):
        return 0, 0, 0

    def discard(self):
        pass


def dense(module, given, packed):
    """Compute all experts for all tokens."""
    x, ids, weights = given
    up, down = (dataclasses.replace(each, places=None) for each in packed)
    out = torch.zeros_like(x)
    for expert in range(module.quantized_experts.num_experts):
        h = x @ up.dequantize(expert, x.dtype).T
        h = module.quantized_experts.activate(module, h) @ down.dequantize(expert, x.dtype).T
        out += h * (weights * (ids == expert)).sum(-1, keepdim=True).to(x.dtype)
    return out


@pytest.fixture
def books(device, monkeypatch):
    if device.type == "cpu":
        monkeypatch.setattr(BookOfAll, "suits", classmethod(lambda cls, memory, store, device: memory.slots > 0))
        monkeypatch.setattr("bigload.offload.on_device.expert_cache.GpuBook", BookOfAll)
        monkeypatch.setattr("bigload.offload.expert_forwards.compute_experts", dense)
        monkeypatch.setattr(gpu_book, "current_gpu", lambda device: contextlib.nullcontext())


@pytest.fixture(params=["poisoned", "as it is"])
def at_rest(request):
    return request.param


@pytest.fixture
def model(device, books, at_rest):
    model = load_and_quantize_model(mixture("qwen3_moe"), "nf4", None, device_map=device).eval().requires_grad_(False)
    model.engine = stream(model, device, at_rest == "poisoned")
    return model


def stream(model, device, is_poisoned=False):
    """Offload the experts of a model; a GPU has room for half of them."""
    groups = []
    for path, module in quantized_experts(model).items():
        group = group_of(path, [Leaf(path, module, module.quantized_experts.weights)], device)
        group.cached = 4 if device.type == "cpu" else 2
        if is_poisoned:
            poison(group)
        groups.append(group)
    vars(model)["engines"] = engine = Engine(model, groups, device, 1)
    return engine


def caches_of(model):
    return [*model.engine.pool.caches._caches.values()]


@torch.no_grad()
def decoded(model, steps=6, between=lambda step: None):
    device = model.lm_head.weight.device
    cache = StaticCache(config=model.config, max_cache_len=16)
    tokens = torch.arange(3, 6, device=device).view(1, 3)
    found = [model(tokens, **given(model, cache)).logits[:, -1:]]
    for step in range(steps):
        between(step)
        found.append(model(torch.full((1, 1), 7 * step % 50, device=device), **given(model, cache)).logits)
    return torch.cat(found, 1)


def test_steps_are_captured_with_the_cache_that_the_gpu_keeps(model, captures, device):
    expected = decoded(model)
    capture = capture_decode(model)
    assert torch.equal(decoded(model), expected)
    assert (capture.stats().replayed, capture.stats().captures, capture.stats().reasons) == (5, 1, ())
    assert torch.equal(decoded(model), expected)
    assert capture.stats().replayed == 11
    if device.type == "cpu":  # what is in the cache comes with each replay

        def overwrite(step):
            for cache in caches_of(model):
                for part in cache._book._memory.sliced:
                    cache._book._memory.tensors[part].view(torch.uint8).fill_(0xFF)

        assert torch.equal(decoded(model, between=overwrite), expected)
        assert capture.stats().replayed == 17
        assert all(cache._book.followed >= 17 for cache in caches_of(model))


def exchange(model, step, at=3):
    if step == at:
        first, second = quantized_experts(model).values()
        with torch.no_grad():
            first.gate_up_proj.copy_(second.gate_up_proj.clone())


@pytest.mark.parametrize("at_rest", ["as it is"], indirect=True)
def test_writes_to_experts_at_rest_count_in_the_next_step(model, captures):
    before = decoded(model)  # the caches are filled
    capture = capture_decode(model)
    assert torch.equal(decoded(model), before)
    found = decoded(model, between=lambda step: exchange(model, step))
    assert torch.equal(found[:, :4], before[:, :4])
    assert not torch.equal(found[:, 4:], before[:, 4:])
    written = decoded(model)
    # The step after the write runs as before, and the graph is still right.
    assert (capture.stats().captures, capture.stats().uncaptured) == (1, 2)
    capture.remove()
    assert torch.equal(written, decoded(model))


def test_experts_that_come_back_to_the_device_are_captured_as_resident_ones(model, captures, device):
    capture = capture_decode(model)
    expected = decoded(model)
    model.engine.remove()
    if device.type == "cpu":
        capture.remove()
        return  # the CPU reads which experts are visited
    assert torch.equal(decoded(model), expected)
    assert capture.stats().captures == 2


def test_experts_whose_book_the_host_keeps_are_not_captured(device, captures, warned, monkeypatch):
    monkeypatch.setattr(GpuBook, "suits", classmethod(lambda *_: False))
    model = load_and_quantize_model(mixture("qwen3_moe"), "nf4", None, device_map=device).eval().requires_grad_(False)
    model.engine = stream(model, device)
    expected = decoded(model)
    capture = capture_decode(model)
    assert torch.equal(decoded(model), expected)
    assert capture.stats().replayed == 0
    assert "mlp.experts' is offloaded, and the host keeps the cache of its experts" in warned()[-1]


def test_another_thread_is_kept_out_while_a_step_is_replayed(model, captures):
    capture = capture_decode(model)
    expected = decoded(model)
    (first, *_) = caches_of(model)
    own, seen = first._book.follow, []

    def follow():
        seen.append(first._is_captured)
        own()

    first._book.follow = follow
    assert torch.equal(decoded(model), expected)
    assert seen.count(True) >= 5
    assert not first._is_captured
    assert capture.stats().captures == 1


@pytest.mark.cuda
def test_a_loaded_mixture_generates_the_same_tokens_captured(small_parts_stream):
    device = torch.device("cuda", 0)
    from bigload import OffloadConfig

    away = {f"model.layers.{layer}.mlp.experts": "cpu" for layer in range(2)}
    model = load_and_quantize_model(
        mixture("qwen3_moe"),
        "nf4",
        None,
        device_map={"": device, **away},
        offload=OffloadConfig(expert_cache=0.5),
    ).eval()
    tokens = torch.arange(3, 9, device=device).view(1, 6)
    how = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    how |= {"cache_implementation": "static", "disable_compile": True}
    expected = model.generate(tokens, **how)
    with capture_decode(model) as capture:
        for _ in range(2):
            assert torch.equal(model.generate(tokens, **how), expected)
        assert capture.stats().replayed > 30
    hits = model.offload.stats().expert_hits
    assert hits > 0
