"""The ways in which a GPU computes experts, with kernels that torch computes: what is launched, with what.

`test_expert_kernels.py` has the kernels themselves, on a GPU.
"""

import kernels_by_torch
import pytest
import torch
from experts import in_places, made, pack, packed, routed

from bigload.quantization import expert_launches as launches
from bigload.quantization.expert_linears import Routing, expert_limits
from bigload.quantization.packed_experts import PackedExperts

DTYPE = torch.bfloat16
KINDS = ["qwen3", "gpt_oss", "nemotron"]  # gated; transposed, with biases and another gate; without a gate


@pytest.fixture(autouse=True)
def lower_limit(monkeypatch):
    monkeypatch.setattr(expert_limits, "grouped_tokens", 40)


def close(found, expected):
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item() < 2e-2


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_way_computes_what_the_plain_one_does(kind, mode, monkeypatch):
    model = made(kind, dtype=DTYPE)
    pack(model, mode, DTYPE)
    few, some = ["gemv", "gemv_combined"], ["route", "grouped", "grouped", "combine"]
    many = ["dequantize_visited", "dequantize_visited", "combine"]
    for tokens, ways in [(1, few), (3, few), (4, some), (40, some), (41, many)]:
        x, ids, weights = routed(tokens, 2, model.experts, DTYPE)
        ids[0, 0] = 6  # no expert's
        with torch.no_grad():
            expected = model.experts(x, ids, weights)
            with monkeypatch.context() as patch:
                launched = kernels_by_torch.install(patch)
                found = model.experts(x, ids, weights)
        assert close(found, expected)
        assert launched == ways
        assert found.dtype == DTYPE


@pytest.mark.parametrize("tokens", [3, 50])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_plain_way(kind, tokens, monkeypatch):
    model = made(kind, dtype=DTYPE)
    pack(model, "nf4-dq", DTYPE)
    x, ids, weights = routed(tokens, 2, model.experts, DTYPE)
    ids[0, 0] = 6

    def gradients():
        given = x.clone().requires_grad_(), weights.clone().requires_grad_()
        out = model.experts(given[0], ids, given[1])
        return out.detach(), *torch.autograd.grad(out.float().square().sum(), given)

    expected = gradients()
    launched = kernels_by_torch.install(monkeypatch)
    for found, right in zip(gradients(), expected, strict=True):
        assert close(found, right)
    assert ("grouped" in launched) == (tokens <= expert_limits.grouped_tokens)
    assert launched[-1] == "combine"  # the gradients of each token's pairs, added up
    assert "combine_backward" in launched


def test_more_pairs_than_are_sorted_at_once_are_sorted_by_torch(monkeypatch):
    monkeypatch.setattr(launches, "MAX_ROUTED", 8)
    model = made(dtype=DTYPE)
    pack(model, "nf4", DTYPE)
    given = routed(5, 2, model.experts, DTYPE)
    with torch.no_grad():
        expected = model.experts(*given)
        launched = kernels_by_torch.install(monkeypatch)
        assert close(model.experts(*given), expected)
    assert launched == ["grouped", "grouped", "combine"]


def test_what_kernels_do_not_suit_is_computed_without_them(monkeypatch):
    """Values of 32 bit, and rows that end within a block."""
    launched = kernels_by_torch.install(monkeypatch)
    for dtype, intermediate in ((torch.float32, 64), (DTYPE, 96)):
        model = made(intermediate=intermediate, dtype=dtype)
        plain = pack(model, "nf4", dtype)
        given = routed(2, 2, model.experts, dtype)
        with torch.no_grad():
            assert close(model.experts(*given), plain.experts(*given))
    assert not launched


def test_scratch_memory_is_bounded_by_more_steps(monkeypatch):
    model = made(dtype=DTYPE)
    pack(model, "nf4", DTYPE)
    x, ids, weights = routed(50, 2, model.experts, DTYPE)
    counts, found = [], []
    launched = kernels_by_torch.install(monkeypatch)
    for scratch in (expert_limits.scratch_bytes, 6 * 128 * 64 * 2):
        monkeypatch.setattr(expert_limits, "scratch_bytes", scratch)
        launched.clear()
        given = x.clone().requires_grad_()
        out = model.experts(given, ids, weights)
        out.float().sum().backward()
        counts.append(launched.count("dequantize_visited"))
        found.append((out.detach(), given.grad))
    assert counts[1] > counts[0] == 4
    assert all(close(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq"])
def test_experts_in_places_of_their_own_give_the_same_bits(mode, monkeypatch):
    kernels_by_torch.install(monkeypatch)
    shape = (5, 96, 192)
    weight = PackedExperts.of(packed(torch.randn(shape, dtype=DTYPE), mode))
    some = in_places(weight, list(range(4)), 6)
    ids, bias = torch.tensor([[0, 3], [2, 7]]), torch.randn(5, 96, dtype=DTYPE)
    x, rows = torch.randn(2, 192, dtype=DTYPE), torch.randn(4, 192, dtype=DTYPE)
    routing = Routing.of(ids, 5, True)
    found, expected = (
        [
            launches.gemv(x, each, ids, 2, bias),
            launches.gemv(x, each, ids, 2, bias, gated=True),
            launches.gemv_combined(rows, each, ids, bias, torch.rand(2, 2, generator=torch.manual_seed(0)).to(DTYPE)),
            launches.grouped(x, each, routing.order, routing.ends, 2, bias)[:3],
            launches.dequantize_visited(each, routing.ends, slice(16, 48), slice(0, 192), DTYPE)[[0, 2, 3]],
        ]
        for each in (some, weight)
    )
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not any(each.isnan().any() for each in found)


def test_values_that_begin_between_two_are_copied(monkeypatch):
    """Kernels read two at a time."""
    kernels_by_torch.install(monkeypatch)
    weight = PackedExperts.of(packed(torch.randn(2, 64, 64, dtype=DTYPE)))
    x, ids = torch.randn(65, dtype=DTYPE), torch.tensor([[1]])
    odd = x[1:].view(1, 64)
    assert torch.equal(launches.gemv(odd, weight, ids, 1, None), launches.gemv(odd.clone(), weight, ids, 1, None))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_inputs_are_read_from_a_multiple_of_16_bytes_on(device):
    """Also those that begin elsewhere, where their own memory does, as torch sees it."""
    all_of_it = torch.randn(72, device=device).to(DTYPE)
    for begin in (0, 1, 2, 4, 8):
        x = torch.from_dlpack(torch.utils.dlpack.to_dlpack(all_of_it[begin : begin + 64])).view(1, 64)
        assert x.storage_offset() == 0
        read = launches._two_at_a_time(x)
        assert read.data_ptr() % 16 == 0
        assert torch.equal(read.view(DTYPE), x)
