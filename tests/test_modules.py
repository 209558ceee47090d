"""What the model is: names matched whole, ties found, layers chosen, and models built without weights."""

import logging
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules import module as torch_module
from transformers.pytorch_utils import Conv1D

from bigload import BnbQuantizationConfig, init_empty_weights
from bigload.errors import ConfigError
from bigload.modules import layers_to_quantize, matches, tensors_of


def names_of(model, tied_parameters=()):
    return [tensor.names for tensor in tensors_of(model, tied_parameters)]


def quantized(model, tied_parameters=(), **fields):
    config = BnbQuantizationConfig(load_in_8bit=True, **fields)
    return set(layers_to_quantize(model, config, tensors_of(model, tied_parameters)))


class Net(nn.Module):
    """A model of named children."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class LinearSubclass(nn.Linear):
    pass


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


def test_exactly_linear_is_quantized_and_never_a_subclass():
    model = Net(plain=nn.Linear(4, 4), sub=LinearSubclass(4, 4), conv=nn.Conv1d(4, 4, 1), norm=nn.LayerNorm(4))
    assert quantized(model) == {"plain"}


def test_conv1d_of_gpt2_is_quantized():
    assert quantized(Net(attn=Conv1D(4, 4), norm=nn.LayerNorm(4))) == {"attn"}


def test_class_that_is_only_called_conv1d_is_left_alone():
    assert quantized(Net(attn=nn.Conv1d(4, 4, 1), other=type("Conv1D", (nn.Linear,), {})(4, 4))) == set()


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


def test_skip_pattern_that_matches_nothing_is_a_warning_that_names_it(caplog):
    model = Net(a=nn.Linear(4, 4), norm=nn.LayerNorm(4))
    with caplog.at_level(logging.WARNING, "bigload"):
        quantized(model, skip_modules=["a", "lm_haed", "norm", "h.*"])
    assert len(caplog.records) == 1
    assert "'lm_haed', 'h.*'" in caplog.text
    assert "'a'" not in caplog.text


def test_skip_patterns_that_match_are_silent(caplog):
    with caplog.at_level(logging.WARNING, "bigload"):
        quantized(Net(a=nn.Linear(4, 4), norm=nn.LayerNorm(4)), skip_modules=["a", "norm", "*"])
    assert not caplog.records


def test_parameters_and_buffers_come_with_names_shapes_and_kind():
    model = nn.BatchNorm1d(3)
    model.register_buffer("scratch", torch.ones(2), persistent=False)
    facts = [(t.name, t.shape, t.is_parameter, t.persistent) for t in tensors_of(model)]
    assert facts == [
        ("weight", (3,), True, True),
        ("bias", (3,), True, True),
        ("running_mean", (3,), False, True),
        ("running_var", (3,), False, True),
        ("num_batches_tracked", (), False, True),
        ("scratch", (2,), False, False),
    ]


def test_parameters_that_are_one_object_are_one_tensor():
    model = Net(a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4))
    model.c.weight = model.a.weight
    assert names_of(model) == [("a.weight", "c.weight"), ("a.bias",), ("b.weight",), ("b.bias",), ("c.bias",)]


def test_tied_parameters_join_tensors_that_are_two_objects():
    model = Net(a=nn.Linear(4, 4, bias=False), b=nn.Linear(4, 4, bias=False), c=nn.Linear(4, 4, bias=False))
    assert names_of(model, [("c.weight", "a.weight")]) == [("a.weight", "c.weight"), ("b.weight",)]
    chain = [("c.weight", "b.weight"), ["b.weight", "a.weight"]]
    assert names_of(model, chain) == [("a.weight", "b.weight", "c.weight")]


def test_names_stand_in_the_order_of_the_modules_not_of_the_alphabet():
    model = Net(z=nn.Linear(4, 4, bias=False), b=nn.Linear(4, 4, bias=False), a=nn.Linear(4, 4, bias=False))
    assert names_of(model, [("a.weight", "z.weight")]) == [("z.weight", "a.weight"), ("b.weight",)]


def test_tied_parameters_may_repeat_what_identity_says():
    model = Net(a=nn.Linear(4, 4, bias=False), b=nn.Linear(4, 4, bias=False))
    model.b.weight = model.a.weight
    pairs = [("b.weight", "a.weight"), ("a.weight", "b.weight"), ("a.weight", "a.weight")]
    assert names_of(model, pairs) == [("a.weight", "b.weight")]


def test_ties_that_the_class_declares_join_tensors_that_are_two_objects():
    model = Net(embed=nn.Embedding(4, 3), head=nn.Linear(3, 4, bias=False))
    model.all_tied_weights_keys = {"head.weight": "embed.weight", "absent.weight": "embed.weight"}
    assert names_of(model) == [("embed.weight", "head.weight")]


def test_tie_to_an_unknown_parameter_is_refused_and_names_it():
    model = Net(a=nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=r"'b\.weight'"):
        tensors_of(model, [("a.weight", "b.weight")])


def test_tie_of_a_buffer_is_refused_and_names_it():
    model = Net(a=nn.BatchNorm1d(4))
    with pytest.raises(ConfigError, match=r"'a\.running_mean'"):
        tensors_of(model, [("a.weight", "a.running_mean")])


def test_tie_of_different_shapes_is_refused_with_both():
    model = Net(a=nn.Linear(4, 3), b=nn.Linear(3, 4))
    with pytest.raises(ConfigError, match=r"'a\.weight' \(3, 4\).*'b\.weight' \(4, 3\)"):
        tensors_of(model, [("a.weight", "b.weight")])


@pytest.mark.parametrize("pair", ["ab", ("a.weight",), ("a.weight", "a.weight", "a.weight")], ids=str)
def test_tie_that_is_no_pair_is_refused(pair):
    with pytest.raises(ConfigError, match="pairs of parameter names"):
        tensors_of(Net(a=nn.Linear(4, 4)), [pair])


def test_shared_module_gives_each_of_its_tensors_both_names():
    shared = nn.BatchNorm1d(2)
    names = names_of(Net(a=shared, b=shared))
    assert names[:2] == [("a.weight", "b.weight"), ("a.bias", "b.bias")]
    assert ("a.running_mean", "b.running_mean") in names


def test_shared_buffer_is_one_tensor_and_persistent_when_any_of_its_names_is():
    model = Net(a=nn.Module(), b=nn.Module(), c=nn.Module())
    mask, scratch = torch.ones(2), torch.ones(3)
    model.a.register_buffer("mask", mask, persistent=False)
    model.b.register_buffer("mask", mask)
    model.b.register_buffer("scratch", scratch, persistent=False)
    model.c.register_buffer("scratch", scratch, persistent=False)
    assert [(t.names, t.persistent) for t in tensors_of(model)] == [
        (("a.mask", "b.mask"), True),
        (("b.scratch", "c.scratch"), False),
    ]


def test_parameters_go_to_meta_and_buffers_stay_real():
    with init_empty_weights():
        model = nn.BatchNorm1d(3)
    assert model.weight.is_meta
    assert model.weight.shape == (3,)
    assert torch.equal(model.running_mean, torch.zeros(3))
    assert torch.equal(model.running_var, torch.ones(3))
    assert model.num_batches_tracked.item() == 0


def test_modules_that_register_in_their_own_ways_are_empty_too():
    with init_empty_weights():
        model = Net(rnn=nn.LSTM(3, 4), attn=nn.MultiheadAttention(4, 2), rows=nn.ParameterList([torch.ones(2)]))
        model.table = nn.ParameterDict({"a": torch.ones(3)})
    parameters = dict(model.named_parameters())
    assert len(parameters) == 4 + 4 + 1 + 1
    assert all(parameter.is_meta for parameter in parameters.values())


def test_buffers_go_to_meta_when_asked():
    with init_empty_weights(include_buffers=True):
        model = nn.BatchNorm1d(3)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert not torch.ones(1).is_meta


@pytest.mark.parametrize("include_buffers", [False, True])
def test_weight_assigned_from_another_layer_stays_tied(include_buffers):
    with init_empty_weights(include_buffers):
        model = Net(a=nn.Linear(4, 4), b=nn.Linear(4, 4))
        model.a.weight = model.b.weight
    assert model.a.weight is model.b.weight
    assert model.a.weight.is_meta


def test_parameter_registered_twice_stays_one():
    with init_empty_weights():
        model = Net(a=nn.Module(), b=nn.Module())
        parameter = nn.Parameter(torch.ones(2))
        model.a.weight = parameter
        model.b.register_parameter("weight", parameter)
        model.b.other = nn.Parameter(torch.ones(2))
    assert model.a.weight is model.b.weight
    assert model.b.other is not model.a.weight
    assert parameter.device.type == "cpu"


def test_parameter_keeps_dtype_shape_strides_and_requires_grad():
    with init_empty_weights():
        model = nn.Module()
        model.frozen = nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16), requires_grad=False)
        model.trained = nn.Parameter(torch.ones(2, 3).t())
        model.integers = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    assert (model.frozen.dtype, model.frozen.shape, model.frozen.requires_grad) == (torch.bfloat16, (2, 3), False)
    assert (model.trained.shape, model.trained.stride(), model.trained.requires_grad) == ((3, 2), (1, 3), True)
    assert (model.integers.dtype, model.integers.is_meta) == (torch.int8, True)


def test_parameter_keeps_its_class_and_attributes():
    class Sharded(nn.Parameter):
        pass

    with init_empty_weights():
        model = nn.Module()
        parameter = Sharded(torch.ones(2))
        parameter.axis = 1
        model.weight = parameter
    assert type(model.weight) is Sharded
    assert model.weight.axis == 1
    assert model.weight.is_meta


def test_parameter_slot_without_a_parameter_stays_empty():
    with init_empty_weights():
        model = nn.Linear(4, 4, bias=False)
    assert model.bias is None


def test_memory_of_a_weight_is_free_as_soon_as_it_is_registered():
    with init_empty_weights():
        parameter = nn.Parameter(torch.ones(2))
        alive = weakref.ref(parameter)
        model = nn.Module()
        model.weight = parameter
        del parameter
        assert alive() is None
    assert model.weight.is_meta


def test_lazy_modules_stay_lazy():
    with init_empty_weights():
        model = nn.LazyLinear(4)
    model(torch.ones(2, 3))
    assert model.weight.shape == (4, 3)


def test_module_built_meanwhile_in_another_thread_is_real():
    built = []
    with init_empty_weights():
        thread = threading.Thread(target=lambda: built.append(nn.Linear(4, 4)))
        thread.start()
        thread.join()
        mine = nn.Linear(4, 4)
    assert built[0].weight.device.type == "cpu"
    assert mine.weight.is_meta


def test_two_threads_inside_at_once_each_build_empty_models():
    inside = threading.Barrier(2, timeout=30)
    built = []

    def build():
        with init_empty_weights():
            inside.wait()
            built.append(nn.Linear(4, 4))
            inside.wait()

    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [model.weight.is_meta for model in built] == [True, True]


def test_leaving_an_inner_use_does_not_end_the_outer_one():
    with init_empty_weights():
        shared = nn.Parameter(torch.ones(4))
        outer = nn.Module()
        outer.weight = shared
        with init_empty_weights():
            inner = nn.Module()
            inner.weight = shared
        after = nn.Linear(4, 4)
    assert inner.weight is outer.weight
    assert inner.weight.is_meta
    assert after.weight.is_meta
    assert not nn.Linear(4, 4).weight.is_meta


@pytest.mark.parametrize("include_buffers", [False, True])
def test_exception_inside_restores_everything(include_buffers):
    before = dict(torch_module._global_parameter_registration_hooks)
    with pytest.raises(ZeroDivisionError), init_empty_weights(include_buffers):
        raise ZeroDivisionError
    assert dict(torch_module._global_parameter_registration_hooks) == before
    assert all(not tensor.is_meta for tensor in nn.BatchNorm1d(3).state_dict().values())


def test_hooks_do_not_pile_up_and_the_one_that_stays_does_nothing_after():
    with init_empty_weights():
        once = dict(torch_module._global_parameter_registration_hooks)
    with init_empty_weights():
        assert dict(torch_module._global_parameter_registration_hooks) == once
    parameter = nn.Parameter(torch.ones(4))
    module = nn.Module()
    module.weight = parameter
    assert module.weight is parameter


def test_threads_that_enter_and_leave_at_once_do_not_disturb_each_other():
    def build(_):
        for _ in range(30):
            with init_empty_weights():
                empty = nn.Linear(4, 4)
            real = nn.Linear(4, 4)
            assert empty.weight.is_meta
            assert not real.weight.is_meta
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(build, range(16)))
