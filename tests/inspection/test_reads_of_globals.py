"""Code that reads the weight of a layer that it finds in a global, or in an attribute of a class, keeps it plain."""

import sys
import types
from typing import ClassVar

import pytest
import torch
from checkpoints import empty, save_checkpoint
from torch import nn

from bigload import BnbQuantizationConfig, load_and_quantize_model
from bigload.model.quantizable import plain_because_read

LAYER = None
LAYERS: dict = {}
elsewhere = types.ModuleType("elsewhere_of_reads")
sys.modules[elsewhere.__name__] = elsewhere


class Tied(nn.Module):
    """Calls one layer, and multiplies by the weight of another."""

    def __init__(self):
        super().__init__()
        self.gate, self.rest, self.norm = nn.Linear(64, 64, bias=False), nn.Linear(64, 64), nn.LayerNorm(64)
        self.hold()

    def hold(self):
        raise NotImplementedError

    def matrix(self):
        raise NotImplementedError

    def forward(self, x):
        return self.norm(self.rest(x) @ self.matrix().T)


class ByGlobal(Tied):
    def hold(self):
        global LAYER
        LAYER = self.gate

    def matrix(self):
        return LAYER.weight


class ByTable(Tied):
    def hold(self):
        LAYERS["gate"] = self.gate

    def matrix(self):
        return LAYERS["gate"].weight


class ByAnotherFile(Tied):
    def hold(self):
        elsewhere.layer = self.gate

    def matrix(self):
        return elsewhere.layer.weight


class ByClass(Tied):
    shared: ClassVar = None

    def hold(self):
        ByClass.shared = self.gate

    def matrix(self):
        return self.shared.weight


class ByNameOfClass(Tied):
    shared: ClassVar = None

    def hold(self):
        ByNameOfClass.shared = self.gate

    def matrix(self):
        return ByNameOfClass.shared.weight


def turned():
    return LAYER.weight


class ByFunction(ByGlobal):
    def matrix(self):
        return turned()


@pytest.mark.parametrize("mode", ["nf4", "int8"])
@pytest.mark.parametrize("build", [ByGlobal, ByTable, ByAnotherFile, ByClass, ByNameOfClass, ByFunction])
def test_such_layers_stay_plain(build, mode, device, tmp_path):
    torch.manual_seed(0)
    source = build().eval()
    save_checkpoint(source, tmp_path)
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = source(x)
    for _ in range(2):  # what is known of a class holds for its next model
        model = empty(build)
        assert plain_because_read(model, BnbQuantizationConfig.from_mode(mode)) == {"gate": "values"}
    loaded = load_and_quantize_model(model, mode, tmp_path, device_map=device).eval()
    assert type(loaded.rest).__name__ in ("Linear4bit", "Linear8bitLt")
    with torch.no_grad():
        found = loaded(x.to(device)).cpu()
    assert (found - expected).norm() < (0.3 if mode == "nf4" else 0.03) * expected.norm()


class Calls(Tied):
    """Calls the layer in the global, and reads a weight of its own norm."""

    def hold(self):
        global LAYER
        LAYER = self.gate

    def matrix(self):
        return LAYER

    def forward(self, x):
        return self.norm(self.rest(self.matrix()(LAYER(x)))) * self.norm.weight.mean()


def test_layers_that_are_called_do_not():
    assert plain_because_read(Calls(), BnbQuantizationConfig.from_mode("nf4")) == {}
