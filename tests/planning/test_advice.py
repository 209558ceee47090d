"""What is said when a model does not fit, and that it helps."""

import re
from functools import partial

import pytest
import torch
from checkpoints import empty, save_checkpoint
from models import GPT
from plans import planned
from torch import nn

from bigload import OffloadConfig, load_and_quantize_model, plan_device_map, save_quantized_model
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


@pytest.mark.parametrize("mode", ["nf4", "int8", "int8-training"])
@pytest.mark.parametrize("vocab", [16, 4000])
@pytest.mark.parametrize("gpu", [None, 2**12, 2**17, 2**18])
def test_a_folder_is_said_to_help_exactly_where_it_does(small_parts_stream, tmp_path, monkeypatch, mode, vocab, gpu):
    monkeypatch.setattr("bigload.planning.planner.WINDOW_BYTES", 0)

    def shortage(model, **folder):
        try:
            plan_device_map(model, mode, **options, **folder)
        except PlacementError as error:
            return str(error)
        return None

    told = 0
    for width, layers in ((16, 2), (64, 4), (128, 8)):
        for host in (2**12, 2**16, 2**27 + 2**12):
            budgets = ({} if gpu is None else {0: gpu}) | {"cpu": host}
            options = {"device_map": "auto", "max_memory": budgets, "offload": OffloadConfig(reserve=0)}
            model = empty(GPT, layers=layers, width=width, vocab=vocab)
            if (text := shortage(model)) is not None:
                told += 1
                assert ("an offload_folder" in text) == (shortage(model, offload_folder=tmp_path) is None), text
    assert told


def test_weights_that_are_trained_are_told_the_room_they_need(small_parts_stream):
    options = {"device_map": "auto", "offload": OffloadConfig(reserve=0)}
    with pytest.raises(PlacementError, match=r"a budget [\d.]+ [KM]iB larger") as caught:
        plan_device_map(empty(GPT, layers=4, width=256), "int8-training", max_memory={0: "145MiB"}, **options)
    number, unit = re.findall(r"a budget ([\d.]+) ([KM]iB) larger", str(caught.value))[0]
    more = int((float(number) + 0.01) * {"KiB": 2**10, "MiB": 2**20}[unit])
    budgets = {0: 145 * 2**20 + more}
    assert not plan_device_map(
        empty(GPT, layers=4, width=256), "int8-training", max_memory=budgets, **options
    ).offloaded


def test_no_other_mode_is_said_to_help_a_checkpoint_that_is_quantized(tmp_path, small_parts_stream):
    build = partial(GPT, layers=4, width=256)
    plain = save_checkpoint(build().bfloat16(), tmp_path / "plain")
    budget = {"cpu": 5 * 2**19}
    with pytest.raises(PlacementError, match="nf4"):
        plan_device_map(empty(build), "int8", plain, "auto", max_memory=budget)
    saved = load_and_quantize_model(empty(build), "int8", plain, device_map="cpu")
    save_quantized_model(saved, tmp_path / "int8")
    with pytest.raises(PlacementError) as caught:
        plan_device_map(empty(build), None, tmp_path / "int8", "auto", max_memory=budget)
    assert "nf4" not in str(caught.value)
