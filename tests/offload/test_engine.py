"""A streamed model computes what the resident one does, bit for bit, and nothing reads its weights while they rest.

In every test the host memory that the tensors view at rest is poisoned, and the true bytes are elsewhere.
"""

import copy
import gc
import os
import threading
import time
import weakref

import pytest
import torch
from comparisons import assert_same_bits, equal, state_of
from safetensors.torch import load_file, save_file
from streaming import (
    CLOCK_NS,
    MODES,
    Own,
    assert_at_rest,
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

from bigload.errors import ConfigError, OffloadError
from bigload.hardware.pinned import HostGroup
from bigload.offload.engine import Engine
from bigload.offload.forwards import ForwardOverride
from bigload.offload.leaves import Group, Leaf, StreamedTensor


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_logits_are_those_of_the_resident_model(mode, slots, device):
    expected, model = resident(mode, device), resident(mode, device)
    engine = stream(model, device, slots)
    x = tokens(device)
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        for length in (16, 1, 7):
            with context():
                assert equal(model(x[:, :length]), expected(x[:, :length]))
    assert_at_rest(engine)
    assert engine.stats().slots == slots


@pytest.mark.parametrize("mode", MODES)
def test_poison_shows(mode, device):
    """Were weights read at rest, the tests here would see it."""
    expected, model = resident(mode, device), resident(mode, device)
    stream(model, torch.device("cpu"))
    for module in model.modules():
        if isinstance(vars(module).get("forward"), ForwardOverride):
            module.forward.remove()
    if device.type == "cpu":
        assert not equal(model(tokens(device)), expected(tokens(device)))
    else:
        with pytest.raises((RuntimeError, ValueError)):  # weights on the CPU: whoever meets them first says so
            model(tokens(device))


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


def test_threads_get_what_they_would_get_alone(device, usual_threads):
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


@pytest.mark.parametrize("mode", MODES)
def test_state_dict_is_the_same_before_during_and_after_a_forward(mode, device):
    model = resident(mode, device)
    expected = state_of(model)
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
    expected = state_of(model)
    stream(model, device, poisoned=False)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert_same_bits(torch.load(tmp_path / "model.pt"), expected)
    assert_same_bits(load_file(tmp_path / "model.safetensors"), expected)


@pytest.mark.parametrize("kind", [nn.Linear, Own], ids=["direct", "placed"])
def test_engine_is_removed_while_threads_run_the_model(kind, device):
    """They go on, or are told that the weights went; none computes with others."""
    x = torch.randn(3, 64, device=device)
    for _ in range(5):
        model, found, stop = pairs(kind, device=device).requires_grad_(False), [], threading.Event()
        expected = model(x)
        engine = Engine(model, list(groups_of(model, device)), device)

        def run(model=model, found=found, stop=stop, expected=expected):
            while not stop.is_set():
                try:
                    found.append(equal(model(x), expected))
                except OffloadError as error:
                    found.append("remove() moved the weights" in str(error))
                except BaseException as error:
                    found.append(error)

        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        while True:
            try:
                engine.remove()
            except OffloadError:  # one runs just now
                continue
            break
        ran = len(found)
        while len(found) == ran:  # they run after it too
            time.sleep(0.001)
        stop.set()
        for thread in threads:
            thread.join()
        assert set(found) <= {True}
        assert equal(model(x), expected)


def test_removed_twice_it_is_removed_once(device):
    model = resident("nf4", device)
    engine = stream(model, device)
    for _ in range(2):
        engine.remove()
        assert engine.stats().slots == 0
    with pytest.raises(OffloadError, match="to the device meanwhile"), engine.materialize(model.transformer["h"][0]):
        pass


def test_what_was_brought_before_memory_ran_out_is_gone_when_slots_are_made_again(device, monkeypatch):
    model = resident("nf4", device)
    engine = stream(model, device)
    bring, make, alive = engine._copy_all_to_device, engine.pool.copier.make_slot, []

    def failing(brought):
        bring(brought)
        alive.extend(weakref.ref(tensor) for _, tensor in brought)
        raise torch.OutOfMemoryError("injected")

    def counting(nbytes):
        assert not any(tensor() is not None for tensor in alive)
        return make(nbytes)

    monkeypatch.setattr(engine, "_copy_all_to_device", failing)
    monkeypatch.setattr(engine.pool.copier, "make_slot", counting)
    with pytest.raises(torch.OutOfMemoryError):
        engine.remove()
    assert len(alive) > 9
    assert engine.stats().slots == 2


STEPS = ["put", "rows", "let go", "release"]


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("step", STEPS)
def test_remove_that_was_interrupted_is_finished_by_a_second(step, at, device, monkeypatch):
    expected, model = resident("nf4", device), resident("nf4", device)
    engine = stream(model, device)
    model(tokens(device))
    owner, name = {
        "put": (StreamedTensor, "put"),
        "rows": (HostGroup, "source_of"),
        "let go": (ForwardOverride, "remove"),
        "release": (HostGroup, "release"),
    }[step]
    own, left = getattr(owner, name), [at]

    def failing(*args):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return own(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(KeyboardInterrupt):
            engine.remove()
    engine.remove()
    assert equal(model(tokens(device)), expected(tokens(device)))
    assert all(parameter.device == device for parameter in model.parameters())
    assert not any(isinstance(vars(module).get("forward"), ForwardOverride) for module in model.modules())


@pytest.mark.parametrize("damage", ["cut short", "written again in place"])
@pytest.mark.parametrize("way", ["remove", "state_dict"])
def test_weights_are_not_taken_from_a_file_that_is_not_what_it_was(way, damage, device, tmp_path):
    """Cut short it would end the process, which maps it."""
    model = pairs(nn.Linear, device=device).requires_grad_(False)
    x = torch.randn(3, 64, device=device)
    expected = model(x)
    engine = Engine(model, list(groups_of(model, device, tmp_path)), device)
    file = tmp_path / "2"
    content, stat = file.read_bytes(), file.stat()
    with file.open("r+b") as opened:
        if damage == "cut short":
            opened.truncate(100)
        else:
            opened.write(bytes(len(content)))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + CLOCK_NS))
    take = engine.remove if way == "remove" else model.state_dict
    with pytest.raises(OffloadError, match=r"'2\.0\.weight' cannot be read"):
        take()
    assert len(engine.pool.slots) == 2
    if damage == "written again in place":
        file.write_bytes(content)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        take()
        assert equal(model(x), expected)


def test_removed_engine_holds_neither_host_memory_nor_slots(device):
    model = resident("nf4", device)
    engine = stream(model, device, poisoned=False)
    model(tokens(device))
    mappings = [weakref.ref(group.store._mapping) for group in engine.groups]
    slots = [weakref.ref(slot.memory) for slot in engine.pool.slots]
    engine.remove()
    gc.collect()
    assert not any(mapping() for mapping in mappings)
    assert not any(memory() is not None for memory in slots)


def test_weight_that_is_replaced_while_another_of_its_group_is_in_use_is_refused(device):
    model = pairs(nn.Linear, device=device).requires_grad_(False)
    x = torch.randn(3, 64, device=device)
    engine = Engine(model, list(groups_of(model, device)), device)
    new = nn.Parameter(torch.ones(64, 64, device=device), False)
    with engine.materialize(model[0][0]):
        model[0][1].weight = new
        with pytest.raises(OffloadError, match="was replaced while others are in use on the device"):
            model[0][1](x)
    assert equal(model[0][1](x), nn.functional.linear(x, new, model[0][1].bias))


def test_leaf_that_is_listed_twice_and_weights_that_are_not_those_of_the_store_are_refused(device):
    model = pairs(nn.Linear, device=device).requires_grad_(False)
    leaf, other = Leaf("0.0", model[0][0]), Leaf("0.1", nn.Linear(32, 64, device=device))
    store = group_of("0", [leaf], device).store
    with pytest.raises(OffloadError, match=r"'0\.0' is twice in the group '0'"):
        Engine(model, [Group("0", (leaf, leaf), store)], device)
    with pytest.raises(OffloadError, match=r"'0\.1\.weight' is torch\.float32 \(64, 32\), its store holds None"):
        Engine(model, [Group("0", (other,), store)], device)


def test_engine_without_a_slot_is_refused(device):
    model = resident("fp32", device)
    with pytest.raises(ConfigError, match="slots is 0"):
        stream(model, device, slots=0)
