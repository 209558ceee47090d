"""The forwards of streamed modules, and their gradients, are those of resident ones."""

import contextlib
import copy
import functools
import gc

import pytest
import torch
from checkpoints import loaded, offloaded, save_checkpoint
from comparisons import equal
from models import GPT, Attended
from streaming import (
    MODES,
    Own,
    assert_at_rest,
    engines_of,
    group_of,
    groups_of,
    linears,
    pairs,
    poison,
    resident,
    stream,
    tokens,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from bigload import load_and_quantize_model
from bigload.errors import OffloadError
from bigload.offload.engine import Engine
from bigload.offload.leaves import Leaf


@pytest.mark.parametrize("mode", ["nf4", "int8", "own"])
def test_backward_after_the_engine_was_removed_is_right_or_refused(mode, device):
    if mode == "own":
        expected, model = pairs(Own, device=device), pairs(Own, device=device)
        for each in (expected, model):
            each.requires_grad_(False)
        engine = Engine(model, list(groups_of(model, device)), device)
        x = torch.randn(3, 64, device=device, requires_grad=True)
    else:
        expected, model = (
            nn.Sequential(linears(resident(mode, device), "transformer.h.0.")[0].module) for _ in range(2)
        )
        engine = Engine(model, [group_of("0", [Leaf("0", model[0])], device)], device)
        x = torch.randn(3, 64, device=device, requires_grad=True)
    out = model(x).square().sum()
    engine.remove()
    if mode == "own":
        with pytest.raises(OffloadError, match="run forward again"):
            out.backward()
        return
    out.backward()
    found, x.grad = x.grad, None
    expected(x).square().sum().backward()
    assert equal(found, x.grad)


def test_wrong_count_of_arguments_is_the_layers_own_error(device):
    model = resident("nf4", device)
    stream(model, device)
    layer, x = model.transformer["h"][0].attn.c_attn, torch.randn(2, 64, device=device)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, pytest.raises(TypeError, match="positional argument"):
            layer(x, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["int8", "nf4", "nf4-dq"])
def test_inputs_of_other_dtypes_give_what_the_layer_itself_gives(mode, dtype, device):
    expected, model = resident(mode, device), resident(mode, device)
    stream(model, device)
    for leaf, layer in zip(linears(model, "transformer.h"), linears(expected, "transformer.h"), strict=True):
        x = torch.randn(2, layer.module.in_features, device=device).to(dtype)
        with torch.no_grad():
            assert equal(leaf.module(x), layer.module(x)), leaf.path


def test_threshold_of_int8_that_is_changed_counts(device):
    expected, model = resident("int8", device), resident("int8", device)
    stream(model, device)
    x = torch.randn(2, 64, device=device)
    x[:, 3] = 30
    for threshold in (0.0, 6.0, 0.0):
        for each in (expected, model):
            each.transformer["h"][0].attn.c_attn.state.threshold = threshold
        with torch.no_grad():
            assert equal(model.transformer["h"][0].attn.c_attn(x), expected.transformer["h"][0].attn.c_attn(x))


def test_forward_that_another_wrapped_around_ours_runs_after_it_was_removed(device):
    expected, model = resident("nf4", device), resident("nf4", device)
    engine = stream(model, device)
    layer = model.transformer["h"][0].attn.c_attn
    ours = layer.forward
    layer.forward = lambda x: ours(x)
    engine.remove()
    assert equal(model(tokens(device)), expected(tokens(device)))


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4"])
def test_layer_on_the_cpu_computes_with_the_weight_and_no_packed_twin_of_it(mode):
    cpu = torch.device("cpu")
    model = load_and_quantize_model(GPT(layers=3), mode, device_map="cpu").eval()
    expected = copy.deepcopy(model).train()  # in which bigload's layers pack nothing
    stream(model, cpu)
    with torch.no_grad():
        for _ in range(2):
            assert equal(blocks(model, cpu), blocks(expected, cpu))


def blocks(model, device):
    """Run the streamed part alone: the head may have a twin."""
    x = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(5)).to(device)
    for block in model.transformer["h"]:
        x = block(x)
    return x


@pytest.mark.parametrize("mode", MODES)
def test_weights_of_common_layers_stay_at_rest_as_they_run(mode, device):
    """So nothing can see them elsewhere, and Python has less to do."""
    model = resident(mode, device)
    engine = stream(model, device)
    seen = []
    leaf = model.transformer["h"][1].attn.c_attn
    make = leaf.forward._make_forward

    def watched(tensors):
        forward = make(tensors)
        return lambda x: (seen.append(leaf.weight.data_ptr()), forward(x))[1]

    leaf.forward._make_forward = watched
    with torch.no_grad():
        model(tokens(device))
    assert seen == [engine.groups[1].store.tensors["transformer.h.1.attn.c_attn.weight"].data_ptr()]


class Doubled(nn.Linear):
    """A subclass that does something else."""

    def forward(self, x):
        """Not what its class does."""
        return 2 * super().forward(x)


def test_layers_with_a_forward_of_their_own_run_it(device):
    plain, doubled = nn.Linear(64, 64).to(device), Doubled(64, 64).to(device)
    patched = nn.Linear(64, 64).to(device)
    patched.forward = lambda x: 3 * nn.Linear.forward(patched, x)
    model = nn.Sequential(plain, doubled, patched)
    x = torch.randn(4, 64, device=device)
    with torch.no_grad():
        expected = model(x)
        Engine(model, [group_of("all", [Leaf(str(n), layer) for n, layer in enumerate(model)], device)], device)
        assert equal(model(x), expected)
        assert equal(plain(input=x), plain(x))


def test_layer_that_has_yet_to_choose_what_it_computes_in_chooses_as_bitsandbytes_does(device):
    expected, model = resident("nf4", device), resident("nf4", device)
    for each in (expected, model):
        for layer in linears(each, "transformer.h"):
            layer.module.compute_dtype, layer.module.compute_type_is_set = None, False
    stream(model, device)
    with torch.no_grad():
        for _ in range(2):
            assert equal(model(tokens(device)), expected(tokens(device)))


def test_module_that_reads_a_childs_weight_is_hooked_whole(device):
    expected = Attended().to(device).requires_grad_(False)
    model = copy.deepcopy(expected)
    leaf = Leaf("attention", model.attention, ("in_proj_weight", "out_proj.weight"))
    group = group_of("attention", [leaf], device)
    poison(group)
    Engine(model, [group], device)
    outs, grads = [], []
    for each in (model, expected):
        x = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
        outs.append(each(x))
        outs[-1].square().sum().backward()
        grads.append(x.grad)
    assert equal(*outs)
    assert equal(*grads)


class Adapted(nn.Module):
    """A layer beside a trained product of two small matrices, as LoRA has it."""

    def __init__(self, base, dtype, device):
        super().__init__()
        torch.manual_seed(11)
        self.base = base
        self.down = nn.Linear(base.in_features, 4, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(4, base.out_features, bias=False, device=device, dtype=dtype)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def adapt(model):
    dtype, device = model.transformer["ln_f"].weight.dtype, model.transformer["ln_f"].weight.device
    for block in model.transformer["h"]:
        block.attn.c_attn = Adapted(block.attn.c_attn, dtype, device)
        block.mlp["c_proj"] = Adapted(block.mlp["c_proj"], dtype, device)
    return [p for m in model.modules() if isinstance(m, Adapted) for p in (m.down.weight, m.up.weight)]


def checkpointed(model, way):
    for block in model.transformer["h"] if way is not None else ():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=way)


@pytest.mark.parametrize("way", [None, True, False], ids=["kept", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_adapters_are_those_of_the_resident_model(mode, slots, way, device):
    found, engines = [], []
    for is_streamed in (False, True):
        model = resident(mode, device)
        if is_streamed:
            engines.append(stream(model, device, slots))
        trained = adapt(model.train())
        checkpointed(model, way)
        model.transformer["ln_f"].requires_grad_()
        model.transformer["wte"].requires_grad_()  # so that the first block's input has a gradient, for reentrant
        optimizer = torch.optim.SGD(trained, lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(tokens(device)).float().square().mean().backward()
            found.append([p.grad.clone() for p in trained])
            optimizer.step()
    for wanted, got in zip(found[:2], found[2:], strict=True):
        assert all(w.abs().sum() > 0 for w in wanted)
        assert all(equal(g, w) for g, w in zip(got, wanted, strict=True))
    assert_at_rest(engines[0])
    assert engines[0].stats().slots == slots


@pytest.mark.parametrize("mode", ["fp32", "int8", "nf4", "nf4-dq"])
def test_gradients_of_biases_are_those_of_the_resident_model(mode, device):
    grads = []
    for is_streamed in (False, True):
        model = resident(mode, device)
        if is_streamed:
            stream(model, device)
        biases = [leaf.module.bias.requires_grad_() for leaf in linears(model, "transformer.h")]
        model(tokens(device)).float().square().mean().backward()
        grads.append([bias.grad for bias in biases])
    assert all(equal(got, want) for want, got in zip(*grads, strict=True))


def test_weight_that_would_be_trained_is_refused_in_backward_only(device):
    model = resident("fp32", device).requires_grad_()
    expected = model(tokens(device)).detach()
    stream(model, device)
    out = model(tokens(device))
    assert equal(out.detach(), expected)
    with pytest.raises(OffloadError, match="cannot be trained: freeze it"):
        out.sum().backward()


@pytest.mark.parametrize("trained", ["weight", "bias", "inputs"])
@pytest.mark.parametrize("mode", ["fp32", "int8", "nf4"])
def test_outputs_may_be_added_to_in_place(mode, trained, device):
    """As Falcon's blocks do; torch refuses it of a view that a custom function returns."""
    expected, model = resident(mode, device), resident(mode, device)
    stream(model, device)
    x = torch.randn(2, 5, 64, device=device, requires_grad=trained == "inputs")
    layers = [each.get_submodule("transformer.h.1.mlp.c_fc") for each in (expected, model)]
    outs = []
    for layer in layers:
        if trained == "bias" or (trained == "weight" and mode == "fp32"):
            layer.get_parameter(trained).requires_grad_()
        with contextlib.nullcontext() if layer is layers[1] else torch.no_grad():
            out = layer(x)
            out += 1
            outs.append(out)
    assert equal(outs[1].detach(), outs[0])


def test_embedding_looks_up_on_the_host(device):
    expected = resident("fp32", device)
    model = copy.deepcopy(expected)
    embedding = model.transformer["wte"].to("cpu")
    engine = Engine(model, [], device, embeddings={Leaf("transformer.wte", embedding): None})
    assert equal(model(tokens(device)), expected(tokens(device)))
    embedding.requires_grad_()
    model(tokens(device)).square().mean().backward()
    assert embedding.weight.grad.abs().sum() > 0
    engine.remove()
    assert embedding.weight.device == device
    assert equal(model(tokens(device)), expected(tokens(device)))


@pytest.mark.parametrize("mode", ["fp32", "int8", "nf4-dq"])
def test_forwards_leave_no_tensor_behind(mode, device):
    gc.collect()
    gc.freeze()  # other tests' tensors: they are listed no more
    model = resident(mode, device)
    engine = stream(model, device)

    def storages():
        gc.collect()
        own = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
        return len({each.untyped_storage().data_ptr() for each in own})

    with torch.no_grad():
        for _ in range(3):
            model(tokens(device))
        before, slots = storages(), [id(slot.memory) for slot in engine.pool.slots]
        for _ in range(5):
            model(tokens(device))
    assert storages() <= before
    assert [id(slot.memory) for slot in engine.pool.slots] == slots


class OddShapes(nn.Module):
    """Layers whose shapes bitsandbytes' CPU kernels cannot compute."""

    def __init__(self):
        super().__init__()
        self.into, self.wide, self.out = nn.Linear(4, 1), nn.Linear(1, 4096), nn.Linear(4096, 80)
        self.odd = nn.Linear(80, 128)

    def forward(self, x):
        return self.odd(torch.tanh(self.out(torch.tanh(self.wide(self.into(x))))))


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "int8"])
def test_gradients_through_streamed_layers_of_odd_shapes_are_those_of_resident_ones(mode, tmp_path, small_parts_stream):
    device = torch.device("cpu")
    folder = save_checkpoint(OddShapes(), tmp_path / "checkpoint", dtype=torch.bfloat16)
    whole = loaded(folder, device, mode, OddShapes)
    model = offloaded(OddShapes, folder, device, ["wide", "out", "odd"], tmp_path / "kept", mode)
    assert {leaf.path for engine in engines_of(model) for group in engine.groups for leaf in group.leaves} >= {"odd"}
    found = []
    for each in (whole, model):
        x = torch.linspace(-1, 1, 12).view(3, 4).bfloat16().requires_grad_()
        out = each.requires_grad_(False)(x)
        out.float().square().sum().backward()
        found.append((out.detach(), x.grad))
    assert all(equal(one, two) for one, two in zip(*found, strict=True))
