"""A copy of a quantized layer computes with its own weight, however it is made; DataParallel's replicas are refused."""

import copy
import pickle

import pytest
import torch
from comparisons import assert_same_bits, state_of
from torch import nn

from bigload import QuantizationError, load_and_quantize_model, save_quantized_model

MODES = ("nf4", "nf4-dq", "int8", "int8-training")
# (in_features, out_features): a usual layer, and two that have a forward of their own on the CPU.
SIZES = [(64, 32), (96, 33), (1, 5)]


def layer(mode, device, size=(64, 32), seed=0):
    torch.manual_seed(seed)
    return load_and_quantize_model(nn.Sequential(nn.Linear(*size), nn.Identity()), mode, device_map=device).eval()[0]


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "deepcopy of a copy": lambda one: copy.deepcopy(copy.copy(one)),
    "copy of a copy": lambda one: copy.copy(copy.copy(one)),
    "pickle": lambda one: pickle.loads(pickle.dumps(one)),
}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("mode", MODES)
def test_a_copy_computes_with_its_own_weight(mode, how, size, device):
    one, other = layer(mode, device, size), layer(mode, device, size, seed=1)
    x = torch.randn(3, size[0], device=device)
    with torch.no_grad():
        expected, others = one(x), other(x)
        made = COPIES[how](one)
        assert type(made) is type(one)
        assert torch.equal(made(x), expected)
        made._parameters = dict(other._parameters)
        if hasattr(made, "state"):
            made.state = copy.copy(other.state)
        assert torch.equal(made(x), others)
        assert torch.equal(one(x), expected)
        assert torch.equal(other(x), others)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("mode", MODES)
def test_a_copy_holds_what_the_layer_holds_but_not_the_layer(mode, how, device):
    one = layer(mode, device)
    one.note, calls = "kept", []
    made = COPIES[how](one)
    assert made.note == "kept"
    assert vars(made).keys() == vars(one).keys()
    assert_same_bits(state_of(made), state_of(one))
    made.train()
    made.register_forward_pre_hook(lambda module, args: calls.append(module))
    made(torch.randn(2, 64, device=device))
    assert calls == [made]
    assert not one.training


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_the_state_of_a_copy_is_its_own(mode, device):
    """bitsandbytes writes to an int8 layer's state as it computes."""
    one = layer(mode, device)
    x = torch.randn(3, 64, device=device)
    with torch.no_grad():
        expected = one(x)
        made = copy.copy(one)
        made._parameters = dict(layer(mode, device, seed=1)._parameters)
        made(x)
        assert torch.equal(one(x), expected)


def test_layers_of_others_are_copied_as_before(device):
    layer("nf4", device)
    from bitsandbytes.nn import Linear4bit

    plain = Linear4bit(8, 8, device="meta")
    made = copy.copy(plain)
    assert vars(made).keys() == vars(plain).keys()
    assert pickle.loads(pickle.dumps(Linear4bit(64, 8))).weight.shape == (8, 64)


@pytest.mark.parametrize("mode", MODES)
def test_replicas_are_refused(mode, device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.ModuleDict({"proj": nn.Linear(64, 64)}), nn.Identity())
    model = load_and_quantize_model(model, mode, device_map=device)
    with pytest.raises(QuantizationError, match=r"'0\.proj' is quantized.*device_map='balanced'"):
        copy.deepcopy(model)[0]["proj"]._replicate_for_data_parallel()


@pytest.mark.cuda
@pytest.mark.multi_gpu
def test_data_parallel_is_refused_and_its_remedy_works():
    def build():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)), nn.Identity())

    model = load_and_quantize_model(build(), "nf4", device_map="cuda:0").eval()
    x = torch.randn(8, 512, device="cuda:0")
    with pytest.raises(QuantizationError, match="DataParallel"):
        nn.DataParallel(model)(x)
    spread = load_and_quantize_model(build(), "nf4", device_map="balanced").eval()
    assert len({parameter.device for parameter in spread.parameters()}) == 2
    with torch.no_grad():
        assert torch.equal(spread(x).to("cuda:0"), model(x))


def test_a_model_of_copies_is_saved_and_loaded(device, tmp_path):
    torch.manual_seed(0)
    model = load_and_quantize_model(nn.Sequential(nn.Linear(64, 64), nn.Identity()), "nf4", device_map=device).eval()
    model[0] = copy.copy(model[0])
    save_quantized_model(model, tmp_path)
    again = load_and_quantize_model(nn.Sequential(nn.Linear(64, 64), nn.Identity()), None, tmp_path, device_map=device)
    x = torch.randn(2, 64, device=device)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model(x))
