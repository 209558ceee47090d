"""A model cut into the units that are placed whole: its blocks, and what lies beside them."""

import pytest
import torch
from models import GPT, Blocks, llama
from plans import planned
from torch import nn

from bigload import plan_device_map
from bigload.errors import PlacementError

CPU, GPU, OTHER = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)


def test_block_is_not_divided():
    with pytest.raises(PlacementError, match=r"divides the block 'transformer.h.0'.*one device must hold it whole"):
        planned(GPT, {"": 0, "transformer.h.0.mlp": 1})
    plan = planned(GPT, {"": 0, "transformer.h.0.mlp": 1}, no_split_module_classes=["Attention"])
    assert plan.execution_map["transformer.h.0.mlp.c_fc"] == OTHER
    assert plan.execution_map["transformer.h.0.attn"] == GPU


class Reading(nn.Module):
    """Reads a child's weight past the child's forward."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 64, bias=False)
        self.other = nn.Linear(64, 64, bias=False)

    def forward(self, x):
        return self.other(x @ self.inner.weight)


def test_owner_that_reads_a_childs_weight_is_not_divided_and_what_it_reads_stays(small_parts_stream):
    model = nn.Sequential(nn.Linear(64, 64), Reading(), nn.Linear(64, 64))
    with pytest.raises(PlacementError, match="one device must hold it whole"):
        plan_device_map(model, "nf4", device_map={"": 0, "1.inner": 1})
    plan = plan_device_map(model, "nf4", device_map={"": 0, "1": "cpu"})
    assert [entry.tensor.name for entry in plan.tensors if entry.home == CPU] == ["1.other.weight"]


class Calling(nn.Module):
    """Calls a child that reads the weight of its own child."""

    def __init__(self):
        super().__init__()
        self.reading = Reading()
        self.last = nn.Linear(64, 64)

    def forward(self, x):
        return self.last(self.reading(x))


def test_owner_that_calls_a_child_which_reads_a_weight_is_divided():
    plan = planned(Calling, {"reading": 0, "last": 1})
    assert plan.execution_map == {"reading": GPU, "last": OTHER}


def test_blocks_are_those_that_the_model_names_else_those_it_repeats():
    for build, names in (
        (lambda: llama(tied=False), ["model.layers.0", "model.layers.1"]),
        (Blocks, ["layers.0", "layers.1"]),
    ):
        plan = planned(build, "cpu")
        assert [placed.unit.name for placed in plan.units if placed.unit.is_block] == names


def test_list_of_lists_and_lists_of_two_kinds_have_blocks():
    class A(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    class B(A):
        pass

    for model, blocks in (
        (nn.ModuleList([nn.ModuleList([A(), A()]), nn.ModuleList([A(), A()])]), ["0.0", "0.1", "1.0", "1.1"]),
        (nn.Sequential(nn.Linear(8, 8), nn.ModuleList([A(), B(), A()])), ["1.0", "1.1", "1.2"]),
        (nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))), []),
    ):
        plan = plan_device_map(model, "nf4", device_map="cpu")
        assert [placed.unit.name for placed in plan.units if placed.unit.is_block] == blocks
        assert len(plan.units) >= 3


def test_class_that_no_module_is_of_is_warned_of_and_none_divides_all(logged):
    plan = planned(GPT, "cpu", no_split_module_classes=["Blokc"])
    assert "'Blokc'" in logged.text
    assert not any(placed.unit.is_block for placed in plan.units)
    assert not any(placed.unit.is_block for placed in planned(GPT, "cpu", no_split_module_classes=[]).units)
