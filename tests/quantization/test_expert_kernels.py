"""The ways of a GPU: each kernel against the dequantized values, which way is taken, and what it takes of memory."""

import pytest
import torch
from experts import in_places, made, pack, packed, routed

from bigload.quantization import expert_launches as launches
from bigload.quantization.bnb import dequantize_4bit
from bigload.quantization.expert_linears import Routing, expert_limits
from bigload.quantization.packed_experts import PackedExperts

pytestmark = pytest.mark.cuda

# (E, out_features, in_features) and the blocksize: usual, rows that fill no program, as GPT-OSS has them, small.
SHAPES = [((5, 96, 192), 64), ((6, 80, 320), 64), ((3, 5760, 2880), 64), ((7, 48, 64), 32), ((4, 64, 256), 128)]
GPU = torch.device("cuda", 0)


def pairs(shape, tokens, top_k, seed=0):
    """Return the experts of some tokens: none chooses the last, and the first of the first is of another rank."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(shape[0] - 1, generator=generator)[:top_k] for _ in range(tokens)])
    ids[0, 0] = shape[0] + 1
    return ids.to(GPU)


def weight_of(shape, mode, blocksize, dtype):
    parameter = packed(torch.randn(shape, device=GPU, dtype=dtype), mode, blocksize=blocksize)
    return PackedExperts.of(parameter), dequantize_4bit(parameter.data, parameter.quant_state, torch.float32)


def expected_of(x, values, ids, bias):
    """Return the product of each pair, (pairs, out_features), in fp32; 0 for those of no expert."""
    flat = ids.reshape(-1)
    there = flat < len(values)
    rows = x.float().repeat_interleave(ids.shape[1], 0)
    out = torch.zeros(len(flat), values.shape[1], device=x.device)
    for pair in there.nonzero().view(-1).tolist():
        out[pair] = values[flat[pair]] @ rows[pair] + (0 if bias is None else bias[flat[pair]].float())
    return out, there


def close(found, expected, dtype):
    error = ((found.float() - expected).norm() / expected.norm()).item()
    return error < (8e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.fixture(autouse=True)
def full_precision():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4"])
@pytest.mark.parametrize(("shape", "blocksize"), SHAPES, ids=str)
def test_kernels_multiply_with_the_dequantized_values(shape, blocksize, mode, dtype):
    weight, values = weight_of(shape, mode, blocksize, dtype)
    assert launches.suits_kernels(weight, dtype)
    for bias in (None, torch.randn(shape[:2], device=GPU, dtype=dtype)):
        for tokens in (1, 3, 40, 300):
            ids = pairs(shape, tokens, 2)
            x = torch.randn(tokens, shape[2], device=GPU, dtype=dtype)
            expected, there = expected_of(x, values, ids, bias)
            found = launches.gemv(x, weight, ids, 2, bias)
            assert close(found, expected, dtype)
            assert not found[~there].any()
            routing = Routing.of(ids, shape[0], True)
            found = launches.grouped(x, weight, routing.order, routing.ends, 2, bias)
            assert close(found[there], expected[there], dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq"])
@pytest.mark.parametrize(("shape", "blocksize"), SHAPES, ids=str)
def test_one_launch_gives_what_the_operators_of_torch_make_of_each_product(shape, blocksize, mode, dtype):
    weight, _ = weight_of(shape, mode, blocksize, dtype)
    for bias in (None, torch.randn(shape[:2], device=GPU, dtype=dtype)):
        for tokens, top_k in ((1, 3), (3, 1), (2, 3)):
            ids = pairs((max(shape[0], top_k + 1), 0, 0), tokens, top_k).clamp(max=shape[0])
            ids[-1, -1] = -1
            x = torch.randn(tokens, shape[2], device=GPU, dtype=dtype)
            gate, up = launches.gemv(x, weight, ids, top_k, bias).chunk(2, -1)
            gated = launches.gemv(x, weight, ids, top_k, bias, gated=True)
            assert close(gated, (torch.nn.functional.silu(gate) * up).float(), dtype)
            x = torch.randn(tokens * top_k, shape[2], device=GPU, dtype=dtype)
            weights = torch.rand(tokens, top_k, device=GPU, dtype=dtype)
            each = launches.gemv(x, weight, ids, 1, bias)
            combined = launches.gemv_combined(x, weight, ids, bias, weights)
            assert close(combined, launches.combine(each, ids, weights, shape[0]).float(), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4"])
@pytest.mark.parametrize(("shape", "blocksize"), SHAPES, ids=str)
def test_visited_experts_have_the_values_that_bitsandbytes_gives_them(shape, blocksize, mode, dtype):
    parameter = packed(torch.randn(shape, device=GPU, dtype=dtype), mode, blocksize=blocksize)
    weight = PackedExperts.of(parameter)
    values = dequantize_4bit(parameter.data, parameter.quant_state, dtype)
    ids = pairs(shape, 2, 2)
    seen = torch.bincount(ids[ids < shape[0]], minlength=shape[0]) > 0
    ends = Routing.of(ids, shape[0], True).ends
    whole = slice(0, shape[1]), slice(0, shape[2])
    for rows, columns in (whole, (slice(16, 48), whole[1]), (whole[0], slice(32, 64))):
        found = launches.dequantize_visited(weight, ends, rows, columns, dtype)
        assert torch.equal(found[seen], values[seen][:, rows, columns])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4"])
@pytest.mark.parametrize(("shape", "blocksize"), SHAPES, ids=str)
def test_experts_in_places_of_their_own_give_the_same_bits(shape, blocksize, mode, dtype):
    weight, _ = weight_of(shape, mode, blocksize, dtype)
    wanted = list(range(shape[0] - 1))
    some = in_places(weight, wanted, shape[0] + 1)
    for bias in (None, torch.randn(shape[:2], device=GPU, dtype=dtype)):
        for tokens in (1, 3, 40, 300):
            ids = pairs(shape, tokens, 2)
            there = ids.reshape(-1) < shape[0]
            x = torch.randn(tokens, shape[2], device=GPU, dtype=dtype)
            routing = Routing.of(ids, shape[0], True)
            whole = slice(0, shape[1]), slice(0, shape[2])
            rows = torch.randn(ids.numel(), shape[2], device=GPU, dtype=dtype)
            weights = torch.rand(ids.shape, device=GPU, dtype=dtype)
            found, expected = (
                [
                    launches.gemv(x, each, ids, 2, bias),
                    launches.gemv(x, each, ids, 2, bias, gated=True),
                    launches.gemv_combined(rows, each, ids, bias, weights),
                    launches.grouped(x, each, routing.order, routing.ends, 2, bias)[there],
                    launches.dequantize_visited(each, routing.ends, *whole, dtype)[ids[ids < shape[0]].unique()],
                ]
                for each in (some, weight)
            )
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 1, 3), (1, 8, 128), (16, 8, 128), (64, 4, 8), (5, 3, 4)])
def test_few_pairs_are_sorted_in_one_launch(tokens, top_k, experts):
    ids = torch.randint(-1, experts + 2, (tokens, top_k), device=GPU)
    order, ends = launches.route(ids, experts)
    expected = Routing.of(ids, experts, True)
    assert torch.equal(ends, expected.ends)
    present = int(ends[-1])
    assert torch.equal(order[:present].long(), expected.order[:present])
    assert sorted(order.tolist()) == list(range(tokens * top_k))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("features", [64, 2880])
def test_rows_are_combined_as_torch_does_and_their_gradients_too(features, weighted):
    ids = pairs((6, 0, 0), 40, 3)
    y = torch.randn(120, features, device=GPU)
    weights = torch.rand(40, 3, device=GPU) if weighted else None
    grads = []
    for by_kernels in (True, False):
        routing = Routing.of(ids, 6, by_kernels)
        given = [tensor if tensor is None else tensor.detach().clone().requires_grad_() for tensor in (y, weights)]
        out = routing.combine(*given)
        out.square().sum().backward()
        x = torch.arange(40.0, device=GPU).view(-1, 1).repeat(1, features).requires_grad_()
        absent = (routing.ids.view(-1)[routing.order] >= 6).unsqueeze(-1)
        routing.gather(x).masked_fill(absent, 0).square().sum().backward()
        grads.append([out.detach(), x.grad, *(tensor.grad for tensor in given if tensor is not None)])
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_more_tokens_than_the_second_dimension_of_a_grid_takes():
    model = made(hidden=64, intermediate=64, dtype=torch.bfloat16, device=GPU)
    pack(model, compute_dtype=torch.bfloat16)
    x, ids, weights = routed(70, 2, model.experts, torch.bfloat16, device=GPU)
    expected = model.experts(x.clone().requires_grad_(), ids, weights)
    found = model.experts(x.repeat(1000, 1), ids.repeat(1000, 1), weights.repeat(1000, 1))
    assert close(found[-70:], expected.float(), torch.bfloat16)


def test_limits_choose_the_way(monkeypatch):
    model = made(dtype=torch.bfloat16, device=GPU)
    pack(model, compute_dtype=torch.bfloat16)
    called = []
    for name in ("gemv", "gemv_combined", "grouped", "dequantize_visited"):
        own = getattr(launches, name)
        monkeypatch.setattr(launches, name, lambda *a, name=name, own=own, **k: called.append(name) or own(*a, **k))
    outputs = {}

    def ways(tokens, grad=False):
        called.clear()
        x, ids, weights = routed(tokens, 2, model.experts, torch.bfloat16, device=GPU)
        outputs[tokens] = model.experts(x.requires_grad_(grad), ids, weights)
        return set(called)

    assert ways(expert_limits.gemv_tokens) == {"gemv", "gemv_combined"}
    assert ways(expert_limits.gemv_tokens + 1) == {"grouped"}
    assert ways(expert_limits.grouped_tokens) == {"grouped"}
    assert ways(expert_limits.grouped_tokens + 1) == {"dequantize_visited"}
    assert ways(expert_limits.grouped_tokens + 1, grad=True) == {"dequantize_visited"}
    assert ways(2, grad=True) == {"grouped"}
    called.clear()
    outputs[2].sum().backward()
    assert set(called) == {"dequantize_visited"}
    by_values = outputs[2].detach()
    assert ways(2) == {"gemv", "gemv_combined"}
    assert close(outputs[2], by_values.float(), torch.bfloat16)
    monkeypatch.setattr(expert_limits, "gemv_tokens", 0)
    assert ways(2) == {"grouped"}
    assert close(outputs[2], by_values.float(), torch.bfloat16)


@pytest.mark.parametrize("tokens", [1, 4, 200, 300])
def test_a_cuda_graph_replays_it_with_other_tokens_and_experts(tokens):
    model = made("gpt_oss", dtype=torch.bfloat16, device=GPU)
    pack(model, "nf4-dq", torch.bfloat16)
    given = routed(tokens, 2, model.experts, torch.bfloat16, device=GPU)
    model.experts(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = model.experts(*given)
    others = routed(tokens, 2, model.experts, torch.bfloat16, seed=7, device=GPU)
    for place, other in zip(given, others, strict=True):
        place.copy_(other)
    graph.replay()
    assert torch.equal(out, model.experts(*others))


def test_a_bias_that_is_trained_gets_nothing_from_pairs_of_no_expert():
    """Their rows are not computed, and hold what was in the memory."""
    model = made("gpt_oss", dtype=torch.bfloat16, device=GPU, scale=0.1)
    plain = pack(model, compute_dtype=torch.bfloat16).float()
    x, ids, weights = routed(300, 2, model.experts, torch.bfloat16, device=GPU)
    absent = torch.full_like(x[:, :1].repeat(1, 4096), torch.nan)  # memory that is used again
    del absent
    ids[::2, 0] = 6
    grads = []
    for one, dtype in ((model, torch.bfloat16), (plain, torch.float32)):
        biases = [one.experts.gate_up_proj_bias.requires_grad_(), one.experts.down_proj_bias.requires_grad_()]
        there = ids.clamp(max=5), weights.masked_fill(ids == 6, 0)
        given = (ids, weights) if one is model else there
        one.experts(x.to(dtype), given[0], given[1].to(dtype)).square().sum().backward()
        grads.append([bias.grad for bias in biases])
    for found, expected in zip(*grads, strict=True):
        assert ((found - expected).norm() / expected.norm()).item() < 2e-2


def test_more_steps_give_the_same_output_and_gradients(monkeypatch):
    model = made(dtype=torch.bfloat16, device=GPU)
    pack(model, compute_dtype=torch.bfloat16)
    x, ids, weights = routed(300, 2, model.experts, torch.bfloat16, device=GPU)
    results = []
    for limit in (2**30, 1):
        monkeypatch.setattr(expert_limits, "scratch_bytes", limit)
        given = x.clone().requires_grad_()
        out = model.experts(given, ids, weights)
        out.sum().backward()
        results.append((out, given.grad))
    for found, expected in zip(*results, strict=True):
        assert close(found, expected.float(), torch.bfloat16)


def test_the_memory_of_dequantized_experts_is_bounded(monkeypatch):
    model = made(experts=16, hidden=1024, intermediate=1024, dtype=torch.bfloat16, device=GPU)  # 64 and 32 MiB
    pack(model, compute_dtype=torch.bfloat16)
    given = routed(300, 2, model.experts, torch.bfloat16, device=GPU)
    monkeypatch.setattr(expert_limits, "scratch_bytes", 8 * 2**20)
    with torch.no_grad():
        model.experts(*given)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model.experts(*given)
        assert torch.cuda.max_memory_allocated() - before < 8 * 2**20 + 8 * 600 * 2048 * 2


@pytest.mark.multi_gpu
def test_experts_compute_on_their_own_device():
    model = made(dtype=torch.bfloat16, device="cuda:1")
    pack(model, compute_dtype=torch.bfloat16)
    for tokens in (1, 9, 300):
        x, ids, weights = routed(tokens, 2, model.experts, torch.bfloat16, device="cuda:1")
        found = model.experts(x, ids, weights)
        assert found.device == torch.device("cuda", 1)
        given = x.clone().requires_grad_()
        assert close(found, model.experts(given, ids, weights).float(), torch.bfloat16)
