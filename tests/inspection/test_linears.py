"""Subclasses of nn.Linear: what does as it does is quantized, and nothing that only looks like it."""

import functools
import math

import bitsandbytes as bnb
import pytest
import torch
from checkpoints import empty, save_checkpoint
from comparisons import assert_same_bits
from torch import nn
from torch.nn import functional

from bigload import (
    dequantize_model,
    load_and_quantize_model,
    plan_device_map,
    quantize_checkpoint,
    save_quantized_model,
)
from bigload.inspection.linears import acts_as_linear, class_acts_as_linear
from bigload.quantization.layers import quantized_layers


class Inherits(nn.Linear):
    pass


class WrittenOut(nn.Linear):
    def forward(self, input):
        out = input @ self.weight.T
        return out if self.bias is None else out + self.bias


class Casts(nn.Linear):
    """As OpenAI's Whisper has it."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.weight.to(x.dtype), bias)


class CallsItsParent(WrittenOut):
    def forward(self, x):
        return super().forward(x)


class CallsAMethod(nn.Linear):
    def product(self, x):
        return x.matmul(self.weight.t())

    def forward(self, x):
        return self.product(x) + (0 if self.bias is None else self.bias)


class OddArguments(WrittenOut):
    """Holds what its constructor was told, for nobody."""

    def __init__(self, sizes, *, init):
        super().__init__(*sizes)
        self.init = init
        self.init_weights()

    def init_weights(self):
        nn.init.constant_(self.weight, 0.5)

    def extra_repr(self):
        return self.init


class Reshapes(nn.Linear):
    def forward(self, x):
        flat = x.reshape(-1, self.in_features)
        return functional.linear(flat, self.weight, self.bias).view(*x.shape[:-1], self.out_features)


def decorated(function):
    @functools.wraps(function)
    def wrapped(self, x):
        return function(self, x)

    return wrapped


class Decorated(nn.Linear):
    @decorated
    def forward(self, x):
        return functional.linear(x, self.weight, self.bias)


SAME = [Inherits, WrittenOut, Casts, CallsItsParent, CallsAMethod, OddArguments, Reshapes, Decorated]


class Scales(nn.Linear):
    """By 1, unless an instance says otherwise."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale = 1.0

    def forward(self, x):
        return super().forward(x) * self.scale


class ScalesByItsClass(Scales):
    scale = 1.0

    def __init__(self, *sizes):
        nn.Linear.__init__(self, *sizes)


class ScalesIfToldTo(nn.Linear):
    def forward(self, x):
        return super().forward(x) * getattr(self, "scale", 1.0)


class ScalesThroughItsDict(nn.Linear):
    def forward(self, x):
        return super().forward(x) * self.__dict__.get("scale", 1.0)


class ScalesInAFunction(nn.Linear):
    def forward(self, x):
        return scaled(self, super().forward(x))


def scaled(layer, x):
    return x * layer.scale if hasattr(layer, "scale") else x


class Doubles(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class SlightlyMore(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.0005


class LeavesTheBiasOut(nn.Linear):
    def forward(self, x):
        return functional.linear(x, self.weight)


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x + 0.01 * torch.randn_like(x))


class NoisyInTraining(nn.Linear):
    def forward(self, x):
        return super().forward(x + torch.randn_like(x) if self.training else x)


class DropsInTraining(nn.Linear):
    def forward(self, x):
        return functional.dropout(super().forward(x), 0.1, self.training)


class Clips(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-1e30, 1e30)


class HealsNans(nn.Linear):
    def forward(self, x):
        return super().forward(x).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)


class ForgetsTheSmall(nn.Linear):
    def forward(self, x):
        return super().forward(torch.where(x.abs() < 1e-3, 0, x))


class Tuple(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class Single(nn.Linear):
    """Gives float32 whatever comes in."""

    def forward(self, x):
        return functional.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class Rounds(nn.Linear):
    def forward(self, x):
        return functional.linear(x.bfloat16(), self.weight.bfloat16(), self.bias.bfloat16()).to(x.dtype)


class OnlyMatrices(nn.Linear):
    def forward(self, x):
        return torch.einsum("bi,oi->bo", x, self.weight) + self.bias


class Transposed(nn.Linear):
    """Square layers would not show it."""

    def forward(self, x):
        return functional.linear(x, self.weight.view(self.in_features, self.out_features).t(), self.bias)


class TakesMore(nn.Linear):
    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


class TakesAnything(nn.Linear):
    def forward(self, x, *args, **kwargs):
        return super().forward(x)


class TakesAnyNumber(nn.Linear):
    def forward(self, *inputs):
        return super().forward(inputs[0])


class WritesToItsInput(nn.Linear):
    def forward(self, x):
        out = super().forward(x)
        x.zero_()
        return out


class Counts(nn.Linear):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


class StopsGradients(nn.Linear):
    def forward(self, x):
        return super().forward(x.detach())


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


class ReversesGradients(nn.Linear):
    def forward(self, x):
        return Reverse.apply(super().forward(x))


class CallsOtherwise(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class IsAskedForMore(nn.Linear):
    def normalized(self):
        return functional.normalize(self.weight)


class HasAProperty(nn.Linear):
    @property
    def transposed(self):
        return self.weight.T


class MovesItsWeightItself(nn.Linear):
    def _apply(self, fn, recurse=True):
        return self


class MovesAndIsNamedSo(Casts):
    """Its forward calls another `to`, that of the weight."""

    def to(self, *args, **kwargs):
        return self


class ScalesOnGpusByItsClass(nn.Linear):
    scale = 2.0

    def forward(self, x):
        return super().forward(x * self.scale if x.is_cuda else x)


class WrapsItself(nn.Linear):
    def forward(self, x):
        return super().forward(x)

    forward.__wrapped__ = forward


class StoresItOtherwise(nn.Linear):
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}packed"] = self.weight


REGISTRY = []


class Registered(nn.Linear):
    def __init_subclass__(cls):
        REGISTRY.append(cls)


class Derived(Registered):
    pass


class AdaptedBy(nn.Linear):
    """As LoRA's layers do."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.down, self.up = nn.Linear(sizes[0], 2, bias=False), nn.Linear(2, sizes[1], bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


OTHER = [
    Scales,
    ScalesByItsClass,
    ScalesIfToldTo,
    ScalesThroughItsDict,
    ScalesInAFunction,
    Doubles,
    SlightlyMore,
    LeavesTheBiasOut,
    Noisy,
    NoisyInTraining,
    DropsInTraining,
    Clips,
    HealsNans,
    ForgetsTheSmall,
    Tuple,
    Single,
    Rounds,
    OnlyMatrices,
    Transposed,
    TakesMore,
    TakesAnything,
    TakesAnyNumber,
    WritesToItsInput,
    Counts,
    StopsGradients,
    ReversesGradients,
    CallsOtherwise,
    IsAskedForMore,
    HasAProperty,
    MovesItsWeightItself,
    MovesAndIsNamedSo,
    ScalesOnGpusByItsClass,
    WrapsItself,
    StoresItOtherwise,
    Derived,
    AdaptedBy,
    bnb.nn.Linear4bit,
    bnb.nn.Linear8bitLt,
    nn.LazyLinear,
    nn.Conv1d,
    nn.Bilinear,
]


def made(cls, inputs=64, outputs=32):
    return OddArguments((inputs, outputs), init="half") if cls is OddArguments else cls(inputs, outputs)


@pytest.mark.parametrize("cls", SAME)
def test_subclass_that_does_as_linear_does_is_one(cls):
    assert class_acts_as_linear(cls)
    assert acts_as_linear(made(cls))
    assert acts_as_linear(made(cls).to("meta"))
    assert acts_as_linear(made(cls).bfloat16().eval())


@pytest.mark.parametrize("cls", OTHER)
def test_class_that_does_anything_else_is_none(cls):
    assert not class_acts_as_linear(cls)


@pytest.mark.parametrize("cls", SAME)
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_subclass_that_does_as_linear_does_is_quantized_to_the_same_bits_and_comes_back(device, cls, mode):
    model = nn.Sequential(made(cls), nn.LayerNorm(32)).eval()
    usual = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32)).eval()
    usual.load_state_dict(model.state_dict())
    model, usual = (load_and_quantize_model(each, mode, device_map=device) for each in (model, usual))
    assert type(model[0]) is (bnb.nn.Linear4bit if mode == "nf4" else bnb.nn.Linear8bitLt)
    assert_same_bits(model.state_dict(), usual.state_dict())
    x = torch.randn(3, 64, device=device)
    with torch.no_grad():
        assert torch.equal(model(x), usual(x))
    plain = dequantize_model(model)
    assert type(plain[0]) is cls
    assert_same_bits(plain.state_dict(), dequantize_model(usual).state_dict())
    with torch.no_grad():
        assert plain(x).isfinite().all()


class Model(nn.Module):
    """Two layers of a class, one of nn.Linear between them, and a head."""

    def __init__(self, cls, width=64):
        super().__init__()
        self.body = nn.Sequential(made(cls, width, 2 * width), nn.Linear(2 * width, width), made(cls, width, width))
        self.head = nn.Linear(width, 8)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize("cls", [WrittenOut, OddArguments])
@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
def test_saved_model_and_converted_checkpoint_come_back_with_the_bits_of_a_load(tmp_path, device, cls, mode):
    build = functools.partial(Model, cls)
    save_checkpoint(build(), tmp_path / "source")
    model = load_and_quantize_model(empty(build), mode, tmp_path / "source", device_map=device)
    assert quantized_layers(model).keys() == {"body.0", "body.1", "body.2"}
    save_quantized_model(model, tmp_path / "saved")
    quantize_checkpoint(tmp_path / "source", tmp_path / "converted", mode, model=empty(build), device=device)
    for folder in ("saved", "converted"):
        again = load_and_quantize_model(empty(build), None, tmp_path / folder, device_map=device, strict=True)
        assert_same_bits(again.state_dict(), model.state_dict())
        assert type(dequantize_model(again).body[2]) is cls


def test_plan_counts_subclasses_as_the_linears_they_are(device):
    plans = [plan_device_map(Model(cls), "nf4", device_map=device) for cls in (nn.Linear, WrittenOut)]
    assert plans[0].device_bytes == plans[1].device_bytes
    assert plans[0].layers.keys() == plans[1].layers.keys()


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_offloaded_subclasses_compute_what_resident_ones_do(tmp_path, device, mode):
    build = functools.partial(Model, WrittenOut, 1024)  # what is smaller than 1 MiB is not offloaded
    save_checkpoint(build(), tmp_path)
    resident = load_and_quantize_model(empty(build), mode, tmp_path, device_map=device)
    offloaded = load_and_quantize_model(
        empty(build), mode, tmp_path, device_map={"": device, "body": "disk"}, offload_folder=tmp_path / "offload"
    )
    x = torch.randn(3, 1024, device=device)
    with torch.no_grad():
        assert torch.equal(offloaded(x), resident(x))
    assert offloaded.offload.stats().fetches


def test_dequantized_layer_of_a_class_with_odd_arguments_holds_what_it_was_told(device):
    model = load_and_quantize_model(nn.Sequential(made(OddArguments), nn.LayerNorm(32)), "nf4", device_map=device)
    assert repr(dequantize_model(model)[0]) == "OddArguments(half)"


@pytest.mark.parametrize("cls", [Scales, ScalesIfToldTo, Noisy, Tuple, AdaptedBy, IsAskedForMore])
def test_class_that_does_anything_else_is_left_alone(device, cls):
    model = load_and_quantize_model(nn.ModuleDict({"a": cls(64, 32), "b": nn.LayerNorm(32)}), "nf4", device_map=device)
    assert type(model["a"]) is cls
    assert model["a"].weight.is_floating_point()


@pytest.mark.parametrize("name", ["scale", "product"])
def test_instance_that_holds_what_its_forward_would_use_is_none(name):
    layer = CallsAMethod(6, 4)
    assert acts_as_linear(layer)
    setattr(layer, name, lambda x: x)
    assert acts_as_linear(layer) == (name == "scale")


def read_elsewhere_only(self, x):
    return functional.linear(x * self.scale if x.is_cuda else x, self.weight, self.bias)


def test_instance_that_holds_what_its_forward_reads_on_a_gpu_is_none():
    cls = type("OnGpus", (nn.Linear,), {"forward": read_elsewhere_only})
    layer = cls(6, 4)
    layer.scale = 2.0
    assert not acts_as_linear(layer)


def test_instance_whose_sizes_are_not_its_weights_is_none():
    layer = WrittenOut(6, 4)
    layer.out_features = 8
    assert not acts_as_linear(layer)


@pytest.mark.parametrize("cls", [nn.Linear, WrittenOut])
@pytest.mark.parametrize(
    "add",
    [
        lambda layer: layer.register_buffer("mask", torch.ones(1)),
        lambda layer: layer.add_module("adapter", nn.Identity()),
        lambda layer: layer.register_parameter("scale", nn.Parameter(torch.ones(1))),
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
    ],
    ids=["buffer", "module", "parameter", "parametrized"],
)
def test_layer_that_has_more_than_a_weight_and_a_bias_keeps_it(device, cls, add):
    layer = cls(64, 32)
    add(layer)
    names = layer.state_dict().keys()
    model = load_and_quantize_model(nn.Sequential(layer, nn.LayerNorm(32)), "nf4", device_map=device)
    assert model[0] is layer
    assert model[0].state_dict().keys() == names


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_subclass_with_a_hook_is_left_alone_until_it_is_removed(register):
    layer = WrittenOut(6, 4)
    handle = getattr(layer, register)(lambda *_: None)
    assert not acts_as_linear(layer)
    handle.remove()
    assert acts_as_linear(layer)


def test_class_whose_forward_is_exchanged_is_looked_at_again():
    cls = type("Exchanged", (nn.Linear,), {})
    assert class_acts_as_linear(cls)
    cls.forward = Doubles.forward
    assert not class_acts_as_linear(cls)


def test_class_that_lists_its_subclasses_gets_none_of_ours():
    before = list(REGISTRY)
    assert not class_acts_as_linear(Registered)
    assert before == REGISTRY


class Draws(nn.Linear):
    def forward(self, x):
        torch.rand(1)
        return super().forward(x)


@pytest.mark.parametrize("cls", [Noisy, Draws])
def test_looking_at_a_class_leaves_the_random_numbers_as_they_were(cls):
    class Fresh(cls):
        pass

    before = torch.get_rng_state()
    class_acts_as_linear(Fresh)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "setting",
    [
        lambda: torch.device("meta"),
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    ],
    ids=["meta", "no_grad", "inference_mode", "autocast"],
)
def test_looking_at_a_class_is_the_same_under_whatever_the_caller_has_set(setting):
    class Fresh(WrittenOut):
        pass

    with setting():
        assert class_acts_as_linear(Fresh)


def test_neither_the_constructor_nor_the_layer_itself_is_run():
    calls = []

    class Fresh(nn.Linear):
        def __init__(self, *args):
            calls.append("__init__")
            super().__init__(*args)

        def forward(self, x):
            calls.append(self.weight.shape)
            return functional.linear(x, self.weight, self.bias)

    layer = Fresh(64, 32)
    calls.clear()
    assert acts_as_linear(layer)
    assert calls
    assert "__init__" not in calls
    assert layer.weight.shape not in calls
