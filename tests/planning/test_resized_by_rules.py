"""Tensors that a module's own loading gives another shape are loaded as load_state_dict loads them."""

import copy

import pytest
import torch
from checkpoints import empty, save
from torch import nn

from bigload import CheckpointError, load_and_quantize_model, quantize_checkpoint, save_quantized_model


class Table(nn.Module):
    """Its table is as long as the checkpoint's."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(1))
        self.scale = nn.Parameter(torch.ones(64))

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        self.fit(state_dict[f"{prefix}table"])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def fit(self, stored):
        self.table.resize_(stored.shape)

    def forward(self, x):
        return x * self.scale + self.table.sum()


class Anew(Table):
    def fit(self, stored):
        self.table = torch.empty_like(stored)


class Like(Table):
    def fit(self, stored):
        self.table = self.table.new_zeros(stored.shape)


class Registers(Table):
    def fit(self, stored):
        self.register_buffer("table", stored.clone())


class Parameter(Table):
    """Its parameter has the shape of the checkpoint's."""

    def fit(self, stored):
        self.table.resize_as_(stored)
        self.scale = nn.Parameter(torch.zeros(1))


class CopiesItself(Table):
    """Does not call nn.Module's method for its table."""

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        values = state_dict.pop(f"{prefix}table")
        self.table.resize_(values.shape).copy_(values * 2)
        state_dict[f"{prefix}table"] = self.table
        nn.Module._load_from_state_dict(self, state_dict, prefix, *rest)


class ByHook(Table):
    _load_from_state_dict = nn.Module._load_from_state_dict

    def __init__(self):
        super().__init__()
        self.register_load_state_dict_pre_hook(lambda module, state, prefix, *rest: module.fit(state[f"{prefix}table"]))


class Wide(nn.Linear):
    """A layer to quantize that takes its shape from the checkpoint."""

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        stored = state_dict[f"{prefix}weight"]
        self.weight = nn.Parameter(torch.empty_like(stored))
        self.out_features, self.in_features = stored.shape
        super()._load_from_state_dict(state_dict, prefix, *rest)


PARTS = [Table, Anew, Like, Registers, Parameter, CopiesItself, ByHook]


def build(part):
    return lambda: nn.Sequential(nn.Linear(64, 64), part(), nn.Linear(64, 8))


def stored(part, folder):
    torch.manual_seed(0)
    state = dict(build(part)().state_dict()) | {"1.table": torch.rand(3, 5)}
    if part is Parameter:
        state["1.scale"] = torch.rand(1) + 1
    expected = build(part)()
    expected.load_state_dict(copy.deepcopy(state))
    return save(state, folder), expected.eval()


@pytest.mark.parametrize("is_empty", [True, False], ids=["empty", "real"])
@pytest.mark.parametrize("part", PARTS)
def test_they_are_those_of_load_state_dict_also_when_saved(part, is_empty, device, tmp_path):
    folder, wanted = stored(part, tmp_path / "source")
    expected, shape = copy.deepcopy(wanted[1].state_dict()), wanted[1].table.shape
    reference = load_and_quantize_model(wanted, "nf4", device_map=device).eval()
    make = build(part)
    model = load_and_quantize_model(empty(make) if is_empty else make(), "nf4", folder, device_map=device).eval()
    save_quantized_model(model, tmp_path / "saved")
    quantize_checkpoint(folder, tmp_path / "converted", "nf4", model=empty(make), device="cpu")
    x = torch.randn(3, 64, device=device)
    again = [
        load_and_quantize_model(empty(make), None, tmp_path / each, device_map=device)
        for each in ("saved", "converted")
    ]
    for one in (model, *(each.eval() for each in again)):
        assert one[1].table.shape == shape
        assert all(torch.equal(value.cpu(), expected[name]) for name, value in one[1].state_dict().items())
        with torch.no_grad():
            assert torch.equal(one(x), reference(x))
    assert {name: p.requires_grad for name, p in model[1].named_parameters()} == {"scale": True}


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_a_layer_that_takes_its_shape_from_the_checkpoint_is_quantized(mode, device, tmp_path):
    torch.manual_seed(0)
    state = {"0.weight": torch.randn(64, 64), "0.bias": torch.randn(64), "1.weight": torch.randn(8, 64)}
    folder = save(state | {"1.bias": torch.zeros(8)}, tmp_path / "source")

    def make():
        return nn.Sequential(Wide(32, 64), nn.Linear(64, 8))

    reference = make()
    reference.load_state_dict(copy.deepcopy(state) | {"1.bias": torch.zeros(8)})
    reference = load_and_quantize_model(reference, mode, device_map=device, quantizable=(Wide,))
    model = load_and_quantize_model(empty(make), mode, folder, device_map=device, quantizable=(Wide,))
    assert type(model[0]).__name__ in ("Linear4bit", "Linear8bitLt")
    x = torch.randn(3, 64, device=device)
    with torch.no_grad():
        assert torch.equal(model(x), reference(x))


class PastTheStandIn(Table):
    """Its hook holds the module itself."""

    _load_from_state_dict = nn.Module._load_from_state_dict

    def __init__(self):
        super().__init__()
        self._register_load_state_dict_pre_hook(lambda state, prefix, *rest: self.fit(state[f"{prefix}table"]))


class ByData(Table):
    def fit(self, stored):
        self.table.data = torch.zeros(stored.shape)


@pytest.mark.parametrize("part", [PastTheStandIn, ByData])
def test_what_cannot_be_followed_leaves_the_model_alone_and_the_remedy_works(part, device, tmp_path):
    folder, wanted = stored(part, tmp_path / "source")
    model = build(part)()
    with pytest.raises(CheckpointError, match=r"cannot be followed here.*Load the model with load_state_dict"):
        load_and_quantize_model(model, "nf4", folder, device_map=device)
    assert model[1].table.shape == (1,)
    expected = wanted[1].table.clone()
    loaded = load_and_quantize_model(wanted, "nf4", device_map=device)
    save_quantized_model(loaded, tmp_path / "saved")
    again = load_and_quantize_model(empty(build(part)), None, tmp_path / "saved", device_map=device)
    assert torch.equal(again[1].table.cpu(), expected)


def test_other_shapes_are_refused_as_ever(tmp_path):
    state = dict(build(Table)().state_dict()) | {"1.scale": torch.ones(3)}
    with pytest.raises(CheckpointError, match=r"'1\.scale' has shape \(3,\).*expects \(64,\)"):
        load_and_quantize_model(empty(build(Table)), "nf4", save(state, tmp_path), device_map="cpu")
