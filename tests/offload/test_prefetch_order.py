"""Which group is wanted after which is learned, forward and backward, and in each thread."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from streaming import (
    group_of,
    groups_of,
    pairs,
    resident,
    stream,
)
from torch import nn

from bigload.offload.engine import Engine
from bigload.offload.leaves import Leaf
from bigload.offload.on_device.prefetch_order import Step


def test_layer_that_runs_last_is_learned(device):
    """It need not be the one that was registered last."""
    model = pairs(nn.Linear, 5, device).requires_grad_(False)
    engine = Engine(model, list(groups_of(model, device)), device)
    x, held, demanded = torch.randn(3, 64, device=device), [], []
    model[1][0].register_forward_hook(lambda *_: held.append({slot.store for slot in engine.pool.slots}))
    for _ in range(4):
        for pair in model:
            pair[0](pair[1](x))
        demanded.append(engine.stats().demand_fetches)
    assert demanded[1] == demanded[-1]
    assert held[-1] == {engine.groups[2].store, engine.groups[3].store}  # the one that comes, and the one after


@pytest.mark.parametrize("apart", [False, True], ids=["one thread", "two threads"])
def test_order_in_backward_is_learned_apart_from_that_of_forward(device, apart):
    """Also where backward has a thread of its own, as on a GPU."""
    model = pairs(nn.Linear, 5, device).requires_grad_(False)
    engine = Engine(model, list(groups_of(model, device)), device)
    x = torch.randn(3, 64, device=device, requires_grad=True)
    demanded = []
    for _ in range(4):
        backward = model(x).square().sum().backward
        if apart:
            thread = threading.Thread(target=backward)
            thread.start()
            thread.join()
        else:
            backward()
        demanded.append(engine.stats().demand_fetches)
    assert demanded[-1] == demanded[-2]


def followers(engine):
    """Return the group that is likely to follow each in forward."""
    return [next(engine.pool.order.after(Step(is_backward=False, group=group))) for group in engine.groups]


def test_each_thread_has_a_place_of_its_own(device):
    model = pairs(nn.Linear, 6, device).requires_grad_(False)
    engine = Engine(model, list(groups_of(model, device)), device, slots=6)
    x = torch.randn(3, 64, device=device)
    for _ in range(2):
        model(x)
    ahead = followers(engine)
    barrier = threading.Barrier(2, timeout=60)

    def run(order):
        for index in order:
            barrier.wait()
            model[index](x)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, ((0, 1, 2), (3, 4, 5))))
    assert followers(engine) == ahead


def test_group_that_seems_over_and_is_not_is_waited_for_twice_and_no_more(device):
    layers = [[nn.Linear(64, 64, device=device) for _ in range(2)] for _ in range(4)]
    model = nn.ModuleList(nn.ModuleList(pair) for pair in layers)
    groups = [
        group_of(str(n), [Leaf(f"{n}.{k}", layer) for k, layer in enumerate(pair)], device)
        for n, pair in enumerate(layers)
    ]
    engine = Engine(model, groups, device)
    x, demanded = torch.randn(4, 64, device=device), []
    with torch.no_grad():
        for _ in range(4):
            for pair in (layers[0], layers[1], layers[1], layers[2], layers[3]):
                for layer in pair:
                    layer(x)
            demanded.append(engine.stats().demand_fetches)
    assert demanded == [2, 3, 3, 3]


def test_another_order_is_learned_in_one_pass(device):
    model = resident("fp32", device, layers=5)
    engine = stream(model, device)
    x = torch.randn(2, 8, 64, device=device)
    demanded = []
    for _ in range(4):
        for index in (4, 2, 0, 3, 1):
            model.transformer["h"][index](x)
        demanded.append(engine.stats().demand_fetches)
    assert demanded[1] > 1
    assert demanded[1:] == [demanded[1]] * 3
