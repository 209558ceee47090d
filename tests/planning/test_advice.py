"""What is said when a model does not fit, and that it helps."""

import re

import pytest
import torch
from checkpoints import empty
from models import GPT
from plans import planned
from torch import nn

from bigload import OffloadConfig, plan_device_map
from bigload.errors import PlacementError


def test_what_does_not_fit_is_explained():
    with pytest.raises(PlacementError) as caught:
        planned(lambda: GPT(width=256, vocab=64), max_memory={0: "145MiB", "cpu": "1KiB"}, mode="int8")
    text = str(caught.value)
    assert "cuda:0" in text
    assert "too little" in text
    assert "nf4-dq" in text
    assert "a budget" in text


def test_block_larger_than_every_budget_is_named():
    with pytest.raises(PlacementError, match=r"must be on cuda:0 needs .* 'transformer\.h\.0' alone is too large"):
        planned(lambda: GPT(width=1024, vocab=2), max_memory={0: "145MiB", "cpu": 0}, mode="int8")


@pytest.mark.parametrize("options", [{}, {"offload_folder": "cache"}], ids=["cpu", "disk"])
def test_budget_that_is_said_to_help_does(small_parts_stream, options):
    """In one try, whatever else would be lacking."""

    def build():
        return GPT(layers=4, width=128)

    budgets = {"cpu": 2**15}
    with pytest.raises(PlacementError, match="a budget") as caught:
        plan_device_map(empty(build), "nf4", device_map="auto", max_memory=budgets, **options)
    (more,) = re.findall(r"a budget ([\d.]+) KiB larger", str(caught.value))
    budgets["cpu"] += int(float(more) * 2**10 + 2**6)  # it is rounded
    assert plan_device_map(empty(build), "nf4", device_map="auto", max_memory=budgets, **options)
    budgets["cpu"] -= 2**10
    with pytest.raises(PlacementError):
        plan_device_map(empty(build), "nf4", device_map="auto", max_memory=budgets, **options)


def test_mode_is_said_to_help_only_if_it_does():
    budget = sum(plan_device_map(empty(GPT), "int8", device_map="cpu").device_bytes.values())
    for lacking, helps in ((200, True), (budget // 2, False)):
        with pytest.raises(PlacementError) as caught:
            plan_device_map(empty(GPT), "int8", device_map="auto", max_memory={"cpu": budget - lacking})
        assert ("nf4 (" in str(caught.value)) == helps


def test_several_gpus_that_are_too_small_are_told_what_each_needs(small_parts_stream):
    options = {"device_map": "auto", "offload": OffloadConfig(reserve=0)}
    empty_pair = {0: 0, 1: 0, "cpu": "1GiB"}
    with pytest.raises(PlacementError) as caught:
        plan_device_map(empty(GPT, layers=8), "nf4", max_memory=empty_pair, **options)
    text = str(caught.value)
    assert "leaving cuda:" not in text  # neither would that: both are too small
    assert "offload_folder" not in text  # which would not help: what must be on a GPU is too much
    (needed,) = re.findall(r"on cuda:\d needs ([\d.]+) KiB", text)
    assert float(needed) < 200


def test_gpu_that_is_too_small_for_slots_is_said_to_be_left_out_where_that_helps(small_parts_stream):
    plain = {"load_in_4bit": True, "skip_modules": ["*"], "torch_dtype": "bf16"}
    options = {"device_map": "auto", "offload": OffloadConfig(reserve=0)}

    def build():
        return GPT(vocab=64, width=1024, layers=12)

    budgets = {0: "300MiB", 1: "160MiB", "cpu": "60GiB"}
    with pytest.raises(PlacementError, match="or leaving cuda:1 out"):
        plan_device_map(empty(build), plain, max_memory=budgets, **options)
    del budgets[1]
    assert plan_device_map(empty(build), plain, max_memory=budgets, **options).streamed_bytes


class WithTable(nn.Module):
    """Holds a large parameter itself, beside children."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(20_000, 512))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(512, 2048), nn.Linear(2048, 512)) for _ in range(4))


@pytest.mark.parametrize("places", [{0: "166MiB", "cpu": "1GiB"}, {0: "166MiB", "cpu": 0}, {"cpu": "22MiB"}], ids=str)
def test_a_parameter_that_no_budget_moves_away_is_named_with_the_reason_and_the_remedy_works(places):
    device = next(iter(places))
    with pytest.raises(
        PlacementError, match=r"'table' alone .*'table' cannot be offloaded: only .* without children"
    ) as e:
        plan_device_map(empty(WithTable), "nf4", device_map="auto", max_memory=places)
    assert "offload_folder" not in str(e.value)  # what must stay would not fit with one either
    (more,) = re.findall(r"a budget ([\d.]+) MiB larger", str(e.value))
    places = places | {device: int((float(places[device].removesuffix("MiB")) + float(more) + 0.01) * 2**20)}
    assert plan_device_map(empty(WithTable), "nf4", device_map="auto", max_memory=places)
