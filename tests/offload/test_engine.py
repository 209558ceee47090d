"""A streamed model computes what the resident one does, bit for bit, and nothing reads its weights while they rest.

In every test the host memory that the tensors view at rest is poisoned, and the true bytes are elsewhere.
"""

import copy
import functools
import io
import threading

import pytest
import torch
from comparisons import assert_same_bits, equal
from models import GPT, Attended
from safetensors.torch import load_file, save_file
from streaming import MODES, assert_at_rest, at_rest, group_of, linears, poison, resident, stream, tensors_of, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from bigload import load_and_quantize_model
from bigload.errors import OffloadError
from bigload.hardware.pinned import HostGroup
from bigload.offload.engine import Engine
from bigload.offload.leaves import Group, Leaf
from bigload.offload.slots import CudaSlotCopier, SlotCopier


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_logits_are_those_of_the_resident_model(mode, slots, device):
    expected, model = resident(mode, device), resident(mode, device)
    engine = stream(model, device, slots)
    x = tokens(device)
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        for time in (16, 1, 7):
            with context():
                assert equal(model(x[:, :time]), expected(x[:, :time]))
    assert_at_rest(engine)
    assert engine.stats().slots == slots


@pytest.mark.parametrize("mode", MODES)
def test_poison_shows(mode, device):
    """Were weights read at rest, the tests here would see it."""
    expected, model = resident(mode, device), resident(mode, device)
    engine = stream(model, torch.device("cpu"))
    for forward in engine._forwards:
        forward.remove()
    if device.type == "cpu":
        assert not equal(model(tokens(device)), expected(tokens(device)))
    else:
        with pytest.raises((RuntimeError, ValueError)):  # weights on the CPU: whoever meets them first says so
            model(tokens(device))


def test_each_group_is_copied_once_a_pass_and_only_the_first_is_waited_for(device):
    model = resident("fp32", device, layers=5)
    engine = stream(model, device)
    for _ in range(4):
        model(tokens(device))
    stats = engine.stats()
    # Four passes of five, and the two that are fetched ahead for the next.
    assert (stats.fetches, stats.demand_fetches) == (22, 1)
    assert stats.nbytes == 22 * engine.groups[0].store.layout.nbytes


def test_the_next_but_one_is_fetched_as_soon_as_a_group_is_over(device):
    """Not when the next begins: what lies between them, a head and the start of the next token, would be lost."""
    model = resident("fp32", device, layers=5)
    engine = stream(model, device)
    leaves = [layer for layer in model.modules() if "forward" in vars(layer)]
    for _ in range(2):
        model(tokens(device))
    held = []
    for leaf in leaves:
        leaf.register_forward_hook(lambda *_: held.append([slot.store for slot in engine.pool.slots]))
    model(tokens(device))
    a, b, c, d, e = (group.store for group in engine.groups)
    ahead = {a: b, b: c, c: d, d: e, e: a}
    each = len(leaves) // 5
    for index, (first, second) in enumerate(ahead.items()):
        for at in held[index * each : (index + 1) * each - 1]:
            assert set(at) == {first, second}
        assert set(held[(index + 1) * each - 1]) == {second, ahead[second]}


def test_group_that_seems_over_and_is_not_is_waited_for_twice_and_no_more(device):
    layers = [[nn.Linear(64, 64, device=device) for _ in range(2)] for _ in range(4)]
    model = nn.ModuleList(nn.ModuleList(pair) for pair in layers)
    groups = [
        group_of(str(n), [Leaf(f"{n}.{k}", layer) for k, layer in enumerate(pair)], device)
        for n, pair in enumerate(layers)
    ]
    engine = Engine(model, groups, device)
    x, demanded = torch.randn(4, 64, device=device), []
    with torch.no_grad():
        for _ in range(4):
            for pair in (layers[0], layers[1], layers[1], layers[2], layers[3]):
                for layer in pair:
                    layer(x)
            demanded.append(engine.stats().demand_fetches)
    assert demanded == [2, 3, 3, 3]


def test_another_order_is_learned_in_one_pass(device):
    model = resident("fp32", device, layers=5)
    engine = stream(model, device)
    x = torch.randn(2, 8, 64, device=device)
    demanded = []
    for _ in range(4):
        for index in (4, 2, 0, 3, 1):
            model.transformer["h"][index](x)
        demanded.append(engine.stats().demand_fetches)
    assert demanded[1] > 1
    assert demanded[1:] == [demanded[1]] * 3


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


def test_groups_that_all_have_a_slot_are_copied_once(device):
    model = resident("nf4", device)
    engine = stream(model, device, slots=3)
    for _ in range(3):
        model(tokens(device))
    assert engine.stats().fetches == 3


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("mode", ["fp32", "int8", "nf4-dq"])
def test_layers_in_another_order_skipped_and_called_twice(mode, slots, device):
    expected, model = resident(mode, device, layers=4), resident(mode, device, layers=4)
    engine = stream(model, device, slots)
    x = torch.randn(2, 8, 64, device=device, dtype=torch.float32 if mode == "fp32" else torch.bfloat16)
    x = x.to(next(expected.transformer["ln_f"].parameters()).dtype)
    for order in ([0, 1, 2, 3], [3, 1], [2, 2, 0], [1, 3, 0, 2], [0, 0, 3, 3], [0, 1, 2, 3]):
        outs = []
        for each in (expected, model):
            out = x
            for index in order:
                out = each.transformer["h"][index](out)
            outs.append(out)
        assert equal(*outs)
    assert engine.stats().slots == slots
    assert_at_rest(engine)


def test_threads_get_what_they_would_get_alone(device):
    expected, model = resident("nf4", device), resident("nf4", device)
    engine = stream(model, device)
    inputs = [tokens(device, time) for time in (3, 5, 8, 11)]
    wanted = [expected(x) for x in inputs]
    wrong = []

    def run(x, want):
        with torch.no_grad():
            wrong.extend(1 for _ in range(20) if not equal(model(x), want))

    threads = [threading.Thread(target=run, args=pair) for pair in zip(inputs, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert engine.stats().slots <= 4
    assert_at_rest(engine)


class Whole(nn.Module):
    """Reads its weights itself, calls itself, holds another leaf, and can give out a weight."""

    def __init__(self, inner):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))
        self.inner = inner

    def forward(self, x, depth=0):
        x = self.inner(x) @ self.weight
        return self(x, depth - 1) if depth else (x, self.weight)


@pytest.mark.parametrize("slots", [1, 2])
def test_recursion_nesting_and_a_weight_that_is_given_out(slots, device):
    expected = nn.ModuleList([Whole(nn.Linear(64, 64)), nn.Linear(64, 64)]).to(device).requires_grad_(False)
    model = copy.deepcopy(expected)
    groups = [
        group_of("whole", [Leaf("0", model[0])], device),
        group_of("inner", [Leaf("0.inner", model[0].inner), Leaf("1", model[1])], device),
    ]
    for group in groups:
        poison(group)
    engine = Engine(model, groups, device, slots)
    x = torch.randn(3, 64, device=device)
    for _ in range(2):
        found, wanted = model[0](x, depth=2), expected[0](x, depth=2)
        assert equal(model[1](found[0]), expected[1](wanted[0]))
        assert equal(found[1], wanted[1])
    assert engine.stats().slots == min(slots, 2)  # the one more, where a leaf runs within another, is gone
    assert_at_rest(engine)


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


@pytest.mark.parametrize("mode", MODES)
def test_state_dict_is_the_same_before_during_and_after_a_forward(mode, device):
    model = resident(mode, device)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stream(model, device, slots=1, poisoned=False)
    taken = [model.state_dict()]

    leaf = model.transformer["h"][0].attn.c_attn
    own = leaf.forward.own
    leaf.forward.own = lambda x: (taken.append(model.state_dict()), own(x))[1]
    leaf.forward._make_forward = None  # as for a layer that must find its weight in itself
    model(tokens(device))
    taken.append(model.state_dict())
    assert len(taken) == 3
    for state in taken:
        assert_same_bits(state, expected)


@pytest.mark.parametrize("mode", MODES)
def test_removed_engine_leaves_a_resident_model(mode, device):
    expected, model = resident(mode, device), resident(mode, device)
    names = list(vars(model.transformer["h"][0].attn.c_attn))
    parameters = [id(p) for p in model.parameters()]
    engine = stream(model, device)
    model(tokens(device))
    engine.remove()
    assert equal(model(tokens(device)), expected(tokens(device)))
    assert_same_bits(model.state_dict(), expected.state_dict())
    assert [id(p) for p in model.parameters()] == parameters
    assert list(vars(model.transformer["h"][0].attn.c_attn)) == names
    assert all(p.device == device for p in model.parameters())
    assert equal(copy.deepcopy(model)(tokens(device)), expected(tokens(device)))


def test_engine_that_finds_no_room_to_be_removed_streams_on(device, monkeypatch):
    expected, model = resident("nf4", device), resident("nf4", device)
    engine = stream(model, device)
    own, left = HostGroup.source_of, [5]

    def failing(self, name):
        left[0] -= 1
        if not left[0]:
            raise torch.OutOfMemoryError("injected")
        return own(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(HostGroup, "source_of", failing)
        with pytest.raises(torch.OutOfMemoryError, match="injected"):
            engine.remove()
    assert_at_rest(engine)
    assert engine.stats().slots == 2
    for _ in range(2):
        assert equal(model(tokens(device)), expected(tokens(device)))
    engine.remove()
    assert equal(model(tokens(device)), expected(tokens(device)))


def test_memory_that_could_not_be_pinned_passes_through_what_is(device, monkeypatch):
    """On the CPU nothing is pinned: there the reader is made to think so."""
    monkeypatch.setattr("bigload.hardware.pinned._pin", lambda *args: None)
    monkeypatch.setattr(SlotCopier, "_can_copy_directly", lambda self, store: False)
    expected, model = resident("nf4-dq", device), resident("nf4-dq", device)
    engine = stream(model, device)
    for _ in range(3):
        assert equal(model(tokens(device)), expected(tokens(device)))
    assert_at_rest(engine)
    assert engine.stats().demand_fetches == 1
    engine.remove()
    assert equal(model(tokens(device)), expected(tokens(device)))


def sleep(ms=20):
    torch.cuda._sleep(int(ms * 1.5e6))  # cycles


@pytest.mark.cuda
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("late", ["computing", "copying", "own stream"])
def test_whichever_is_late_the_other_waits(late, slots, monkeypatch):
    """Were a slot overwritten while it is read, or read before it is filled, the logits would differ."""
    gpu = torch.device("cuda", 0)
    expected, model = resident("nf4", gpu), resident("nf4", gpu)
    stream(model, gpu, slots)
    x = tokens(gpu)
    with torch.no_grad():
        wanted = expected(x)
        torch.cuda.synchronize()
        if late == "copying":
            own = CudaSlotCopier._copy

            def slow(self, source, slot):
                with torch.cuda.stream(self._stream):
                    sleep()
                own(self, source, slot)

            monkeypatch.setattr(CudaSlotCopier, "_copy", slow)
        else:
            for block in model.transformer["h"]:
                block.register_forward_pre_hook(lambda *_: sleep())
                block.attn.c_attn.register_forward_hook(lambda *_: sleep())
        for _ in range(2):
            with torch.cuda.stream(torch.cuda.Stream() if late == "own stream" else torch.cuda.current_stream()):
                found = model(x)
                torch.cuda.current_stream().synchronize()
            assert equal(found, wanted)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("place", ["own forward", "forward", "copy", "wait", "grow"])
def test_next_forward_after_an_error_is_exact(place, error, device, monkeypatch):
    expected, model = resident("nf4", device), resident("nf4", device)
    engine = stream(model, device)
    model(tokens(device))  # slots hold groups that are overwritten
    calls = [0 if place != "copy" else 1]

    def failing(own):
        def fail(*args):
            calls[0] += 1
            if calls[0] == 2:
                if place == "copy":
                    args[1].memory.fill_(0xAA)  # half of a copy: what was there is no more
                raise error("injected")
            return own(*args)

        return fail

    with monkeypatch.context() as patch:
        if place in ("own forward", "forward"):
            leaf = model.transformer["h"][1].attn.c_attn.forward
            calls[0] = 1
            make = leaf._make_forward
            is_own = place == "own forward"
            patch.setattr(leaf, "own", failing(leaf.own))
            patch.setattr(leaf, "_make_forward", None if is_own else lambda tensors: failing(make(tensors)))
            leaf._forwards.clear()
        elif place == "grow":
            calls[0] = 1
            engine.pool.slots.clear()
            patch.setattr(engine.pool.copier, "make_slot", failing(engine.pool.copier.make_slot))
        else:
            name = {"copy": "_copy", "wait": "await_copy"}[place]
            patch.setattr(engine.pool.copier, name, failing(getattr(engine.pool.copier, name)))
        with pytest.raises(error):
            model(tokens(device))
    assert calls[0] >= 2
    assert_at_rest(engine)
    for _ in range(2):
        assert equal(model(tokens(device)), expected(tokens(device)))


def test_materialized_weights_can_be_read(device):
    expected, model = resident("nf4", device), resident("nf4", device)
    engine = stream(model, device, slots=1)
    with engine.materialize(model.transformer):
        assert engine.stats().slots == 3
        wanted = expected.state_dict(keep_vars=True)
        for name, parameter in model.named_parameters():
            assert parameter.device == wanted[name].device
        for leaf in linears(model, "transformer.h"):
            layer = expected.get_submodule(leaf.path)
            assert equal(leaf.module.weight.data, layer.weight.data)
            assert equal(leaf.module.weight.quant_state.absmax, layer.weight.quant_state.absmax)
    assert engine.stats().slots == 1
    assert_at_rest(engine)


@pytest.mark.parametrize("mode", MODES)
def test_state_dict_is_saved_and_loaded_by_torch_and_safetensors(mode, device, tmp_path):
    model = resident(mode, device)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stream(model, device, poisoned=False)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert_same_bits(torch.load(tmp_path / "model.pt"), expected)
    assert_same_bits(load_file(tmp_path / "model.safetensors"), expected)


def test_copy_and_pickle_are_refused(device):
    model = resident("nf4", device)
    stream(model, device)
    with pytest.raises(OffloadError, match="cannot be copied or pickled"):
        copy.deepcopy(model)
    with pytest.raises(OffloadError, match="cannot be copied or pickled"):
        torch.save(model, io.BytesIO())


def test_replaced_or_moved_weight_is_refused(device):
    model = resident("fp32", device)
    stream(model, device)
    leaf = model.transformer["h"][1].attn.c_attn
    kept = leaf.weight.data
    leaf.weight.data = leaf.weight.data.clone()
    with pytest.raises(OffloadError, match=r"h\.1\.attn\.c_attn\.weight' is streamed, but was replaced"):
        model(tokens(device))
    leaf.weight.data = kept
    model(tokens(device))
    leaf.weight = nn.Parameter(torch.zeros(192, 64), requires_grad=False)
    with pytest.raises(OffloadError, match="was replaced"):
        model(tokens(device))


def test_weight_of_two_groups_or_of_a_module_in_none_is_refused(device):
    model = nn.ModuleList(nn.Linear(64, 64) for _ in range(3)).to(device).requires_grad_(False)
    model[1].weight = model[0].weight
    groups = [group_of(str(i), [Leaf(str(i), model[i])], device) for i in range(3)]
    with pytest.raises(OffloadError, match="in two groups"):
        Engine(model, groups, device)
    with pytest.raises(OffloadError, match=r"'1\.weight' is streamed for another module"):
        Engine(model, [groups[0], groups[2]], device)
    assert all("forward" not in vars(module) for module in model)


def test_tied_weights_of_one_group_are_copied_once(device):
    expected = nn.ModuleList(nn.Linear(64, 64) for _ in range(2)).to(device).requires_grad_(False)
    expected[1].weight = expected[0].weight
    model = copy.deepcopy(expected)
    store = at_rest(tensors_of([Leaf("0", model[0])]), device)
    group = Group("both", (Leaf("0", model[0]), Leaf("1", model[1])), store)
    poison(group)
    Engine(model, [group], device)
    x = torch.randn(2, 64, device=device)
    assert equal(model[1](model[0](x)), expected[1](expected[0](x)))
    assert model[1].weight is model[0].weight


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
    import gc

    gc.collect()
    others = {id(each) for each in gc.get_objects() if isinstance(each, torch.Tensor)}
    model = resident(mode, device)
    engine = stream(model, device)

    def storages():
        gc.collect()
        own = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and id(t) not in others]
        return len({t.untyped_storage().data_ptr() for t in own})

    with torch.no_grad():
        for _ in range(3):
            model(tokens(device))
        before, slots = storages(), [id(slot.memory) for slot in engine.pool.slots]
        for _ in range(5):
            model(tokens(device))
    assert storages() <= before  # other tests leave garbage that goes meanwhile
    assert [id(slot.memory) for slot in engine.pool.slots] == slots


def test_lane_is_the_cpus_on_the_cpu(device):
    engine = stream(resident("fp32", device), device)
    assert (type(engine.pool.copier) is SlotCopier) == (device.type == "cpu")
