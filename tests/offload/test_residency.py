"""Weights are on the device while a call needs them and at rest after it, whatever comes between."""

import random
import signal

import pytest
import torch
from comparisons import equal
from streaming import (
    Own,
    assert_at_rest,
    group_of,
    groups_of,
    pairs,
    poison,
    resident,
    stream,
    tokens,
)
from torch import nn

from bigload.errors import OffloadError
from bigload.offload.engine import Engine
from bigload.offload.leaves import Leaf


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # between open and close
@pytest.mark.timeout(method="thread")  # the other way has the signal that this takes
@pytest.mark.parametrize("where", ["host", "disk"])
@pytest.mark.parametrize("kind", [nn.Linear, Own], ids=["direct", "placed"])
def test_ctrl_c_at_any_moment_leaves_no_user_and_the_next_forward_exact(kind, where, tmp_path):
    model, x = pairs(kind), torch.randn(3, 64)
    random.seed(0)
    kept = []

    def interrupt(*_):
        raise KeyboardInterrupt

    with torch.no_grad():
        expected = model(x)
        engine = Engine(
            model,
            list(groups_of(model, torch.device("cpu"), tmp_path if where == "disk" else None)),
            torch.device("cpu"),
        )
        model(x)
        before, hits, longest_s = signal.signal(signal.SIGALRM, interrupt), 0, 1e-3
        try:
            while hits < 75:
                try:
                    signal.setitimer(signal.ITIMER_REAL, random.uniform(2e-6, longest_s))
                    for _ in range(6):
                        model(x)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    longest_s /= 1.1  # until most of them come in time
                except KeyboardInterrupt as error:
                    kept.append(error)  # with its traceback, as notebooks do
                    hits += 1
                    longest_s *= 1.05
                assert not any(slot.users for slot in engine.pool.slots)
                assert equal(model(x), expected)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    engine.remove()
    assert equal(model(x), expected)


@pytest.mark.parametrize("end", [True, False], ids=["first out first", "last out first"])
def test_tensors_go_to_rest_when_the_last_of_two_calls_is_over(device, end):
    model = resident("nf4", device)
    engine = stream(model, device, slots=2)
    layer = model.transformer["h"][0].attn.c_attn
    one, other = engine.materialize(layer), engine.materialize(layer)
    with torch.no_grad():
        one.__enter__()
        other.__enter__()
        memory = engine.pool.slots[0].memory.untyped_storage().data_ptr()
        (one if end else other).__exit__(None, None, None)
        assert layer.weight.untyped_storage().data_ptr() == memory
        (other if end else one).__exit__(None, None, None)
    assert_at_rest(engine)


class Recursive(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, depth):
        if depth:
            x = self(x, depth - 1)
        return self.inner(x) @ self.inner.weight  # after the call within has put its tensors back


def test_module_that_runs_within_itself_finds_its_weights_after_that(device):
    expected = Recursive(nn.Linear(64, 64)).to(device).requires_grad_(False)
    model = Recursive(nn.Linear(64, 64)).to(device).requires_grad_(False)
    model.load_state_dict(expected.state_dict())
    group = group_of("whole", [Leaf("", model, ("inner.weight", "inner.bias"))], device)
    poison(group)
    engine = Engine(model, [group], device)
    x = torch.randn(3, 64, device=device)
    assert equal(model(x, 2), expected(x, 2))
    assert_at_rest(engine)


def test_state_dict_is_not_loaded_into_weights_that_are_on_the_device(device):
    model, other = resident("fp32", device), resident("fp32", device)
    with torch.no_grad():
        other.transformer["h"][0].attn.c_attn.weight.mul_(2)
    engine = stream(model, device, poisoned=False)
    with engine.materialize(model.transformer["h"][0]), pytest.raises(OffloadError, match="in use on the device"):
        model.load_state_dict(other.state_dict())
    model.load_state_dict(other.state_dict())
    assert equal(model(tokens(device)), other(tokens(device)))


def test_state_dict_that_is_loaded_while_a_group_is_used_counts_for_the_next_call(device):
    model = pairs(nn.Linear, device=device).requires_grad_(False)
    engine = Engine(model, list(groups_of(model, device)), device, slots=4)
    x, twice = torch.randn(3, 64, device=device), pairs(nn.Linear, device=device).requires_grad_(False)
    for parameter in twice.parameters():
        parameter.data.mul_(2)
    model(x)
    with engine.materialize(model[0][1]):  # of the first group, whose other leaf is loaded
        model[0][0].load_state_dict(twice[0][0].state_dict())
    assert equal(model[0][0](x), twice[0][0](x))


@pytest.mark.parametrize("ends", ["first", "second"])
def test_calls_of_one_layer_at_once_find_its_weights_in_one_place_until_both_are_over(device, ends):
    """Also where others of its group have been loaded anew, so that new calls of them look elsewhere."""
    model = pairs(Own, device=device).requires_grad_(False)
    engine = Engine(model, list(groups_of(model, device)), device, slots=2)
    x = torch.randn(3, 64, device=device)
    expected = model[0][1](x)
    calls = {name: engine.materialize(model[0][1]) for name in ("first", "second")}
    calls["first"].__enter__()
    model[0][0].load_state_dict(model[0][0].state_dict())
    calls["second"].__enter__()
    (slot,) = (slot for slot in engine.pool.slots if slot.users)
    calls.pop(ends).__exit__(None, None, None)
    model(x)  # through all slots that are free
    assert equal(nn.Linear.forward(model[0][1], x), expected)
    assert slot.users
    calls.popitem()[1].__exit__(None, None, None)
    assert_at_rest(engine)


def test_weights_that_a_call_left_away_are_at_rest_before_others_are_loaded(device):
    model, other = resident("fp32", device), resident("fp32", device)
    with torch.no_grad():
        other.transformer["h"][0].attn.c_attn.weight.mul_(2)
    engine = stream(model, device, poisoned=False)
    weights, each = engine._weights[0], engine._weights[0]._streamed[0]
    with weights.swapped_in() as slot:
        there = each.get()
    each.put(there)  # as Ctrl-C may leave it
    each.is_swapped_in = True
    model.load_state_dict(other.state_dict())
    slot.memory.fill_(0xFF)
    engine.pool.forget(engine.groups[0])
    assert equal(model(tokens(device)), other(tokens(device)))
