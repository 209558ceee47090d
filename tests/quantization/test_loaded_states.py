"""load_state_dict into quantized layers takes the scales with the packed bytes, or nothing."""

import copy
import pickle

import pytest
import torch
from comparisons import assert_same_bits
from torch import nn

from bigload import BnbQuantizationConfig, dequantize_model, load_and_quantize_model

MODES = ("nf4", "nf4-dq", "fp4")


def net(seed, mode="nf4", device="cpu", **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval()
    asked = BnbQuantizationConfig.from_mode(mode, torch_dtype="fp32", skip_modules=[], **options)
    return load_and_quantize_model(model, asked, device_map=device)


def outputs(model, device="cpu"):
    with torch.no_grad():
        return model(torch.ones(3, 64, device=device))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("mode", [*MODES, "int8"])
def test_the_state_of_another_model_is_loaded(mode, strict, assign, device):
    model, other = net(0, mode, device), net(1, mode, device)
    assert not torch.equal(outputs(model, device), outputs(other, device))  # each has run before it is loaded
    state = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    found = model.load_state_dict(state, strict=strict, assign=assign)
    assert not found.missing_keys
    assert not found.unexpected_keys
    assert torch.equal(outputs(model, device), outputs(other, device))
    assert_same_bits(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_default_dtype_and_device_have_no_effect(mode, dtype, device):
    """The offset of double quantization is stored as a number, of which bitsandbytes makes a tensor."""
    model, other = net(0, mode, device), net(1, mode, device)
    state = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model.load_state_dict(state)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_bits(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {key: t for key, t in state.items() if "weight." not in key}, "lacks the scales of its packed"),
        (lambda state: {key: t for key, t in state.items() if not key.endswith("weight")}, "lacks its packed bytes"),
        (lambda state: net(1, "fp4").state_dict(), "holds .*'fp4'.* where .*'nf4'"),
        (lambda state: nn.Sequential(nn.Linear(64, 128)).state_dict(), "lacks the scales of its packed bytes"),
    ],
)
def test_a_state_that_cannot_be_loaded_is_refused(change, message, strict):
    """Its biases may be loaded: torch loads what it can, and then raises."""
    model = net(0)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items() if "bias" not in key}
    state = change(net(0).state_dict())
    with pytest.raises(RuntimeError, match=rf"'0\.weight' is in 4 bit, and the state_dict {message}"):
        model.load_state_dict(state, strict=strict)
    assert_same_bits({key: tensor for key, tensor in model.state_dict().items() if "bias" not in key}, before)
    model.load_state_dict(net(1).state_dict(), strict=strict)  # all of it
    assert torch.equal(outputs(model), outputs(net(1)))


def test_a_layer_whose_weight_was_replaced_takes_a_state_once_it_is_loaded_again():
    model, other = net(0), net(1)
    model[0].weight = nn.Parameter(torch.zeros(128, 64))
    with pytest.raises(RuntimeError, match=r"its weight was replaced.*load the model again"):
        model.load_state_dict(other.state_dict())
    model = net(0)
    model.load_state_dict(other.state_dict())
    assert torch.equal(outputs(model), outputs(other))


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_loads_its_own_weight(how):
    model, other = net(0), net(1)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    copied = how(model[0])
    copied._parameters = {name: copy.deepcopy(weight) for name, weight in copied._parameters.items()}
    copied.load_state_dict(other[0].state_dict())
    assert_same_bits(copied.state_dict(), other[0].state_dict())
    assert_same_bits(model.state_dict(), before)


def test_a_dequantized_layer_loads_as_any_other():
    model = dequantize_model(net(0))
    plain = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    model.load_state_dict(plain.state_dict())
    assert_same_bits(model.state_dict(), plain.state_dict())


@pytest.mark.parametrize("has_run", [False, True], ids=["fresh", "has run"])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda state: {key: t for key, t in state.items() if "SCB" not in key},
        lambda state: {key: t for key, t in state.items() if not key.endswith("weight")},
        lambda state: state | {"0.SCB": torch.ones(7)},
        lambda state: nn.Sequential(nn.Linear(64, 128)).state_dict(),
        lambda state: net(1).state_dict(),
    ],
    ids=["rows alone", "scales alone", "other scales", "values", "4 bit"],
)
def test_int8_takes_rows_and_scales_together_or_refuses_them(change, strict, has_run):
    model = net(0, "int8")
    if has_run:
        outputs(model)
    before = {key: tensor.clone() for key, tensor in model[0].state_dict().items() if key != "bias"}
    with pytest.raises(RuntimeError, match=r"0\.weight is in int8, and the state_dict holds .* instead of rows"):
        model.load_state_dict(change(net(1, "int8").state_dict()), strict=strict)
    assert_same_bits({key: tensor for key, tensor in model[0].state_dict().items() if key != "bias"}, before)
    model.load_state_dict(net(1, "int8").state_dict(), strict=strict)  # all of it
    assert torch.equal(outputs(model), outputs(net(1, "int8")))


def test_what_a_state_lacks_of_int8_layers_is_named():
    model = net(0, "int8")
    outputs(model)
    state = {key: t for key, t in net(1, "int8").state_dict().items() if not key.startswith("0.")}
    assert model.load_state_dict(state, strict=False).missing_keys == ["0.weight", "0.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.weight"):
        model.load_state_dict(state)
