"""Which layers are quantized: names matched whole, what is skipped, and which classes may be named."""

import logging

import bitsandbytes as bnb
import pytest
import torch
from comparisons import relative_error
from hypothesis import given
from hypothesis import strategies as st
from models import Net
from torch import nn
from transformers.pytorch_utils import Conv1D

from bigload import BnbQuantizationConfig, load_and_quantize_model, plan_device_map
from bigload.errors import ConfigError
from bigload.model.quantizable import layers_to_quantize, matches
from bigload.model.tensors import tensors_of


def quantized(model, tied_parameters=(), **fields):
    config = BnbQuantizationConfig(load_in_8bit=True, **fields)
    return set(layers_to_quantize(model, config, tensors_of(model, tied_parameters)))


class LinearSubclass(nn.Linear):
    """Does what nn.Linear does, and is asked for more: left alone unless it is named."""

    def merged(self):
        return self.weight


class WithHead(Net):
    def get_output_embeddings(self):
        return self.head


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("h.1", "h.1", True),
        ("model.h.1.attn", "h.1", True),
        ("h.1.attn.weight", "h.1", True),
        ("h.10", "h.1", False),
        ("h.10.attn", "h.1", False),
        ("h.11", "h.1", False),
        ("oh.1", "h.1", False),
        ("h.x.1", "h.1", False),
        ("hx1", "h.1", False),
        ("lm_head", "head", False),
        ("lm_head.weight", "lm_head", True),
        ("lm_headed", "lm_head", False),
        ("model.lm_head", "lm_head", True),
        ("wo", "wo", True),
        ("encoder.two.weight", "wo", False),
        ("encoder.wo.weight", "wo", True),
        ("anything.at.all", "*", True),
        ("h.10.attn", "h.*.attn", True),
        ("h.10.inner.attn", "h.*.attn", True),
        ("h.10.attn2", "h.*.attn", False),
        ("model.h.10", "h.1*", True),
        ("oh.10", "h.1*", False),
        ("lm_head.weight", "*head", True),
        ("a.experts.3.w1.weight", "experts.*.w1", True),
        ("a.experts.3.w12.weight", "experts.*.w1", False),
        ("a+b.c", "a+b", True),
        ("aab.c", "a+b", False),
        ("a.b", "a[.]b", False),
        ("a", "", False),
    ],
)
def test_pattern_matches_runs_of_whole_components_only(name, pattern, expected):
    assert matches(name, [pattern]) is expected


def test_any_of_several_patterns_is_enough():
    assert matches("h.1", ["x", "h"])
    assert not matches("h.1", ["x", "y"])
    assert not matches("h.1", [])


COMPONENTS = st.lists(st.sampled_from(["a", "b", "ab", "1", "11", "a_b", "a+"]), min_size=1, max_size=5)


@given(name=COMPONENTS, pattern=COMPONENTS)
def test_pattern_without_a_star_is_a_sublist_of_the_components(name, pattern):
    runs = [name[start : start + len(pattern)] for start in range(len(name))]
    assert matches(".".join(name), [".".join(pattern)]) == (pattern in runs)


@given(name=COMPONENTS, pattern=COMPONENTS, star=st.integers(0, 4))
def test_star_matches_whatever_it_replaced(name, pattern, star):
    if matches(".".join(name), [".".join(pattern)]):
        pattern[star % len(pattern)] = "*"
        assert matches(".".join(name), [".".join(pattern)])


class NewName(nn.Linear):
    pass


def test_linear_is_quantized_and_a_subclass_that_is_no_more_than_that():
    model = Net(plain=nn.Linear(4, 4), renamed=NewName(4, 4), sub=LinearSubclass(4, 4), conv=nn.Conv1d(4, 4, 1))
    assert quantized(model) == {"plain", "renamed"}


def test_conv1d_of_gpt2_is_quantized():
    assert quantized(Net(attn=Conv1D(4, 4), norm=nn.LayerNorm(4))) == {"attn"}


def test_class_that_is_only_called_conv1d_is_left_alone():
    assert quantized(Net(attn=nn.Conv1d(4, 4, 1), other=type("Conv1D", (nn.Conv1d,), {})(4, 4, 1))) == set()


def test_out_projection_of_multihead_attention_is_left_alone():
    model = Net(attn=nn.MultiheadAttention(8, 2), fc=nn.Linear(8, 8), norm=nn.LayerNorm(8))
    assert quantized(model, skip_modules=[]) == {"fc"}


def test_last_direct_child_is_the_head_when_it_is_itself_linear():
    model = Net(head=nn.Linear(4, 4), body=nn.Sequential(nn.Linear(4, 4)), last=nn.Linear(4, 4))
    assert quantized(model) == {"head", "body.0"}


def test_there_is_no_head_when_the_last_direct_child_is_not_linear():
    model = Net(first=nn.Linear(4, 4), last=nn.Sequential(nn.Linear(4, 4)))
    assert quantized(model) == {"first", "last.0"}


def test_model_that_is_one_linear_is_quantized():
    assert quantized(nn.Linear(4, 4)) == {""}


def test_head_that_the_model_names_comes_before_the_last_child():
    model = WithHead(head=nn.Linear(4, 4), last=nn.Linear(4, 4))
    assert quantized(model) == {"last"}


def test_explicit_skip_modules_replace_the_default_head():
    model = Net(a=nn.Linear(4, 4), b=nn.Linear(4, 4), last=nn.Linear(4, 4))
    assert quantized(model, skip_modules=[]) == {"a", "b", "last"}
    assert quantized(model, skip_modules=["b"]) == {"a", "last"}
    assert quantized(model, skip_modules=["*"]) == set()


def test_explicit_skip_modules_replace_nothing_but_the_head():
    model = Net(tied=nn.Linear(4, 4), other=nn.Linear(4, 4), kept=nn.Linear(4, 4), last=nn.Linear(4, 4))
    model.tied.weight = model.other.weight
    assert quantized(model, skip_modules=[], keep_in_fp32_modules=["kept"]) == {"last"}


def test_skipped_block_takes_its_layers_with_it_and_no_others():
    model = Net(h=nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(12)))
    assert quantized(model, skip_modules=["h.1"]) == {f"h.{n}.0" for n in range(12) if n != 1}


def test_tied_linears_are_never_quantized():
    model = Net(embed=nn.Embedding(4, 4), fc=nn.Linear(4, 4), out=nn.Linear(4, 4), norm=nn.LayerNorm(4))
    model.out.weight = model.embed.weight
    assert quantized(model) == {"fc"}
    assert quantized(model, [("fc.weight", "embed.weight")]) == set()


def test_linears_that_share_only_a_bias_are_quantized():
    model = Net(a=nn.Linear(4, 4), b=nn.Linear(4, 4), norm=nn.LayerNorm(4))
    model.b.bias = model.a.bias
    assert quantized(model) == {"a", "b"}


def test_one_linear_under_two_names_is_quantized_once():
    shared = nn.Linear(4, 4)
    assert quantized(Net(a=shared, b=shared, norm=nn.LayerNorm(4))) == {"a"}


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("field", ["skip_modules", "keep_in_fp32_modules"])
def test_one_linear_under_two_names_is_skipped_under_either(name, field):
    shared = nn.Linear(4, 4)
    assert quantized(Net(a=shared, b=shared, norm=nn.LayerNorm(4)), **{field: [name]}) == set()


@pytest.mark.parametrize("attribute", ["_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"])
def test_modules_that_the_class_keeps_in_fp32_are_never_quantized(attribute):
    model = Net(wo=nn.Linear(4, 4), two=nn.Linear(4, 4), norm=nn.LayerNorm(4))
    model._keep_in_fp32_modules = None
    setattr(model, attribute, ["wo"])
    assert quantized(model, skip_modules=[]) == {"two"}


def test_linear_with_a_forward_of_its_own_is_left_alone():
    model = Net(patched=nn.Linear(4, 4), plain=nn.Linear(4, 4), norm=nn.LayerNorm(4))
    model.patched.forward = lambda x: x
    assert quantized(model) == {"plain"}


@pytest.mark.parametrize(
    "wrap",
    [nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm],
    ids=["weight_norm", "spectral_norm", "parametrized"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_linear_whose_weight_is_computed_is_left_alone(wrap):
    model = Net(wrapped=wrap(nn.Linear(4, 4)), plain=nn.Linear(4, 4), norm=nn.LayerNorm(4))
    assert quantized(model) == {"plain"}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_linear_without_weights_or_with_another_parameter_is_left_alone():
    model = Net(empty=nn.Linear(0, 4), more=nn.Linear(4, 4), plain=nn.Linear(4, 4, bias=False), norm=nn.LayerNorm(4))
    model.more.scale = nn.Parameter(torch.ones(1))
    assert quantized(model) == {"plain"}


def test_skip_pattern_that_matches_nothing_is_a_warning_that_names_it(logged):
    model = Net(a=nn.Linear(4, 4), norm=nn.LayerNorm(4))
    with logged.at_level(logging.WARNING, "bigload"):
        quantized(model, skip_modules=["a", "lm_haed", "norm", "h.*"])
    assert len(logged.records) == 1
    assert "'lm_haed', 'h.*'" in logged.text
    assert "'a'" not in logged.text


def test_skip_patterns_that_match_are_silent(logged):
    with logged.at_level(logging.WARNING, "bigload"):
        quantized(Net(a=nn.Linear(4, 4), norm=nn.LayerNorm(4)), skip_modules=["a", "norm", "*"])
    assert not logged.records


class OtherForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class OtherArguments(OtherForward):
    def __init__(self, features, *, scale):
        super().__init__(features, features)


def quantized_too(model, *classes):
    config = BnbQuantizationConfig(load_in_8bit=True)
    return set(layers_to_quantize(model, config, tensors_of(model), classes))


def test_subclass_that_is_named_quantizable_is_quantized_and_its_own_subclasses_are_not():
    class Grandchild(LinearSubclass):
        pass

    model = Net(plain=nn.Linear(4, 4), sub=LinearSubclass(4, 4), grand=Grandchild(4, 4), norm=nn.LayerNorm(4))
    assert quantized_too(model, LinearSubclass) == {"plain", "sub"}
    assert quantized_too(model, LinearSubclass, Grandchild) == {"plain", "sub", "grand"}


def test_quantizable_linear_itself_changes_nothing():
    model = Net(plain=nn.Linear(4, 4), sub=LinearSubclass(4, 4), norm=nn.LayerNorm(4))
    assert quantized_too(model, nn.Linear) == {"plain"}


def test_quantizable_subclass_is_skipped_for_the_same_reasons_as_a_linear():
    model = Net(a=LinearSubclass(4, 4), b=LinearSubclass(4, 4), c=LinearSubclass(4, 4), norm=nn.LayerNorm(4))
    model.b.weight = model.a.weight
    model.c.forward = lambda x: x
    assert quantized_too(model, LinearSubclass) == set()


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (OtherForward, "OtherForward, whose forward is not"),
        (OtherArguments, r"OtherArguments\(6, 4\)"),
        (nn.Conv1d, "subclasses of nn.Linear"),
        (nn.Bilinear, "subclasses of nn.Linear"),
        (LinearSubclass(4, 4), "subclasses of nn.Linear"),
        ("Linear", "'Linear'"),
        (None, "None"),
    ],
    ids=["forward", "arguments", "conv", "bilinear", "instance", "name", "none"],
)
def test_quantizable_class_that_is_no_linear_in_all_it_does_is_refused(cls, message):
    with pytest.raises(ConfigError, match=message):
        quantized_too(Net(a=nn.Linear(4, 4), norm=nn.LayerNorm(4)), cls)


def test_quantizable_class_that_the_model_does_not_have_is_said(warned):
    class Elsewhere(nn.Linear):
        pass

    plan_device_map(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), "nf4", device_map="cpu", quantizable=[Elsewhere])
    assert warned() == ["quantizable names 'Elsewhere', but no layer of the model is of that class"]


def test_quantizable_that_is_no_list_is_refused():
    with pytest.raises(ConfigError, match="quantizable must be a list"):
        load_and_quantize_model(Net(a=nn.Linear(4, 4)), "int8", device_map="cpu", quantizable=LinearSubclass)


def test_trying_a_quantizable_class_leaves_the_random_numbers_as_they_were():
    model = Net(a=LinearSubclass(4, 4))
    state = torch.get_rng_state()
    quantized_too(model, LinearSubclass)
    assert torch.equal(torch.get_rng_state(), state)


def test_quantizable_subclass_is_loaded_as_a_layer_of_bitsandbytes_with_its_values():
    model = Net(sub=LinearSubclass(64, 64), norm=nn.LayerNorm(64))
    x = torch.randn(3, 64)
    expected = model.norm(model.sub(x))
    load_and_quantize_model(model, "int8", device_map="cpu", quantizable=[LinearSubclass])
    assert isinstance(model.sub, bnb.nn.Linear8bitLt)
    # Rows and activations are rounded to 1 in 127 of their largest.
    assert relative_error(model.norm(model.sub(x)), expected) < 0.02


def test_fp32_pattern_that_matches_nothing_is_a_warning_that_names_it(logged):
    model = Net(a=nn.Linear(4, 4), norm=nn.LayerNorm(4))
    with logged.at_level(logging.WARNING, "bigload"):
        quantized(model, keep_in_fp32_modules=["norm", "nrom", "b.*"])
    assert len(logged.records) == 1
    assert "keep_in_fp32_modules" in logged.text
    assert "'nrom', 'b.*'" in logged.text
    assert "'norm'" not in logged.text


def test_pattern_of_either_kind_that_matches_nothing_is_blamed_on_its_own_field(logged):
    model = Net(a=nn.Linear(4, 4), norm=nn.LayerNorm(4))
    with logged.at_level(logging.WARNING, "bigload"):
        quantized(model, keep_in_fp32_modules=["x"], skip_modules=["y"])
    first, second = sorted(record.getMessage() for record in logged.records)
    assert first.startswith("keep_in_fp32_modules names 'x'")
    assert second.startswith("skip_modules names 'y'")


@pytest.mark.parametrize(
    "heads",
    [
        lambda layers: nn.ModuleList(layers),
        lambda layers: nn.ModuleDict({"a": layers[0], "b": nn.Sequential(layers[1])}),
    ],
    ids=["a list", "nested"],
)
def test_all_layers_below_a_declared_head_are_heads(heads):
    model = WithHead(body=nn.Linear(4, 4), head=heads([nn.Linear(4, 4), nn.Linear(4, 4)]), norm=nn.LayerNorm(4))
    assert quantized(model) == {"body"}
    assert len(quantized(model, skip_modules=[])) == 3


def test_a_list_of_layers_that_no_model_declares_as_heads_is_quantized():
    model = Net(body=nn.Linear(4, 4), layers=nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]))
    assert quantized(model) == {"body", "layers.0", "layers.1"}


@pytest.mark.parametrize("family", ["MusicGen", "Bark"])
def test_models_of_transformers_with_several_heads_keep_all_that_transformers_keeps(family):
    from transformers import BarkFineConfig, BarkFineModel, MusicgenDecoderConfig, MusicgenForCausalLM
    from transformers.quantizers.base import get_keys_to_not_convert

    sizes = {"hidden_size": 16, "num_heads": 2, "num_layers": 1}
    if family == "MusicGen":
        sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32, "vocab_size": 32, "num_codebooks": 3}
        model = MusicgenForCausalLM(MusicgenDecoderConfig(**sizes))
    else:
        model = BarkFineModel(BarkFineConfig(**sizes, input_vocab_size=32, output_vocab_size=32, n_codes_total=4))
    heads = {f"lm_heads.{index}" for index in range(len(model.lm_heads))}
    assert "lm_heads" in get_keys_to_not_convert(model)
    assert len(heads) > 1
    assert not quantized(model) & heads
    # MusicGen's are quantized if nothing is to be skipped; Bark's are tied.
    assert bool(quantized(model, skip_modules=[]) & heads) == (family == "MusicGen")
