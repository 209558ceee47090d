"""A forward that lists parameters (`parameters()`, `state_dict()` ..) and computes with them keeps layers plain."""

import pytest
import torch
from checkpoints import empty, save_checkpoint
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

from bigload import BnbQuantizationConfig, load_and_quantize_model
from bigload.model.quantizable import plain_because_read


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.rest = nn.Linear(64, 64, bias=False), nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        return self.norm(self.rest(self.gate(x))) + self.penalty(x)

    def penalty(self, x):
        raise NotImplementedError


class BySum(Pair):
    def penalty(self, x):
        return sum(p.float().norm() for p in self.gate.parameters())


class ByLoop(Pair):
    def penalty(self, x):
        total = 0
        for index, p in enumerate(self.gate.parameters()):
            total = total + index + p.abs().mean()
        return total


class ByNamedLoop(Pair):
    def penalty(self, x):
        return torch.stack([p.float().norm() for name, p in self.gate.named_parameters() if name != "bias"]).sum()


class ByDict(Pair):
    def penalty(self, x):
        return x @ dict(self.named_parameters())["gate.weight"].T


class ByStateDict(Pair):
    def penalty(self, x):
        state = self.state_dict()
        return x @ state["gate.weight"].T


class ByItemsOfStateDict(Pair):
    def penalty(self, x):
        return sum(value.float().sum() for _, value in self.gate.state_dict().items())


class ByVector(Pair):
    def penalty(self, x):
        return parameters_to_vector(self.gate.parameters()).norm()


class ByNamedList(Pair):
    def penalty(self, x):
        held = list(self.gate.parameters())
        return held[-1].norm() + len(held)


class ByFunctionalCall(Pair):
    def penalty(self, x):
        return functional_call(self.gate, {name: p * 2 for name, p in self.gate.named_parameters()}, (x,))


class ByFunctionalCallOfOthers(Pair):
    def penalty(self, x):
        return functional_call(self.gate, {"weight": torch.eye(64, device=x.device)}, (x,))


def norm_of(module):
    return sum(p.norm() for p in module.parameters())


class ByHelper(Pair):
    def penalty(self, x):
        return norm_of(self.gate)


class ByMethodOfMethod(Pair):
    def penalty(self, x):
        return self.of_gate()

    def of_gate(self):
        return sum(map(torch.norm, self.gate.parameters()))


READ = [
    BySum,
    ByLoop,
    ByNamedLoop,
    ByDict,
    ByStateDict,
    ByItemsOfStateDict,
    ByVector,
    ByNamedList,
    ByFunctionalCall,
    ByFunctionalCallOfOthers,
    ByHelper,
    ByMethodOfMethod,
]


@pytest.mark.parametrize("mode", ["nf4", "int8"])
@pytest.mark.parametrize("build", READ)
def test_what_a_forward_computes_with_stays_plain(build, mode, device, tmp_path):
    torch.manual_seed(0)
    source = build().eval()
    save_checkpoint(source, tmp_path)
    assert plain_because_read(source, BnbQuantizationConfig.from_mode(mode)) == {"gate": "values"}
    loaded = load_and_quantize_model(empty(build), mode, tmp_path, device_map=device).eval()
    assert type(loaded.gate) is nn.Linear
    assert type(loaded.rest).__name__ in ("Linear4bit", "Linear8bitLt")
    x = torch.randn(3, 64)
    with torch.no_grad():
        found, expected = loaded.penalty(x.to(device)), source.penalty(x)
    assert torch.allclose(found.cpu(), expected, rtol=1e-4, atol=1e-4)


class Counts(Pair):
    """Lists parameters for what is the same of quantized ones, or where no forward runs."""

    def penalty(self, x):
        where = next(self.parameters()).device
        trained = any(p.requires_grad for p in self.parameters())
        for p in self.gate.parameters():
            p.requires_grad = False
        return x.to(where) * (len(list(self.parameters())) + trained)

    def count(self):
        return sum(p.numel() for p in self.parameters())

    def groups(self):
        return [{"params": [p for _, p in self.named_parameters() if p.dim() > 1], "lr": 0.1}]

    def write(self, path):
        torch.save({name: value.half() for name, value in self.state_dict().items()}, path)

    def average(self, other):
        for mine, others in zip(self.parameters(), other.parameters(), strict=True):
            mine.data.lerp_(others.data, 0.1)


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_what_does_no_harm_keeps_no_layer_plain(mode):
    assert plain_because_read(Counts(), BnbQuantizationConfig.from_mode(mode)) == {}


class Everything(Pair):
    def penalty(self, x):
        return 0.01 * sum(p.float().norm() for p in self.parameters())


def test_a_list_of_all_parameters_keeps_all_layers_plain():
    found = plain_because_read(
        nn.ModuleDict({"a": Everything(), "b": nn.Linear(64, 64)}), BnbQuantizationConfig.from_mode("nf4")
    )
    assert found == {"a.gate": "values", "a.rest": "values"}
