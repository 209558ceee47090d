"""What of a model can be streamed: weights that are shared, replaced or copied."""

import copy
import io

import pytest
import torch
from comparisons import equal
from streaming import at_rest, group_of, poison, resident, stream, tensors_of, tokens
from torch import nn

from bigload.errors import OffloadError
from bigload.offload.engine import Engine
from bigload.offload.leaves import Group, Leaf


def test_copy_and_pickle_are_refused(device):
    model = resident("nf4", device)
    stream(model, device)
    with pytest.raises(OffloadError, match="cannot be copied or pickled"):
        copy.deepcopy(model)
    with pytest.raises(OffloadError, match="cannot be copied or pickled"):
        torch.save(model, io.BytesIO())


def test_what_replaces_a_weight_and_cannot_be_streamed_is_refused(device):
    expected, model = resident("nf4", device), resident("nf4", device)
    stream(model, device)
    leaf = model.transformer["h"][1].attn.c_attn
    kept = leaf.weight
    leaf.weight = type(expected.transformer["h"][1].attn.c_attn.weight)(torch.zeros(192, 64))
    with pytest.raises(OffloadError, match=r"h\.1\.attn\.c_attn' is not quantized yet"):
        model(tokens(device))
    leaf.weight = kept
    assert equal(model(tokens(device)), expected(tokens(device)))


def test_weight_of_two_groups_or_of_a_module_in_none_is_refused(device):
    model = nn.ModuleList(nn.Linear(64, 64) for _ in range(3)).to(device).requires_grad_(False)
    model[1].weight = model[0].weight
    groups = [group_of(str(i), [Leaf(str(i), model[i])], device) for i in range(3)]
    with pytest.raises(OffloadError, match="in two groups"):
        Engine(model, groups, device)
    with pytest.raises(OffloadError, match=r"'1\.weight' is offloaded as another module's"):
        Engine(model, [groups[0], groups[2]], device)
    assert all("forward" not in vars(module) for module in model)


def test_tied_weights_of_one_group_are_copied_once(device):
    expected = nn.ModuleList(nn.Linear(64, 64) for _ in range(2)).to(device).requires_grad_(False)
    expected[1].weight = expected[0].weight
    model = copy.deepcopy(expected)
    store = at_rest(tensors_of([Leaf("0", model[0])]), device)
    group = Group("both", (Leaf("0", model[0]), Leaf("1", model[1])), store)
    poison(group)
    Engine(model, [group], device)
    x = torch.randn(2, 64, device=device)
    assert equal(model[1](model[0](x)), expected[1](expected[0](x)))
    assert model[1].weight is model[0].weight
