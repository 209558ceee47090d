"""The many ways in which code reaches a child's weight: each keeps the layer plain, and no other layer."""

import functools
import gc
import types
import weakref

import pytest
import torch
from checkpoints import empty, save_checkpoint
from torch import nn

from bigload import BnbQuantizationConfig, load_and_quantize_model
from bigload.model.quantizable import plain_because_read


class Mixer(nn.Module):
    """Multiplies by the weight of `gate` without calling it."""

    def __init__(self):
        super().__init__()
        self.gate, self.rest = nn.Linear(64, 64, bias=False), nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.begin()

    def begin(self):
        pass

    def matrix(self, x):
        raise NotImplementedError

    def forward(self, x):
        return self.norm(self.rest(x @ self.matrix(x).to(x.dtype).T))


class ByProperty(Mixer):
    @property
    def first(self):
        return self.gate

    def matrix(self, x):
        return self.first.weight


class ByCachedProperty(Mixer):
    @functools.cached_property
    def turned(self):
        return self.gate.weight.float()

    def matrix(self, x):
        return self.turned


class ByNameMadeOfParts(Mixer):
    def matrix(self, x):
        kind = "ga"
        return getattr(self, f"{kind}te").weight


class ByRegistry(Mixer):
    def matrix(self, x):
        return self._modules["gate"]._parameters["weight"]


class ByFirstParameter(Mixer):
    def matrix(self, x):
        return next(self.gate.parameters())


class ByListOfChildren(Mixer):
    def begin(self):
        self.order = [self.gate]

    def matrix(self, x):
        return self.order[0].weight


class ByLocalList(Mixer):
    def matrix(self, x):
        several = {"gate": self.gate}
        return several["gate"].weight


class ByEither(Mixer):
    def matrix(self, x):
        return (self.gate or self.norm).weight


class ByLocalFunction(Mixer):
    def matrix(self, x):
        def of(layer):
            return layer.weight

        return of(self.gate)


class ByLambda(Mixer):
    def matrix(self, x):
        return next(map(lambda layer: layer.weight, [self.gate]))  # noqa: C417


class ByClassMethod(Mixer):
    @classmethod
    def of(cls, layer):
        return layer.weight

    def matrix(self, x):
        return type(self).of(self.gate)


def _weight_of(layer):
    return layer.weight


class ByPartial(Mixer):
    def matrix(self, x):
        return functools.partial(_weight_of, self.gate)()


def _kept(function):
    def call(*args):
        return function(*args)

    return call


class ByUnnamedDecorator(Mixer):
    @_kept
    def matrix(self, x):
        return self.gate.weight


class Asks(nn.Module):
    def forward(self, layer):
        return layer.weight


class ByChild(Mixer):
    def begin(self):
        self.asks = Asks()

    def matrix(self, x):
        return self.asks(self.gate)


class Keeper:
    def __init__(self, layer):
        self.layer = layer

    def kept(self):
        return self.layer.weight


class ByObject(Mixer):
    def begin(self):
        self.keeper = Keeper(self.gate)

    def matrix(self, x):
        return self.keeper.kept()


class Points(nn.Module):
    def forward(self):
        return self.above[0].gate.weight


class ByWayOfTheParent(Mixer):
    def begin(self):
        self.points = Points()
        self.points.above = [self]

    def matrix(self, x):
        return self.points()


class ByOwnFunction(Mixer):
    def __init__(self):
        super().__init__()
        self.given = lambda: self.gate.weight

    def matrix(self, x):
        return self.given()


class ByOwnPartial(Mixer):
    def __init__(self):
        super().__init__()
        self.given = functools.partial(_weight_of, self.gate)

    def matrix(self, x):
        return self.given()


def _patched(self, x):
    return self.norm(self.rest(x @ self.gate.weight.to(x.dtype).T))


class ByPatchedForward(Mixer):
    def __init__(self):
        super().__init__()
        self.forward = types.MethodType(_patched, self)


class ByHook(Mixer):
    def __init__(self):
        super().__init__()
        self.register_forward_pre_hook(lambda module, args: (args[0] @ module.gate.weight.to(args[0].dtype).T,))

    def forward(self, x):
        return self.norm(self.rest(x))


WAYS = Mixer.__subclasses__()


@pytest.mark.parametrize("mode", ["nf4", "int8"])
@pytest.mark.parametrize("way", WAYS)
def test_layer_whose_weight_is_read_stays_plain(way, mode, tmp_path, device):
    torch.manual_seed(0)
    model = way().eval()
    assert set(plain_because_read(model, BnbQuantizationConfig.from_mode(mode))) == {"gate"}
    x = torch.randn(4, 64)
    with torch.no_grad():
        expected = model(x)
    save_checkpoint(model, tmp_path)
    loaded = load_and_quantize_model(empty(way), mode, tmp_path, device_map=device).eval()
    assert type(loaded.rest) is not nn.Linear
    with torch.no_grad():
        found = loaded(x.to(device)).cpu()
    assert (found - expected).norm() < (0.3 if mode == "nf4" else 0.03) * expected.norm()


class Calls(Mixer):
    def forward(self, x):
        return self.norm(self.rest(self.gate(x)))


class InitializesUnderAnyName(Calls):
    def initialize_weights(self):
        self.gate.weight.data.normal_()

    def start(self):
        nn.init.normal_(self.gate.weight)
        torch.nn.init.constant_(self.rest.weight, 0)


class CountsAndFreezes(Calls):
    def size(self):
        return sum(p.numel() for p in self.parameters()) + sum(p.numel() for p in self.gate.parameters())

    def freeze(self):
        for parameter in self.gate.parameters():
            parameter.requires_grad = False


class CallsInHooks(Calls):
    def begin(self):
        self.calls = [self.gate, functools.partial(self.rest)]
        self.register_forward_hook(lambda module, args, out: out.to(module.gate.weight.device))


@pytest.mark.parametrize("harmless", [InitializesUnderAnyName, CountsAndFreezes, CallsInHooks])
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_what_is_no_reading_keeps_nothing_plain(harmless, mode):
    assert plain_because_read(harmless(), BnbQuantizationConfig.from_mode(mode)) == {}


def test_a_model_with_functions_of_its_own_is_not_kept_alive():
    model = ByOwnFunction()
    plain_because_read(model, BnbQuantizationConfig.from_mode("nf4"))
    known = weakref.ref(model)
    del model
    gc.collect()
    assert known() is None
