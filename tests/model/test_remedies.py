"""What the errors of this wing ask for is done, and the load goes on. tests/test_remedies.py lists them."""

import pytest
import torch
from checkpoints import empty, save, save_checkpoint
from models import Net, Pair
from references import quantized_state
from torch import nn

from bigload import ConfigError, load_and_quantize_model, save_quantized_model
from bigload.errors import CheckpointError


class Scaled(nn.Linear):
    """Does what nn.Linear does, but has a method that other code may use: quantized only if it is named."""

    def merged(self):
        return self.weight


def net(kind=nn.Linear, tied=False):
    made = Net(a=kind(64, 64), b=kind(64, 64), norm=nn.LayerNorm(64))
    if tied:
        made.b.weight = made.a.weight
    return made


def stored(folder):
    """Write a checkpoint with two layers quantized, and the original beside it."""
    torch.manual_seed(0)
    full = net().half()
    save_checkpoint(full, folder / "original")
    return save(quantized_state(full, "nf4", "cpu", skip=()), folder / "quantized")


def test_tied_layers_that_are_stored_quantized_load_without_the_tie_or_from_the_original(tmp_path):
    folder = stored(tmp_path)
    words = "build the model without the tie, or use the original checkpoint"
    with pytest.raises(CheckpointError, match=words):
        load_and_quantize_model(empty(net, tied=True), None, folder)
    assert load_and_quantize_model(empty(net), None, folder)
    assert load_and_quantize_model(empty(net), "nf4", tmp_path / "original")


@pytest.mark.parametrize("saved_by", ["another", "bigload"])
def test_layers_of_a_class_that_is_not_known_load_where_it_is_named_or_not_used(tmp_path, saved_by):
    folder = stored(tmp_path)
    words = "no weight of an nn.Linear: build the model from this checkpoint's config, or name its class in quantizable"
    if saved_by == "bigload":
        model = load_and_quantize_model(empty(net), "int8-training", tmp_path / "original", device_map="cpu")
        save_quantized_model(model, tmp_path / "saved")
        folder, words = tmp_path / "saved", "build the model that was saved, or name its class in quantizable"

    class Other(nn.Module):
        """Holds a matrix of that name, and is no Linear."""

        def __init__(self, *sizes):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.zeros(*sizes)), nn.Parameter(torch.zeros(sizes[0]))

    with pytest.raises(CheckpointError, match=words):
        load_and_quantize_model(empty(net, Other), None, folder, device_map="cpu")
    assert load_and_quantize_model(empty(net), None, folder, device_map="cpu")
    if saved_by == "another":
        with pytest.raises(CheckpointError, match=words):
            load_and_quantize_model(empty(net, Scaled), None, folder, device_map="cpu")
    model = load_and_quantize_model(empty(net, Scaled), None, folder, device_map="cpu", quantizable=(Scaled,))
    assert type(model.a).__module__.startswith("bitsandbytes")


def test_quantized_layers_that_a_config_skips_load_without_it_or_from_the_original(tmp_path):
    folder = stored(tmp_path)
    config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False}
    with pytest.raises(ConfigError, match="remove them from it, or use the original checkpoint"):
        load_and_quantize_model(empty(net), config | {"skip_modules": ["a"]}, folder)
    assert load_and_quantize_model(empty(net), config, folder)
    assert load_and_quantize_model(empty(net), config | {"skip_modules": ["a"]}, tmp_path / "original")


def test_model_that_is_built_anew_or_called_or_run_once_is_loaded(tmp_path):
    model = load_and_quantize_model(Pair(), "nf4", device_map="cpu")
    with pytest.raises(ConfigError, match="build the model anew to load or quantize it again"):
        load_and_quantize_model(model, "int8", device_map="cpu")
    with pytest.raises(ConfigError, match="the class Pair: call it"):
        load_and_quantize_model(Pair, "int8", device_map="cpu")
    assert load_and_quantize_model(Pair(), "int8", device_map="cpu")
    lazy = nn.Sequential(nn.LazyLinear(64), nn.ReLU())
    with pytest.raises(ConfigError, match="run the lazy modules once before the model is loaded"):
        load_and_quantize_model(lazy, "nf4", device_map="cpu")
    lazy(torch.ones(2, 64))
    assert type(load_and_quantize_model(lazy, "nf4", device_map="cpu")[0]).__name__ == "Linear4bit"


def test_new_part_whose_class_does_not_initialise_it_is_loaded_with_values_of_its_own(tmp_path):
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = nn.Parameter(torch.ones(4, 64))

    folder = save_checkpoint(net(), tmp_path)
    model = empty(lambda: Net(**dict(net().named_children()), table=Table()))
    with pytest.raises(CheckpointError, match="that initialises it: give it values before the load"):
        load_and_quantize_model(model, "nf4", folder, initialize_missing=["table"])
    model.table.rows = nn.Parameter(torch.full((4, 64), 2.0))
    assert torch.equal(load_and_quantize_model(model, "nf4", folder, device_map="cpu").table.rows, model.table.rows)
