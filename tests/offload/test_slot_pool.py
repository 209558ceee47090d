"""Which groups are in the slots: fetched ahead, each once, with no more slots than were asked for."""

import gc
import weakref

import torch
from comparisons import equal
from streaming import (
    Own,
    groups_of,
    pairs,
    resident,
    stream,
    tokens,
)
from torch import nn

from bigload.offload.engine import Engine


def test_forward_goes_on_with_the_slots_there_are_where_memory_for_more_is_gone(device, monkeypatch):
    expected, model = resident("nf4", device), resident("nf4", device)
    engine = stream(model, device)
    engine.pool.free(engine.pool.slots[0])

    def failing(nbytes):
        raise torch.OutOfMemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(engine.pool.copier, "make_slot", failing)
        assert equal(model(tokens(device)), expected(tokens(device)))
    for group in engine.groups:
        engine.pool.forget(group)  # so that one is waited for
    assert equal(model(tokens(device)), expected(tokens(device)))
    assert engine.stats().slots == 2


def test_slots_are_no_more_than_groups(device):
    model = pairs(Own, 1, device).requires_grad_(False)
    engine = Engine(model, list(groups_of(model, device)), device, slots=3)
    with engine.materialize(model[0][0]):
        engine.pool.forget(engine.groups[0])
        model(torch.randn(3, 64, device=device))
    model(torch.randn(3, 64, device=device))
    assert engine.stats().slots == 1


def test_what_could_not_be_read_ahead_is_read_when_it_is_needed(device, tmp_path):
    model = pairs(nn.Linear, device=device).requires_grad_(False)
    x = torch.randn(3, 64, device=device)
    expected = model(x)
    engine = Engine(model, list(groups_of(model, device, tmp_path)), device)
    for _ in range(2):
        assert equal(model(x), expected)
    away = [tmp_path / str(n) for n in (2, 3)]
    for file in away:
        file.rename(file.with_suffix(".away"))
    out = model[1](model[0](x))  # those after it are asked for
    engine.pool.copier.finish()
    for file in away:
        file.with_suffix(".away").rename(file)
    demanded = engine.stats().demand_fetches
    assert equal(model[3](model[2](out)), expected)
    for _ in range(2):
        assert equal(model(x), expected)
    assert engine.stats().demand_fetches == demanded + 2  # each of the two once


def test_slot_that_was_used_last_is_the_last_to_be_filled_again(device):
    model = pairs(nn.Linear, 5, device).requires_grad_(False)
    engine = Engine(model, list(groups_of(model, device)), device, slots=3)
    x = torch.randn(3, 64, device=device)
    for index in (0, 1, 2, 3, 4) * 2:
        model[index](x)
    stores = {group.store: group.name for group in engine.groups}
    assert {stores[slot.store] for slot in engine.pool.slots} == {"0", "1", "2"}  # what comes next, and nothing twice
    before = engine.stats()
    for index in (0, 1, 2):
        model[index](x)
    after = engine.stats()
    assert after.demand_fetches == before.demand_fetches


def test_slots_that_were_needed_at_once_are_let_go_of(device):
    model = pairs(Own, device=device).requires_grad_(False)
    engine = Engine(model, list(groups_of(model, device)), device, slots=1)
    with engine._weights[0].swapped_in(), engine._weights[2].swapped_in(), engine._weights[4].swapped_in():
        assert engine.stats().slots == 3
        memories = [weakref.ref(slot.memory) for slot in engine.pool.slots]
    x = torch.randn(3, 64, device=device)
    model(x)
    assert engine.stats().slots == 1
    gc.collect()
    assert sum(memory() is not None for memory in memories) == 1


def test_each_group_is_copied_once_a_pass_and_only_the_first_is_waited_for(device):
    model = resident("fp32", device, layers=5)
    engine = stream(model, device)
    for _ in range(4):
        model(tokens(device))
    stats = engine.stats()
    # Four passes of five, and the two that are fetched ahead for the next.
    assert (stats.fetches, stats.demand_fetches) == (22, 1)
    assert stats.nbytes == 22 * engine.groups[0].store.layout.nbytes


def test_the_next_but_one_is_fetched_as_soon_as_a_group_is_over(device):
    """Not when the next begins: what lies between them, a head and the start of the next token, would be lost."""
    model = resident("fp32", device, layers=5)
    engine = stream(model, device)
    leaves = [layer for layer in model.modules() if "forward" in vars(layer)]
    for _ in range(2):
        model(tokens(device))
    held = []
    for leaf in leaves:
        leaf.register_forward_hook(lambda *_: held.append([slot.store for slot in engine.pool.slots]))
    model(tokens(device))
    a, b, c, d, e = (group.store for group in engine.groups)
    ahead = {a: b, b: c, c: d, d: e, e: a}
    each = len(leaves) // 5
    for index, (first, second) in enumerate(ahead.items()):
        for at in held[index * each : (index + 1) * each - 1]:
            assert set(at) == {first, second}
        assert set(held[(index + 1) * each - 1]) == {second, ahead[second]}


def test_groups_that_all_have_a_slot_are_copied_once(device):
    model = resident("nf4", device)
    engine = stream(model, device, slots=3)
    for _ in range(3):
        model(tokens(device))
    assert engine.stats().fetches == 3
