"""Pipelines: each process loads its stage alone, and the last one has the model's own output."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from worlds import DEVICES, run_world

from bigload import ConfigError, PlacementError, QuantizationError, init_empty_weights, load_pipeline_stage
from bigload.distributed.stages import divided

CELLS = [("llama", "nf4-dq"), ("gemma", "none"), ("gpt", "int8"), ("mixture", "nf4")]


@pytest.mark.parametrize("device", DEVICES)
def test_stages_compute_what_one_process_does(programs, tmp_path, device):
    first, last = run_world(programs, "world_stages.pipelines", 2, tmp_path, device, cells=CELLS)
    for cell, seen in first.items():
        other = last[cell]
        assert seen["equal"] == other["equal"] == [True, True], cell
        assert len(seen["blocks"]) + len(other["blocks"]) == 4
        assert seen["on meta"] == other["on meta"] == 0
        tied = cell.startswith(("gpt", "gemma"))  # embedding and head, which both stages have
        assert seen["read"] + other["read"] >= seen["read by one"]
        assert max(seen["held"], other["held"]) < seen["whole"] * (0.9 if tied else 0.7), cell


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.data(), st.integers(0, 60), st.integers(0, 60))
def test_division_is_in_order_and_no_other_has_a_smaller_largest_stage(sizes, data, before, after):
    parts = data.draw(st.integers(1, len(sizes)))
    made = divided(sizes, parts, before, after)
    assert sorted(made) == made
    assert set(made) == set(range(parts))
    assert _largest(made, sizes, parts, before, after) == min(
        _largest(each, sizes, parts, before, after) for each in _divisions(len(sizes), parts)
    )


def _largest(stages, sizes, parts, before, after):
    held = [before if stage == 0 else 0 for stage in range(parts)]
    held[-1] += after
    for stage, size in zip(stages, sizes, strict=True):
        held[stage] += size
    return max(held)


def _divisions(count, parts, first=0):
    if parts == 1:
        yield [first] * count
        return
    for length in range(1, count - parts + 2):
        for rest in _divisions(count - length, parts - 1, first + 1):
            yield [first] * length + rest


class Block(nn.Module):
    def __init__(self, is_tuple):
        super().__init__()
        self.linear, self.is_tuple = nn.Linear(64, 64), is_tuple

    def forward(self, x):
        out = self.linear(x)
        return (out,) if self.is_tuple else out


class Net(nn.Module):
    def __init__(self, *, outside=False, between=False, is_tuple=False):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.blocks = nn.ModuleList(Block(is_tuple) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(64)) if outside else 1
        if between:
            self.blocks.insert(1, nn.LayerNorm(64))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x * self.scale


def empty(**given):
    with init_empty_weights():
        return Net(**given)


def checkpoint(folder, **given):
    from checkpoints import save

    return save(Net(**given).state_dict(), folder)


def test_what_has_too_few_blocks_is_loaded_when_they_are_named(alone, tmp_path):
    path = checkpoint(tmp_path / "net")
    with pytest.raises(PlacementError, match="0 blocks, too few for 1 stage: use a mesh of fewer processes, or name"):
        load_pipeline_stage(empty(), "nf4", path, alone, no_split_module_classes=["Unknown"], progress=False)
    stage = load_pipeline_stage(empty(), "nf4", path, alone, no_split_module_classes=["Block"], progress=False)
    assert stage.blocks == ("blocks.0", "blocks.1")
    assert stage(x=torch.ones(1, 64)).shape == (1, 64)


@pytest.mark.parametrize(
    ("given", "said"), [({"outside": True}, "parameters outside modules"), ({"between": True}, "between the blocks")]
)
def test_what_no_stages_are_made_of_is_loaded_by_one_process(alone, tmp_path, given, said):
    from bigload import load_and_quantize_model

    path = checkpoint(tmp_path / "net", **given)
    with pytest.raises(PlacementError, match=f"{said}.*use device_map='balanced' in one process"):
        load_pipeline_stage(empty(**given), "nf4", path, alone, no_split_module_classes=["Block"], progress=False)
    load_and_quantize_model(empty(**given), "nf4", path, device_map="balanced", progress=False)


def test_a_pipeline_has_a_mesh_of_one_dimension(alone, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("hosts", "gpus"))
    path = checkpoint(tmp_path / "net")
    with pytest.raises(ConfigError, match="pass one of its dimensions"):
        load_pipeline_stage(empty(), "nf4", path, mesh, progress=False)
    load_pipeline_stage(empty(), "nf4", path, mesh["gpus"], ["Block"], progress=False)


def test_blocks_that_return_tuples_are_left_to_one_process(alone, tmp_path, monkeypatch):
    path = checkpoint(tmp_path / "net")
    stage = load_pipeline_stage(empty(is_tuple=True), "nf4", path, alone, ["Block"], progress=False)
    stage.count = 2
    with pytest.raises(QuantizationError, match="returns a tuple, but stages send a tensor"):
        stage._leave(stage.model.blocks[-1], (), (torch.ones(1),))
