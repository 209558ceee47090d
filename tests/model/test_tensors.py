"""A model's tensors: their names, ties and kinds, and what is refused."""

import bitsandbytes as bnb
import pytest
import torch
from models import Net
from torch import nn

from bigload import load_and_quantize_model
from bigload.errors import ConfigError
from bigload.model.tensors import tensors_of


def names_of(model, tied_parameters=()):
    return [tensor.names for tensor in tensors_of(model, tied_parameters)]


def test_parameters_and_buffers_come_with_names_shapes_and_kind():
    model = nn.BatchNorm1d(3)
    model.register_buffer("scratch", torch.ones(2), persistent=False)
    facts = [(t.name, t.shape, t.is_parameter, t.persistent) for t in tensors_of(model)]
    assert facts == [
        ("weight", (3,), True, True),
        ("bias", (3,), True, True),
        ("running_mean", (3,), False, True),
        ("running_var", (3,), False, True),
        ("num_batches_tracked", (), False, True),
        ("scratch", (2,), False, False),
    ]


def test_parameters_that_are_one_object_are_one_tensor():
    model = Net(a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4))
    model.c.weight = model.a.weight
    assert names_of(model) == [("a.weight", "c.weight"), ("a.bias",), ("b.weight",), ("b.bias",), ("c.bias",)]


def test_tied_parameters_join_tensors_that_are_two_objects():
    model = Net(a=nn.Linear(4, 4, bias=False), b=nn.Linear(4, 4, bias=False), c=nn.Linear(4, 4, bias=False))
    assert names_of(model, [("c.weight", "a.weight")]) == [("a.weight", "c.weight"), ("b.weight",)]
    chain = [("c.weight", "b.weight"), ["b.weight", "a.weight"]]
    assert names_of(model, chain) == [("a.weight", "b.weight", "c.weight")]


def test_names_stand_in_the_order_of_the_modules_not_of_the_alphabet():
    model = Net(z=nn.Linear(4, 4, bias=False), b=nn.Linear(4, 4, bias=False), a=nn.Linear(4, 4, bias=False))
    assert names_of(model, [("a.weight", "z.weight")]) == [("z.weight", "a.weight"), ("b.weight",)]


def test_tied_parameters_may_repeat_what_identity_says():
    model = Net(a=nn.Linear(4, 4, bias=False), b=nn.Linear(4, 4, bias=False))
    model.b.weight = model.a.weight
    pairs = [("b.weight", "a.weight"), ("a.weight", "b.weight"), ("a.weight", "a.weight")]
    assert names_of(model, pairs) == [("a.weight", "b.weight")]


def test_ties_that_the_class_declares_join_tensors_that_are_two_objects():
    model = Net(embed=nn.Embedding(4, 3), head=nn.Linear(3, 4, bias=False))
    model.all_tied_weights_keys = {"head.weight": "embed.weight", "absent.weight": "embed.weight"}
    assert names_of(model) == [("embed.weight", "head.weight")]


def test_tie_to_an_unknown_parameter_is_refused_and_names_it():
    model = Net(a=nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=r"'b\.weight'"):
        tensors_of(model, [("a.weight", "b.weight")])


def test_tie_of_a_buffer_is_refused_and_names_it():
    model = Net(a=nn.BatchNorm1d(4))
    with pytest.raises(ConfigError, match=r"'a\.running_mean'"):
        tensors_of(model, [("a.weight", "a.running_mean")])


def test_tie_of_different_shapes_is_refused_with_both():
    model = Net(a=nn.Linear(4, 3), b=nn.Linear(3, 4))
    with pytest.raises(ConfigError, match=r"'a\.weight' \(3, 4\).*'b\.weight' \(4, 3\)"):
        tensors_of(model, [("a.weight", "b.weight")])


@pytest.mark.parametrize("pair", ["ab", ("a.weight",), ("a.weight", "a.weight", "a.weight")], ids=str)
def test_tie_that_is_no_pair_is_refused(pair):
    with pytest.raises(ConfigError, match="pairs of parameter names"):
        tensors_of(Net(a=nn.Linear(4, 4)), [pair])


def test_shared_module_gives_each_of_its_tensors_both_names():
    shared = nn.BatchNorm1d(2)
    names = names_of(Net(a=shared, b=shared))
    assert names[:2] == [("a.weight", "b.weight"), ("a.bias", "b.bias")]
    assert ("a.running_mean", "b.running_mean") in names


def test_shared_buffer_is_one_tensor_and_persistent_when_any_of_its_names_is():
    model = Net(a=nn.Module(), b=nn.Module(), c=nn.Module())
    mask, scratch = torch.ones(2), torch.ones(3)
    model.a.register_buffer("mask", mask, persistent=False)
    model.b.register_buffer("mask", mask)
    model.b.register_buffer("scratch", scratch, persistent=False)
    model.c.register_buffer("scratch", scratch, persistent=False)
    assert [(t.names, t.persistent) for t in tensors_of(model)] == [
        (("a.mask", "b.mask"), True),
        (("b.scratch", "c.scratch"), False),
    ]


@pytest.mark.parametrize(
    "layer",
    [bnb.nn.Linear4bit(64, 64), bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)],
    ids=["Params4bit", "Int8Params"],
)
def test_model_that_is_quantized_already_is_refused_and_names_the_layer(layer):
    with pytest.raises(ConfigError, match=rf"'fc\.weight' is quantized.*{type(layer.weight).__name__}"):
        tensors_of(Net(fc=layer))


@pytest.mark.parametrize("mode", ["int8", "int8-training", "nf4"])
def test_loaded_model_is_refused_a_second_time_and_still_computes(mode):
    model = load_and_quantize_model(Net(fc=nn.Linear(64, 64), norm=nn.LayerNorm(64)), mode, device_map="cpu").eval()
    x = torch.randn(3, 64)
    expected = model.fc(x)
    with pytest.raises(ConfigError, match=r"'fc\.weight' is quantized"):
        load_and_quantize_model(model, mode, device_map="cpu")
    assert torch.equal(model.fc(x), expected)


@pytest.mark.parametrize(
    "lazy",
    [nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.LazyBatchNorm1d(affine=False)],
    ids=["linear", "norm", "buffers"],
)
def test_lazy_model_is_refused_with_the_remedy(lazy):
    with pytest.raises(ConfigError, match=r"'lazy\.\w+' has no shape yet.*run"):
        tensors_of(Net(lazy=lazy))


def test_class_in_place_of_a_model_is_refused_with_the_remedy():
    with pytest.raises(ConfigError, match="the class Net: call it"):
        tensors_of(Net)


@pytest.mark.parametrize(
    "model", ["gpt2", None, {"weight": torch.ones(1)}, torch.ones(1)], ids=lambda m: type(m).__name__
)
def test_what_is_no_model_is_refused_by_its_type(model):
    with pytest.raises(ConfigError, match=f"a {type(model).__name__}"):
        tensors_of(model)
