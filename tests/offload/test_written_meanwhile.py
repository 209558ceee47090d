"""Weights that are written to while they are on the device, while a GPU computes, or while Ctrl-C comes."""

import pytest
import torch
from comparisons import equal
from streaming import groups_of, pairs, resident, stream_from_disk, streamed, tokens
from torch import nn

from bigload.offload import at_rest
from bigload.offload import engine as engine_module
from bigload.offload.engine import Engine
from bigload.offload.leaves import StreamedTensor
from bigload.offload.on_device.slot_pool import SlotPool
from bigload.offload.residency import Residency
from bigload.quantization.layers import is_quantized


@pytest.mark.parametrize("home", ["cpu", "disk"])
@torch.no_grad()
def test_what_a_state_dict_shares_counts_even_if_it_was_made_meanwhile(device, tmp_path, home):
    expected, model, engine = streamed(device, tmp_path, home)
    with engine.materialize(model):
        state = model.state_dict()
    for one in (expected.state_dict(), state):
        one["1.0.weight"].mul_(2)
    x = torch.randn(3, 64, device=device)
    assert equal(model(x), expected(x))


@pytest.mark.parametrize("home", ["cpu", "disk"])
@torch.no_grad()
def test_weight_that_is_cast_while_it_is_on_the_device_is_streamed_as_it_is_then(device, tmp_path, home):
    expected, model, engine = streamed(device, tmp_path, home)
    with engine.materialize(model[1]):
        model[1].double()[0].weight.data.mul_(3)
    expected[1].double()[0].weight.data.mul_(3)
    x = torch.randn(3, 64, device=device)
    for _ in range(2):
        assert equal(model[1](x.double()), expected[1](x.double()))
        assert equal(model[0](x), expected[0](x))


@pytest.mark.parametrize("home", ["cpu", "disk"])
@torch.no_grad()
def test_what_torch_cannot_notice_counts_once_it_is_told(device, tmp_path, home):
    expected, model, _ = streamed(device, tmp_path, home)
    x = torch.randn(3, 64, device=device)
    model(x)
    model[0][1].weight.detach().numpy()[:] *= 2
    torch.autograd.graph.increment_version(model[0][1].weight)
    expected[0][1].weight.mul_(2)
    assert equal(model(x), expected(x))


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "int8"])
@torch.no_grad()
def test_scales_count_once_torch_is_told(device, tmp_path, mode):
    expected, model = resident(mode, device), resident(mode, device)
    stream_from_disk(model, device, tmp_path)
    before = model(tokens(device))
    assert equal(expected(tokens(device)), before)  # an int8 layer has its state from then on
    for one in (expected, model):
        layer = next(module for module in one.modules() if is_quantized(module))
        scales = layer.state.SCB if mode == "int8" else layer.weight.quant_state.absmax
        scales.copy_(scales.flip(0))
        torch.autograd.graph.increment_version(layer.weight)
    assert equal(model(tokens(device)), expected(tokens(device)))
    assert not equal(model(tokens(device)), before)


@torch.no_grad()
def test_state_dict_waits_for_forwards_that_read_its_tensors(device, tmp_path, monkeypatch):
    _, model, engine = streamed(device, tmp_path, "cpu")
    waits, finish = [], engine.pool.copier.finish
    monkeypatch.setattr(engine.pool.copier, "finish", lambda: (waits.append(True), finish()))
    model.state_dict()
    assert waits


@torch.no_grad()
def test_values_at_rest_are_replaced_when_forwards_have_read_them(device, tmp_path, monkeypatch):
    _, model, engine = streamed(device, tmp_path, "cpu")
    model(torch.randn(3, 64, device=device))
    before, seen = model[0][0].weight.detach().clone(), []
    at_rest, finish = model[0][0].weight.detach(), engine.pool.copier.finish
    monkeypatch.setattr(engine.pool.copier, "finish", lambda: (seen.append(at_rest.clone()), finish()))
    model[0][0].weight = nn.Parameter(before * 2, requires_grad=False)
    model(torch.randn(3, 64, device=device))
    assert equal(seen[0], before)
    assert equal(at_rest, before * 2)


@pytest.mark.parametrize("step", ["forget", "exchange_store", "follow", "keep_writes", "put_at_rest"])
@pytest.mark.parametrize("nth", [1, 2])
@torch.no_grad()
def test_interrupted_between_any_steps_the_next_forward_finds_what_was_written(
    device, tmp_path, monkeypatch, step, nth
):
    expected, model, _engine = streamed(device, tmp_path, "cpu")
    x = torch.randn(3, 64, device=device)
    model(x)
    for one in (expected, model):
        one[0][1].weight.mul_(2)
        one[1][0].weight = nn.Parameter(one[1][0].weight * 2, requires_grad=False)
        one[1][1].weight.data = one[1][1].weight.data.to(torch.float64).to(torch.float32) + 1
        one[2][1].weight = nn.Parameter(one[2][1].weight + 1, requires_grad=False)
    where = {"follow": Residency, "keep_writes": engine_module, "put_at_rest": StreamedTensor}.get(step, SlotPool)
    own, calls = getattr(where, step), []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == nth:
            raise KeyboardInterrupt
        return own(*given)

    monkeypatch.setattr(where, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    for _ in range(2):
        assert equal(model(x), expected(x))
    assert {type(parameter).__name__ for parameter in model.parameters()} <= {"Parameter", "_AtRestParameter"}
    count = len(calls)
    model(x)
    assert len(calls) == count  # nothing is left to do


def test_offloading_that_is_interrupted_leaves_parameters_of_their_own_class(device, tmp_path, monkeypatch):
    calls = []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return []

    monkeypatch.setattr(engine_module, "hook_state_dicts", interrupted)
    model = pairs(nn.Linear, device=device)
    with pytest.raises(KeyboardInterrupt):
        Engine(model, list(groups_of(model, device)), device)
    assert {type(parameter) for parameter in model.parameters()} == {nn.Parameter}


def test_lists_of_weights_are_written_where_each_of_them_is(moves):
    pool = SlotPool([], torch.device("cpu"), 1, lambda slot: None)
    pool.copier.device = torch.device("meta")
    own = nn.Parameter(torch.ones(4, 4), requires_grad=False)
    at_rest.keep_writes(own, pool)
    there = torch.ones(4, 4, device="meta")
    for both in ([own.data, there], [there, own.data]):
        torch._foreach_mul_(both, 2)
        torch._foreach_lerp_(both, [torch.full((4, 4), 5.0), torch.full((4, 4), 5.0)], 0.0)
        assert both[0].device != both[1].device
    assert own.tolist() == [[4.0] * 4] * 4
