"""What graphs rely on in a model is compared in each step: every exchange is noticed, whatever its values."""

import copy

import pytest
import torch
from torch import nn

from bigload import load_and_quantize_model
from bigload.decoding.held_values import HeldValues
from bigload.decoding.model_state import ModelState


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.scale = nn.Parameter(torch.ones(1))
        self.shift = nn.Parameter(torch.zeros(()))
        self.nothing = nn.Parameter(torch.zeros(0))
        self.register_buffer("table", torch.arange(4.0))
        self.register_buffer("later", None)
        self.plain = torch.ones(3)
        self.adapters, self.named = nn.ModuleList(), nn.ModuleDict({"first": nn.Identity()})
        self.settings = {"bias": torch.ones(2)}


class Equal(nn.Identity):
    """Says of all of its kind that they are the same."""

    def __eq__(self, other):
        return type(self) is type(other)

    def __hash__(self):
        return 0


def exchanged(name, change=torch.clone):
    def exchange(block):
        old = block._parameters[name]
        block._parameters[name] = nn.Parameter(change(old.detach()))

    return exchange


CHANGES = {
    "a weight": lambda block: setattr(block.linear, "weight", nn.Parameter(block.linear.weight.detach().clone())),
    "its values": lambda block: setattr(block.linear.weight, "data", block.linear.weight.data.clone()),
    "a weight of another shape": lambda block: setattr(block.linear, "weight", nn.Parameter(torch.ones(2, 64))),
    "a weight that broadcasts": lambda block: setattr(block.linear, "bias", nn.Parameter(torch.ones(1))),
    "none for a bias": lambda block: setattr(block.linear, "bias", None),
    "an equal number": exchanged("scale"),
    "an equal scalar": exchanged("shift"),
    "an equal nothing": exchanged("nothing"),
    "an equal buffer": lambda block: setattr(block, "table", block.table.clone()),
    "a buffer for none": lambda block: setattr(block, "later", torch.ones(1)),
    "an attribute": lambda block: setattr(block, "plain", block.plain.clone()),
    "an attribute that is no tensor now": lambda block: setattr(block, "plain", 3),
    "an attribute that is gone": lambda block: delattr(block, "plain"),
    "a tensor in a dict": lambda block: block.settings.update(bias=torch.ones(2)),
    "an adapter": lambda block: block.adapters.append(nn.Identity()),
    "another module": lambda block: setattr(block, "linear", copy.deepcopy(block.linear)),
    "one more of a name": lambda block: block.named.update({"second": nn.Identity()}),
    "an equal module": lambda block: block.named.update({"first": Equal()}),
    "a forward": lambda block: setattr(block.linear, "forward", lambda x: x),
    "a hook": lambda block: block.linear.register_forward_hook(lambda *args: None),
    "a pre-hook": lambda block: block.linear.register_forward_pre_hook(lambda *args: None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_exchange_is_noticed(name, device):
    block = Block().to(device)
    block.named["first"] = Equal()
    model = nn.Sequential(block, Block().to(device))
    state = ModelState(model)
    assert state.is_same()
    with torch.no_grad():
        for parameter in model.parameters():  # to write is no exchange
            parameter.add_(1)
        block.table.mul_(2)
    assert state.is_same()
    CHANGES[name](block)
    assert not state.is_same()


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "int8"])
def test_parts_of_quantized_weights(mode, device):
    def parts(layer):
        if mode == "int8":
            return [(vars(layer.state), "CB"), (vars(layer.state), "SCB")]
        state = layer.weight.quant_state
        nested = [] if state.state2 is None else [(vars(state), "offset"), (vars(state.state2), "absmax")]
        return [(vars(state), "absmax"), (vars(state), "code"), *nested]

    build = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).half()
    model = load_and_quantize_model(build, mode, None, device_map={"": device}).eval()
    with torch.no_grad():
        model(torch.ones(2, 64, device=device, dtype=torch.float16))
    for number in range(len(parts(model[0]))):
        for exchange in ("object", "values"):
            state = ModelState(model)
            assert state.is_same()
            held, name = parts(model[0])[number]
            if exchange == "object":
                held[name] = held[name].clone()
            else:
                held[name].data = held[name].data.clone()
            assert not state.is_same(), (name, exchange)


def test_held_values():
    one, inner = torch.ones(1), [1, 2]
    held = [{"a": 1, "b": None, "one": one, "inner": inner}, inner, {}]
    values = HeldValues(held)
    assert values.are_same()
    held[0]["a"] = 1  # an equal number
    assert values.are_same()
    values.put(held[0], "a", 7)
    assert values.are_same()
    for container, name, other in (
        (held[0], "a", 8),
        (held[0], "b", torch.ones(3)),
        (held[0], "one", torch.ones(1)),
        (held[0], "inner", [1, 2]),
        (held[1], 0, 5),
        (held[2], "new", 1),
    ):
        before = container.copy()
        container[name] = other
        assert not values.are_same()
        container.clear()
        container.update(before) if isinstance(container, dict) else container.extend(before)
        assert values.are_same()
