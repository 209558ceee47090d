"""Layers and tensors that code finds in globals and in attributes of classes are the loaded ones there too."""

import functools
import gc
import sys
import types
import weakref
from typing import ClassVar

import pytest
import torch
from checkpoints import empty, save_checkpoint
from torch import nn

from bigload import ConfigError, dequantize_model, load_and_quantize_model

PLAIN = {"load_in_4bit": True, "skip_modules": ["*"], "torch_dtype": "fp32"}

FIRST = SECOND = SCALE = None
TABLE: dict = {}
BY_NAME = weakref.WeakValueDictionary()
elsewhere = types.ModuleType("elsewhere_of_this_test")
sys.modules[elsewhere.__name__] = elsewhere


class Net(nn.Module):
    """Registers two layers and a norm; subclasses find them by other ways."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(64, 64), nn.Linear(64, 64), nn.LayerNorm(64)
        self.hold()

    def hold(self):
        pass

    def forward(self, x):
        return self.norm(self.b(self.a(x)))


class ByGlobals(Net):
    def hold(self):
        global FIRST, SECOND
        FIRST, SECOND = self.a, (self.b, "a name")

    def forward(self, x):
        return self.norm(SECOND[0](FIRST(x)))


def both(x):
    return TABLE["layers"][1](TABLE["layers"][0](x))


def called(x):
    return both(x)


class ByTableOfHelper(Net):
    def hold(self):
        TABLE["layers"] = [self.a, self.b]

    def forward(self, x):
        return self.norm(called(x))


class ByText(Net):
    def hold(self):
        globals().update(HIDDEN=self.a, HIDDEN_TOO=self.b)

    def forward(self, x):
        return self.norm(globals()["HIDDEN_TOO"](globals()["HIDDEN"](x)))


class ByAnotherFile(Net):
    def hold(self):
        elsewhere.layer, elsewhere.calls = self.a, {"b": self.b.forward}

    def forward(self, x):
        import elsewhere_of_this_test

        return self.norm(elsewhere.calls["b"](elsewhere_of_this_test.layer(x)))


class ByAttributeOfBase(Net):
    table: ClassVar[dict] = {}
    last: ClassVar = None

    def hold(self):
        ByAttributeOfBase.table["a"] = self.a
        ByAttributeOfBase.last = self.b

    def forward(self, x):
        return self.norm(self.last(self.table["a"](x)))


class BySubclass(ByAttributeOfBase):
    pass


class Registry:
    layers: ClassVar[list] = []
    last = None

    @classmethod
    def run(cls, x):
        return cls.last(cls.layers[0](x))


class ByPlainClass(Net):
    def hold(self):
        Registry.layers[:], Registry.last = [self.a], self.b

    def forward(self, x):
        return self.norm(Registry.run(x))


class ByDefaultArgument(Net):
    def hold(self):
        def forward(self, x, first=self.a, *, second=self.b):
            return self.norm(second(first(x)))

        ByDefaultArgument.forward = forward


class ByAttributeOfFunction(Net):
    def hold(self):
        both.layers = self.a
        ByAttributeOfFunction.second = staticmethod(self.b.forward)

    def forward(self, x):
        return self.norm(self.second(both.layers(x)))


def wrapped(method):
    @functools.wraps(method)
    def call(self, x):
        return SECOND(method(self, x))

    return call


class ByDecoratorAndProperty(Net):
    def hold(self):
        global FIRST, SECOND
        FIRST, SECOND = self.a, self.b

    @property
    def first(self):
        return FIRST

    @wrapped
    def both(self, x):
        return self.first(x)

    def forward(self, x):
        return self.norm(self.both(x))


class ByWeakReference(Net):
    def hold(self):
        BY_NAME.update(a=self.a, b=self.b)

    def forward(self, x):
        return self.norm(BY_NAME["b"](BY_NAME["a"](x)))


WAYS = [
    ByGlobals,
    ByTableOfHelper,
    ByText,
    ByAnotherFile,
    ByAttributeOfBase,
    BySubclass,
    ByPlainClass,
    ByDefaultArgument,
    ByAttributeOfFunction,
    ByDecoratorAndProperty,
    ByWeakReference,
]


@pytest.mark.parametrize("mode", ["nf4", "int8"])
@pytest.mark.parametrize("is_empty", [True, False], ids=["empty", "real"])
@pytest.mark.parametrize("build", WAYS, ids=lambda build: build.__name__)
def test_layers_in_globals_are_the_quantized_ones(build, is_empty, mode, device, tmp_path):
    torch.manual_seed(0)
    source = Net().eval()
    save_checkpoint(source, tmp_path)
    x = torch.randn(3, 64, device=device)
    expected = load_and_quantize_model(empty(Net), mode, tmp_path, device_map=device).eval()
    made = empty(build) if is_empty else build()
    old = weakref.ref(made.a)
    loaded = load_and_quantize_model(made, mode, tmp_path, device_map=device).eval()
    gc.collect()
    assert old() is None  # nothing keeps the memory of the unquantized layer
    with torch.no_grad():
        assert torch.equal(loaded(x), expected(x))
        assert torch.equal(dequantize_model(loaded)(x), dequantize_model(expected)(x))
    assert type(loaded.a) is nn.Linear


class Scaled(nn.Module):
    shift: ClassVar = None

    def __init__(self):
        global SCALE
        super().__init__()
        self.fc, self.norm = nn.Linear(64, 64), nn.LayerNorm(64)
        SCALE = self.norm.weight
        Scaled.shift = (self.norm.bias,)

    def forward(self, x):
        return self.norm(self.fc(x)) * SCALE + self.shift[0]


@pytest.mark.parametrize("config", ["nf4", PLAIN], ids=["nf4", "plain"])
def test_tensors_in_globals_are_the_loaded_ones(config, device, tmp_path):
    torch.manual_seed(0)
    source = Scaled().eval()
    for parameter in source.norm.parameters():
        nn.init.normal_(parameter)
    save_checkpoint(source, tmp_path)
    x = torch.randn(3, 64)
    expected = source(x)
    loaded = load_and_quantize_model(empty(Scaled), config, tmp_path, device_map=device).eval()
    assert SCALE is loaded.norm.weight
    assert loaded.shift[0] is loaded.norm.bias
    found = loaded(x.to(device)).cpu()
    assert (found - expected).norm() < (0.3 if config == "nf4" else 1e-5) * expected.norm()


WEIGHTS: list = []


class Penalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(64, 64), nn.Linear(64, 8)
        WEIGHTS[:] = [self.fc.weight]

    def forward(self, x):
        return self.head(self.fc(x)) + WEIGHTS[0].norm()


def test_a_weight_to_quantize_in_a_global_is_refused_and_the_remedy_works(device, tmp_path):
    model = Penalized().eval()
    save_checkpoint(model, tmp_path)
    x = torch.randn(3, 64)
    expected = model(x)
    with pytest.raises(ConfigError, match=r"WEIGHTS' holds the weight of 'fc'.*name 'fc' in skip_modules"):
        load_and_quantize_model(model, "nf4", tmp_path, device_map=device)
    assert WEIGHTS[0] is model.fc.weight
    config = {"load_in_4bit": True, "skip_modules": ["fc", "head"], "torch_dtype": "fp32"}
    loaded = load_and_quantize_model(model, config, tmp_path, device_map=device)
    assert torch.allclose(loaded(x.to(device)).cpu(), expected, atol=1e-5)


weight = None


def test_a_global_that_no_code_of_the_model_reads_stays_as_it_is(device, tmp_path):
    """The classes here use the name `weight` as that of an attribute only."""
    global weight

    class Reads(Net):
        def forward(self, x):
            return super().forward(x.to(self.norm.weight.dtype))

    model = Reads().eval()
    save_checkpoint(model, tmp_path)
    weight = kept = model.a.weight
    loaded = load_and_quantize_model(model, "nf4", tmp_path, device_map=device)
    assert weight is kept
    assert type(loaded.a) is not nn.Linear


def test_a_load_that_fails_at_its_end_restores_globals(monkeypatch):
    model = ByGlobals()
    held = FIRST, SECOND

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("bigload.loading._set_to_run", fail)
    with pytest.raises(KeyboardInterrupt):
        load_and_quantize_model(model, "nf4", device_map="cpu")
    assert held == (FIRST, SECOND)
