"""Which modules hold fused experts, what is known of them, and why some stay in 16 bit."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers
from experts import family, made
from torch import nn

from bigload import BnbQuantizationConfig, ConfigError
from bigload.model.experts import Experts, computes_otherwise, find_experts, unsupported_experts


class Fields:
    """A config of whatever fields an experts class reads, of small sizes."""

    KNOWN = (
        (r"_experts_implementation", "eager"),
        (r"dtype", torch.float32),
        (r"moe_latent_size", None),
        (r"swiglu_limits", [7.0] * 4),
        (r"limit|softcap", 7.0),
        (r"alpha", 1.7),
        (r"eps", 1e-6),
        (r".*(hidden_act|act_fn|activation).*", "silu"),
        (r".*num.*expert.*|n_routed_experts", 4),
        (r".*(intermediate|ffn).*", 32),
        (r".*hidden.*", 64),
    )

    def __getattr__(self, name):
        for pattern, value in self.KNOWN:
            if re.fullmatch(rf"(.*_)?({pattern})", name):
                return value
        raise AttributeError(name)


def decorated_classes():
    """Return the classes of transformers whose experts it can compute in several ways, by name."""
    found = {}
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        if "use_experts_implementation" not in path.read_text():
            continue
        module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        for name, cls in vars(module).items():
            forward = getattr(cls, "forward", None) if inspect.isclass(cls) else None
            if hasattr(forward, "__wrapped__") and forward.__globals__["__name__"].endswith("integrations.moe"):
                found[name] = cls
    return found


def test_every_decorated_class_of_transformers_computes_what_its_facts_say():
    classes = decorated_classes()
    assert len(classes) > 40
    usual = 0
    for name, cls in classes.items():
        arguments = (Fields(), 0) if len(inspect.signature(cls.__init__).parameters) > 3 else (Fields(),)
        try:
            module = cls(*arguments)
        except TypeError:  # those with a layer's number
            module = cls(Fields(), 0)
        (facts,) = find_experts({"experts": module}, blocksize=32).values()
        assert computes_otherwise(module, facts) == "", name
        h = torch.randn(5, facts.up_features)
        if facts.is_swiglu(module):
            usual += 1
            gate, up = h.chunk(2, dim=-1)
            assert torch.equal(facts.activate(module, h), nn.functional.silu(gate) * up), name
    assert usual > 20


def gelu(module):
    module.act_fn = nn.GELU()


def hooked(module):
    module.act_fn.register_forward_hook(lambda act, args, output: output * 2)


def replaced(module):
    module.act_fn.forward = torch.tanh


def regated(module):
    module._apply_gate = lambda h: h[:, ::2] * h[:, 1::2]


@pytest.mark.parametrize("change", [gelu, hooked, replaced, regated])
def test_what_somebody_made_of_an_activation_is_no_swiglu_any_more(change):
    module = made("qwen3").experts
    facts = find_experts({"experts": module})["experts"]
    assert facts.is_swiglu(module)
    change(module)
    assert not facts.is_swiglu(module)


def test_facts_of_the_usual_the_transposed_and_the_gateless():
    found = {
        kind: find_experts(dict(made(kind).named_modules()))["experts"] for kind in ("qwen3", "gpt_oss", "nemotron")
    }
    assert found["qwen3"] == Experts("gate_up_proj", "down_proj", 6, 128, 64, 128)
    names = ("hidden_states", "router_indices", "routing_weights")
    assert found["gpt_oss"] == Experts("gate_up_proj", "down_proj", 6, 128, 64, 128, True, True, True, names)
    assert found["gpt_oss"].plain_shape("down_proj") == (6, 64, 128)
    assert found["gpt_oss"].packed_shape("down_proj") == (6, 128, 64)
    assert found["nemotron"] == Experts("up_proj", "down_proj", 6, 128, 64, 64, has_gate=False)
    assert found["nemotron"].biases == ()


def test_llama4_is_found_by_its_class():
    found = find_experts(dict(family("llama4").named_modules()))
    assert {facts.kind for facts in found.values()} == {"sorted"}
    assert {facts.is_transposed for facts in found.values()} == {True}


def reason(module, **how):
    """Return why a module stays in 16 bit."""
    assert find_experts({"a.experts": module}, **how) == {}
    (found,) = unsupported_experts({"a.experts": module}, **how).items()
    assert found[0] == "a.experts"
    return found[1]


def test_an_expert_that_is_no_whole_number_of_blocks_stays_in_16_bit():
    module = made(hidden=24, intermediate=12).experts
    assert reason(module) == "an expert's down_proj, 24 x 12, is not a whole number of blocks of 64"
    assert find_experts({"a.experts": module}, blocksize=32)


def test_experts_that_are_computed_in_another_way_stay_in_16_bit():
    module = type("OddExperts", (nn.Module,), {})()
    module.weight = nn.Parameter(torch.zeros(4, 32, 32))
    assert reason(module) == "OddExperts computes its experts in a way of its own"


def test_a_subclass_with_a_forward_of_its_own_stays_in_16_bit():
    module = made().experts
    module.__class__ = type("LoudExperts", (type(module),), {"forward": lambda self, x, ids, weights: x})
    assert reason(module) == "LoudExperts computes its experts in a way of its own"


def test_experts_whose_forward_was_replaced_stay_in_16_bit():
    module = made().experts
    module.forward = lambda x, ids, weights: x
    assert reason(module) == "its forward was replaced"


def test_experts_with_a_further_parameter_stay_in_16_bit():
    module = made().experts
    module.scale = nn.Parameter(torch.ones(6))
    assert reason(module) == "it holds down_proj, gate_up_proj, scale where down_proj, gate_up_proj were expected"


def test_experts_with_weights_of_other_shapes_stay_in_16_bit():
    module = made().experts
    module.down_proj = nn.Parameter(torch.ones(5, 128, 64))
    assert reason(module) == "its weights of (6, 128, 128) and (5, 128, 64) do not fit each other"


def test_other_weights_of_three_dimensions_are_no_experts():
    assert find_experts({"a": nn.Conv1d(4, 4, 3)}) == unsupported_experts({"a": nn.Conv1d(4, 4, 3)}) == {}


class Mine(nn.Module):
    """Experts of nobody's library, as the interface of transformers has them."""

    def __init__(self, turned=False, bias=False):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty((4, 64, 96) if turned else (4, 96, 64)))
        self.down_proj = nn.Parameter(torch.empty((4, 48, 64) if turned else (4, 64, 48)))
        if bias:
            self.gate_up_proj_bias = nn.Parameter(torch.empty(4, 96))
            self.down_proj_bias = nn.Parameter(torch.empty(4, 64))
        self.turned, self.bias = turned, bias
        self.act_fn = nn.SiLU()

    def one(self, name, x, expert):
        weight = getattr(self, name)[expert]
        y = x @ (weight if self.turned else weight.T)
        return y + getattr(self, f"{name}_bias")[expert] if self.bias else y

    def activated(self, h):
        gate, up = h.chunk(2, -1)
        return self.act_fn(gate) * up

    def forward(self, x, chosen, shares):
        out = torch.zeros_like(x)
        for token, choice in (chosen < 4).nonzero().tolist():
            expert = chosen[token, choice]
            h = self.activated(self.one("gate_up_proj", x[token], expert))
            out[token] += shares[token, choice] * self.one("down_proj", h, expert)
        return out


class Swapped(Mine):
    """The first half is multiplied with the activated second."""

    def activated(self, h):
        up, gate = h.chunk(2, -1)
        return self.act_fn(gate) * up


class Echoing(Mine):
    """Numbers beyond the last expert stand for the token itself."""

    def forward(self, x, chosen, shares):
        return super().forward(x, chosen, shares) + x * (shares * (chosen >= 4)).sum(-1, keepdim=True)


class Clamping(Mine):
    """Differs where values are large alone."""

    def activated(self, h):
        gate, up = h.chunk(2, -1)
        return self.act_fn(gate.clamp(max=7)) * up.clamp(-7, 7)


class Dropping(Mine):
    """Differs in training alone."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.1)

    def activated(self, h):
        return self.dropout(super().activated(h))


class Crowded(Mine):
    """An expert takes no more than three tokens."""

    def forward(self, x, chosen, shares):
        chosen = chosen.clone()
        for expert in range(4):
            for token, choice in (chosen == expert).nonzero()[3:].tolist():
                chosen[token, choice] = 4
        return super().forward(x, chosen, shares)


class Sharing(Mine):
    """Takes shares between 0 and 1."""

    def forward(self, x, chosen, shares):
        return super().forward(x, chosen, shares.clamp(0, 1))


class Early(Mine):
    """Multiplies tokens by their shares, not what the experts make of them."""

    def forward(self, x, chosen, shares):
        ones = torch.ones(1, 1)
        each = [
            [Mine.forward(self, x[t, None] * shares[t, c], chosen[t, c].view(1, 1), ones)[0] for c in range(2)]
            for t in range(len(x))
        ]
        return torch.stack([torch.stack(one).sum(0) for one in each])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_experts_of_ones_own_are_found_where_the_config_names_them(turned, bias):
    module = Mine(turned, bias)
    names = ("x", "chosen", "shares")
    expected = Experts("gate_up_proj", "down_proj", 4, 64, 48, 96, True, bias, turned, names)
    assert find_experts({"h.0.mine": module}, declared=["mine"]) == {"h.0.mine": expected}
    assert find_experts({"h.0.mine": module}) == unsupported_experts({"h.0.mine": module}) == {}


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Swapped, "its forward computes something else"),
        (Clamping, "its forward computes something else"),
        (Crowded, "its forward computes something else"),
        (Sharing, "its forward computes something else"),
        (Early, "its forward computes something else"),
        (Dropping, "its forward computes something else in training"),
        (lambda: Dropping().eval(), "its forward computes something else in training"),
        (Echoing, "numbers beyond the last expert mean something to Echoing"),
        (lambda: nn.Bilinear(4, 4, 4), "it holds bias, weight where down_proj, gate_up_proj were expected"),
    ],
)
def test_a_declared_module_that_computes_something_else_is_refused(cls, message):
    with pytest.raises(
        ConfigError, match=rf"experts_modules names 'moe', but {message}: give it the parameters"
    ) as error:
        find_experts({"moe": cls()}, declared=["moe"])
    assert "remove it from experts_modules" in str(error.value)
    assert find_experts({"moe": cls()}) == {}


@pytest.mark.parametrize("training", [False, True])
def test_a_trial_leaves_the_module_and_the_random_numbers_as_they_were(training):
    module = Dropping().train(training)
    before, drawn = {id(tensor) for tensor in module.parameters()}, torch.get_rng_state()
    with pytest.raises(ConfigError, match="in training"):
        find_experts({"moe": module}, declared=["moe"])
    assert module.training == module.dropout.training == training
    assert {id(tensor) for tensor in module.parameters()} == before
    assert torch.equal(torch.get_rng_state(), drawn)


def test_both_remedies_for_a_declared_module_work():
    """It is given the forward that is expected, or is declared no more."""
    module = Swapped()
    with pytest.raises(ConfigError, match=r"give it the parameters and the forward .* remove it from experts_modules"):
        find_experts({"moe": module}, declared=["moe"])
    assert find_experts({"moe": module}) == {}
    module.__class__ = Mine
    assert find_experts({"moe": module}, declared=["moe"]).keys() == {"moe"}


def test_a_declared_name_that_matches_nothing_is_refused():
    with pytest.raises(
        ConfigError, match="experts_modules names 'mone', where the model has no module with 3-D weights"
    ):
        find_experts({"moe": Mine()}, declared=["mone"])


def test_the_config_takes_names_of_experts():
    config = BnbQuantizationConfig.from_mode("nf4", experts_modules=["moe"])
    assert BnbQuantizationConfig.from_dict(config.to_dict()).experts_modules == ["moe"]
    with pytest.raises(ConfigError, match="experts_modules must be a list of strings or None, but it is 'moe'"):
        BnbQuantizationConfig.from_mode("nf4", experts_modules="moe")
