"""Layers that a model also holds outside its registries are the loaded ones there too, or the load is refused."""

import collections
import dataclasses
import functools
import types
import weakref
from typing import ClassVar

import pytest
import torch
from checkpoints import empty, save_checkpoint
from streaming import engines_of
from torch import nn

from bigload import ConfigError, dequantize_model, load_and_quantize_model
from bigload.pipeline import assembly


class Net(nn.Module):
    """Registers two layers, and runs them through whatever `hold` keeps of them."""

    def __init__(self, hold):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(64, 64), nn.Linear(64, 64), nn.LayerNorm(64)
        hold(self)

    def forward(self, x):
        for step in self.steps():
            x = step(x)
        return self.norm(x)


@dataclasses.dataclass(frozen=True)
class Branch:
    first: object
    others: tuple


class Slotted:
    __slots__ = ("layer",)

    def __init__(self, layer):
        self.layer = layer


Two = collections.namedtuple("Two", ["one", "two"])


def in_a_list(net):
    net.held = [net.a, nn.GELU(), net.b]
    net.steps = lambda: net.held


def in_a_nested_dict(net):
    net.held = {"x": [{"y": (net.a, "a name")}], net.b: "a key"}
    net.steps = lambda: [net.held["x"][0]["y"][0], *(k for k in net.held if isinstance(k, nn.Module))]


def in_tuples(net):
    net.held = Two((net.a,), net.b)
    net.steps = lambda: [*net.held.one, net.held.two]


def in_a_set_and_a_deque(net):
    net.held, net.queue = {net.a}, collections.deque([net.b], maxlen=2)
    net.steps = lambda: [*net.held, *net.queue]


def in_a_dataclass(net):
    net.held = Branch(net.a, (net.b,))
    net.steps = lambda: [net.held.first, *net.held.others]


def in_a_namespace_of_slots(net):
    net.held = types.SimpleNamespace(one=Slotted(net.a), two=[Slotted(net.b)])
    net.steps = lambda: [net.held.one.layer, net.held.two[0].layer]


def in_partials(net):
    net.held = functools.partial(lambda layer, x, other: other(layer(x)), net.a, other=net.b)
    net.steps = lambda: [net.held]


def as_bound_methods(net):
    net.held, net.calls = net.a.forward, [net.b.__call__]
    net.steps = lambda: [net.held, *net.calls]


def in_a_closure(net):
    layer = net.a
    net.held = lambda x, other=net.b: other(layer(x))
    net.steps = lambda: [net.held]


def as_weak_references(net):
    net.held = [weakref.ref(net.a), weakref.ref(net.b)]
    net.steps = lambda: [each() for each in net.held]


def as_weak_proxies(net):
    net.held, vars(net.norm)["parent"] = [weakref.proxy(net.a)], weakref.proxy(net)
    vars(net)["last"] = weakref.proxy(net.b)
    net.steps = lambda: [lambda x: net.held[0](x), lambda x: net.last(net.norm.parent.a(x) - net.a(x) + x)]


def in_a_module_that_is_not_registered(net):
    net.held = [nn.Sequential(net.a, net.b)]
    net.steps = lambda: net.held


def in_a_hook(net):
    net.norm.register_forward_pre_hook(functools.partial(lambda layer, _, args: (layer(args[0]),), net.b))
    net.steps = lambda: [net.a]


HOLDS = [
    in_a_list,
    in_a_nested_dict,
    in_tuples,
    in_a_set_and_a_deque,
    in_a_dataclass,
    in_a_namespace_of_slots,
    in_partials,
    as_bound_methods,
    in_a_closure,
    as_weak_references,
    as_weak_proxies,
    in_a_module_that_is_not_registered,
    in_a_hook,
]


@pytest.mark.parametrize("mode", ["nf4", "int8"])
@pytest.mark.parametrize("hold", HOLDS, ids=lambda hold: hold.__name__)
def test_held_layers_are_the_quantized_ones(hold, mode, device, tmp_path):
    torch.manual_seed(0)
    model = Net(hold).eval()
    save_checkpoint(model, tmp_path)
    x = torch.randn(3, 64, device=device)
    registered = Net(lambda net: None)
    registered.load_state_dict(model.state_dict())
    calls = {in_a_list: lambda net: [net.a, nn.GELU(), net.b]}.get(hold, lambda net: [net.a, net.b])
    expected = load_and_quantize_model(registered, mode, device_map=device).eval()
    expected.steps = lambda: calls(expected)
    for loaded in (
        load_and_quantize_model(empty(Net, hold), mode, tmp_path, device_map=device),
        load_and_quantize_model(model, mode, device_map=device),
    ):
        loaded.eval()
        with torch.no_grad():
            assert torch.equal(loaded(x), expected(x))
            back = dequantize_model(loaded)(x)
        assert type(loaded.a) is nn.Linear
        assert (back - expected(x)).norm() < 0.05 * back.norm()


@pytest.mark.parametrize("mode", ["nf4", "int8", "skipped"])
def test_a_held_forward_of_a_streamed_layer_streams_it(mode, device, tmp_path, small_parts_stream):
    class Methods(Net):
        def __init__(self):
            super().__init__(lambda net: None)
            self.call = [self.a.forward, self.b.forward]

        def forward(self, x):
            for call in self.call:
                x = call(x)
            return self.norm(x)

    torch.manual_seed(0)
    model = Methods().eval()
    config = {"load_in_4bit": True, "skip_modules": ["*"], "torch_dtype": "fp32"} if mode == "skipped" else mode
    save_checkpoint(model, tmp_path)
    x = torch.randn(3, 64, device=device)
    found = []
    for away in ({}, {"a": "disk", "b": "disk"}):
        loaded = load_and_quantize_model(
            empty(Methods), config, tmp_path, device_map={"": device, **away}, offload_folder=tmp_path / "off"
        ).eval()
        with torch.no_grad():
            found.append(loaded(x))
    assert engines_of(loaded)
    assert torch.equal(*found)


def test_tensors_that_are_held_are_the_loaded_ones(device, tmp_path):
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(64), nn.Linear(64, 64)
            self.register_buffer("mean", torch.randn(64))
            self.scales = [self.norm.weight]
            self.table = {"bias": self.fc.bias, "mean": (self.mean,)}

        def forward(self, x):
            return self.norm(self.fc(x)) * self.scales[0] + self.table["bias"] + self.table["mean"][0]

    model = Held().eval()
    nn.init.normal_(model.norm.weight)
    save_checkpoint(model, tmp_path)
    loaded = load_and_quantize_model(empty(Held), "nf4", tmp_path, device_map=device).eval()
    assert loaded.scales[0] is loaded.norm.weight
    assert loaded.table["bias"] is loaded.fc.bias
    assert loaded.table["mean"][0] is loaded.mean
    with torch.no_grad():
        assert torch.isfinite(loaded(torch.randn(2, 64, device=device))).all()


class Penalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.LayerNorm(64))
        self.penalties = {"first": [self.body[0].weight]}

    def forward(self, x):
        return self.body(x) + self.penalties["first"][0].norm()


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_a_held_weight_of_a_layer_to_quantize_is_refused_and_its_remedy_works(mode, device):
    model = Penalized().eval()
    before = dict(model.named_parameters())
    with pytest.raises(ConfigError, match=r"'penalties' holds the weight of 'body\.0'.*name 'body\.0' in skip_modules"):
        load_and_quantize_model(model, mode, device_map=device)
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    config = {"load_in_8bit" if mode == "int8" else "load_in_4bit": True, "skip_modules": ["body.0"]}
    config["torch_dtype"] = "fp32"
    x = torch.randn(3, 64)
    expected = model(x)
    loaded = load_and_quantize_model(model, config, device_map=device)
    assert type(loaded.body[2]) is not nn.Linear
    assert (loaded(x.to(device)).cpu() - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("hold", HOLDS, ids=lambda hold: hold.__name__)
def test_a_load_that_fails_at_the_last_step_restores_what_was_held(hold, monkeypatch):
    torch.manual_seed(0)
    model = Net(hold).eval()
    x = torch.randn(3, 64)
    expected, layers = model(x), (model.a, model.b)

    def fail(self, module):
        raise KeyboardInterrupt

    made = assembly.Assembly.commit
    monkeypatch.setattr(assembly.Assembly, "commit", lambda self, then: made(self, lambda root: fail(self, root)))
    with pytest.raises(KeyboardInterrupt):
        load_and_quantize_model(model, "nf4", device_map="cpu")
    assert (model.a, model.b) == layers
    assert torch.equal(model(x), expected)


class Pair(tuple):
    """A tuple of a class of its own, with an attribute."""


class Odd(nn.Module):
    """Holds its layers in ways that are rare."""

    known: ClassVar = {}

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(64, 64), nn.Linear(64, 64), nn.LayerNorm(64)
        self.pair = Pair([self.a, self.b])
        self.pair.name = "pair"
        type(self).known["last"] = self.b
        self.run = types.MethodType(functools.partial(lambda first, self, x: self.norm(first(x)), self.pair[0]), self)

        def patched(module, x, inner=self.b, outer=self.a):
            return inner(outer(x))

        self.patched = types.MethodType(patched, self.norm)

    def forward(self, x):
        return self.run(x) + self.patched(x) + type(self).known["last"](self.pair[1](x))


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_tuples_of_other_classes_dicts_of_classes_and_methods_made_of_partials(mode, device, tmp_path):
    torch.manual_seed(0)
    model = Odd().eval()
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = model(x)
    save_checkpoint(model, tmp_path)
    loaded = load_and_quantize_model(empty(Odd), mode, tmp_path, device_map=device).eval()
    assert type(loaded.pair) is Pair
    assert loaded.pair.name == "pair"
    assert loaded.pair == (loaded.a, loaded.b)
    assert Odd.known["last"] is loaded.b
    assert type(loaded.a) is not nn.Linear
    with torch.no_grad():
        found = loaded(x.to(device)).cpu()
    assert (found - expected).norm() < (0.3 if mode == "nf4" else 0.03) * expected.norm()


class Views(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(64, 64), nn.LayerNorm(64)
        self.row = self.norm.weight.data.view(1, 64)
        self.half = [self.norm.bias.detach()[32:]]

    def forward(self, x):
        return self.norm(self.fc(x)) * self.row + self.half[0].sum()


@pytest.mark.parametrize("is_empty", [True, False])
def test_views_of_tensors_are_views_of_the_loaded_ones(is_empty, device, tmp_path):
    torch.manual_seed(0)
    model = Views().eval()
    for parameter in model.norm.parameters():
        nn.init.normal_(parameter)
    save_checkpoint(model, tmp_path)
    x = torch.randn(2, 64)
    expected = model(x)
    config = {"load_in_4bit": True, "skip_modules": ["*"], "torch_dtype": "fp32"}
    loaded = load_and_quantize_model(empty(Views) if is_empty else Views(), config, tmp_path, device_map=device).eval()
    assert loaded.row.untyped_storage().data_ptr() == loaded.norm.weight.untyped_storage().data_ptr()
    assert torch.allclose(loaded(x.to(device)).cpu(), expected, atol=1e-5)


def test_a_held_view_of_a_weight_to_quantize_is_refused(device, tmp_path):
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(64, 64), nn.Linear(64, 4)
            self.turned = self.fc.weight.data.t()

        def forward(self, x):
            return self.head(self.fc(x) @ self.turned)

    save_checkpoint(Turned(), tmp_path)
    with pytest.raises(ConfigError, match=r"'turned' holds the weight of 'fc'.*name 'fc' in skip_modules"):
        load_and_quantize_model(Turned(), "nf4", tmp_path, device_map=device)
    config = {"load_in_4bit": True, "skip_modules": ["fc"], "torch_dtype": "fp32"}
    loaded = load_and_quantize_model(Turned(), config, tmp_path, device_map=device)
    assert torch.equal(loaded.turned, loaded.fc.weight.t())
