"""Weights are on the device while a call needs them and at rest after it, whatever comes between."""

import gc
import os
import random
import signal
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from comparisons import equal
from forks import exit_status, needs_fork
from streaming import (
    CLOCK_NS,
    assert_at_rest,
    at_rest,
    group_of,
    linears,
    poison,
    resident,
    stream,
    tensors_of,
    tokens,
    written,
)
from torch import nn

from bigload.errors import ConfigError, OffloadError
from bigload.hardware.pinned import HostGroup
from bigload.offload.background import BackgroundRead, BackgroundReader
from bigload.offload.engine import Engine
from bigload.offload.files import FileGroup
from bigload.offload.forwards import OwnForward
from bigload.offload.leaves import Group, Leaf
from bigload.offload.slots import SlotCopier


class Own(nn.Linear):
    """A layer that must find its weight in itself."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


def pairs(kind, count=4, device="cpu"):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(kind(64, 64), kind(64, 64)) for _ in range(count))).to(device)


def groups_of(model, device, folder=None):
    """Let each pair be a group, in host memory or in files."""
    for index, pair in enumerate(model):
        leaves = [Leaf(f"{index}.{k}", layer) for k, layer in enumerate(pair)]
        if folder is None:
            yield group_of(str(index), leaves, device)
        else:
            yield Group(str(index), tuple(leaves), FileGroup(written(tensors_of(leaves), folder / str(index))))


def brought(engine):
    """Bring each leaf's weight in its turn, and copy it there."""
    copies = []
    for weights in engine._weights:
        with weights.swapped_in():
            copies.append(weights.leaf.module.weight.clone())
    return copies


def assert_all_equal(tensors, others):
    assert all(equal(one, other) for one, other in zip(tensors, others, strict=True))


@pytest.mark.timeout(method="thread")  # the other way has the signal that this takes
@pytest.mark.parametrize("where", ["host", "disk"])
@pytest.mark.parametrize("kind", [nn.Linear, Own], ids=["direct", "placed"])
def test_ctrl_c_at_any_moment_leaves_no_user_and_the_next_forward_exact(kind, where, tmp_path):
    model, x = pairs(kind), torch.randn(3, 64)
    random.seed(0)
    kept = []

    def interrupt(*_):
        raise KeyboardInterrupt

    with torch.no_grad():
        expected = model(x)
        engine = Engine(
            model,
            list(groups_of(model, torch.device("cpu"), tmp_path if where == "disk" else None)),
            torch.device("cpu"),
        )
        model(x)
        before, hits, longest_s = signal.signal(signal.SIGALRM, interrupt), 0, 1e-3
        try:
            while hits < 150:
                try:
                    signal.setitimer(signal.ITIMER_REAL, random.uniform(2e-6, longest_s))
                    for _ in range(6):
                        model(x)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    longest_s /= 1.1  # until most of them come in time
                except KeyboardInterrupt as error:
                    kept.append(error)  # with its traceback, as notebooks do
                    hits += 1
                    longest_s *= 1.05
                assert not any(slot.users for slot in engine.pool.slots)
                assert equal(model(x), expected)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    engine.remove()
    assert equal(model(x), expected)


@pytest.mark.parametrize("end", [True, False], ids=["first out first", "last out first"])
def test_tensors_go_to_rest_when_the_last_of_two_calls_is_over(device, end):
    model = resident("nf4", device)
    engine = stream(model, device, slots=2)
    weights = engine._weights[0]
    one, other = weights.swapped_in(), weights.swapped_in()
    with torch.no_grad():
        one.__enter__()
        other.__enter__()
        memory = engine.pool.slots[0].memory.untyped_storage().data_ptr()
        (one if end else other).__exit__(None, None, None)
        assert weights.leaf.module.weight.untyped_storage().data_ptr() == memory
        (other if end else one).__exit__(None, None, None)
    assert_at_rest(engine)


class Recursive(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, depth):
        if depth:
            x = self(x, depth - 1)
        return self.inner(x) @ self.inner.weight  # after the call within has put its tensors back


def test_module_that_runs_within_itself_finds_its_weights_after_that(device):
    expected = Recursive(nn.Linear(64, 64)).to(device).requires_grad_(False)
    model = Recursive(nn.Linear(64, 64)).to(device).requires_grad_(False)
    model.load_state_dict(expected.state_dict())
    group = group_of("whole", [Leaf("", model, ("inner.weight", "inner.bias"))], device)
    poison(group)
    engine = Engine(model, [group], device)
    x = torch.randn(3, 64, device=device)
    assert equal(model(x, 2), expected(x, 2))
    assert_at_rest(engine)


def test_state_dict_is_not_loaded_into_weights_that_are_on_the_device(device):
    model, other = resident("fp32", device), resident("fp32", device)
    with torch.no_grad():
        other.transformer["h"][0].attn.c_attn.weight.mul_(2)
    engine = stream(model, device, poisoned=False)
    with engine.materialize(model.transformer["h"][0]), pytest.raises(OffloadError, match="on the device for now"):
        model.load_state_dict(other.state_dict())
    model.load_state_dict(other.state_dict())
    assert equal(model(tokens(device)), other(tokens(device)))


def test_state_dict_that_is_loaded_while_a_group_is_used_counts_for_the_next_call(device):
    model = pairs(nn.Linear, device=device).requires_grad_(False)
    engine = Engine(model, list(groups_of(model, device)), device, slots=4)
    x, twice = torch.randn(3, 64, device=device), pairs(nn.Linear, device=device).requires_grad_(False)
    for parameter in twice.parameters():
        parameter.data.mul_(2)
    model(x)
    with engine._weights[1].swapped_in():  # of the first group, whose other leaf is loaded
        model[0][0].load_state_dict(twice[0][0].state_dict())
    assert equal(model[0][0](x), twice[0][0](x))


@pytest.mark.parametrize("ends", ["first", "second"])
def test_calls_of_one_layer_at_once_find_its_weights_in_one_place_until_both_are_over(device, ends):
    """Also where others of its group have been loaded anew, so that new calls of them look elsewhere."""
    model = pairs(Own, device=device).requires_grad_(False)
    engine = Engine(model, list(groups_of(model, device)), device, slots=2)
    x, weights = torch.randn(3, 64, device=device), engine._weights[1]
    expected = model[0][1](x)
    calls = {"first": weights.swapped_in(), "second": weights.swapped_in()}
    calls["first"].__enter__()
    model[0][0].load_state_dict(model[0][0].state_dict())
    slot = calls["second"].__enter__()
    calls.pop(ends).__exit__(None, None, None)
    model(x)  # through all slots that are free
    assert equal(nn.Linear.forward(model[0][1], x), expected)
    assert slot.users
    calls.popitem()[1].__exit__(None, None, None)
    assert_at_rest(engine)


def test_forward_goes_on_with_the_slots_there_are_where_memory_for_more_is_gone(device, monkeypatch):
    expected, model = resident("nf4", device), resident("nf4", device)
    engine = stream(model, device)
    engine.pool.free(engine.pool.slots[0])

    def failing(nbytes):
        raise torch.OutOfMemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(engine.pool.copier, "make_slot", failing)
        assert equal(model(tokens(device)), expected(tokens(device)))
    for group in engine.groups:
        engine.pool.forget(group)  # so that one is waited for
    assert equal(model(tokens(device)), expected(tokens(device)))
    assert engine.stats().slots == 2


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
                    found.append("brought back" in str(error))
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
    use = engine._weights[0]
    with pytest.raises(OffloadError, match="brought back meanwhile"):
        use.run(lambda slot: None)


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


def test_what_was_brought_before_memory_ran_out_is_gone_when_slots_are_made_again(device, monkeypatch):
    model = resident("nf4", device)
    engine = stream(model, device)
    bring, make, alive = engine._bring_all, engine.pool.copier.make_slot, []

    def failing(brought):
        bring(brought)
        alive.extend(weakref.ref(tensor) for _, tensor in brought)
        raise torch.OutOfMemoryError("injected")

    def counting(nbytes):
        assert not any(tensor() is not None for tensor in alive)
        return make(nbytes)

    monkeypatch.setattr(engine, "_bring_all", failing)
    monkeypatch.setattr(engine.pool.copier, "make_slot", counting)
    with pytest.raises(torch.OutOfMemoryError):
        engine.remove()
    assert len(alive) > 9
    assert engine.stats().slots == 2


def test_slots_are_no_more_than_groups(device):
    model = pairs(Own, 1, device).requires_grad_(False)
    engine = Engine(model, list(groups_of(model, device)), device, slots=3)
    with engine._weights[0].swapped_in():
        engine.pool.forget(engine.groups[0])
        model(torch.randn(3, 64, device=device))
    model(torch.randn(3, 64, device=device))
    assert engine.stats().slots == 1


STEPS = ["put", "rows", "let go", "release"]


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("step", STEPS)
def test_remove_that_was_interrupted_is_finished_by_a_second(step, at, device, monkeypatch):
    expected, model = resident("nf4", device), resident("nf4", device)
    engine = stream(model, device)
    model(tokens(device))
    owner, name = {
        "put": (type(next(iter(engine._streamed[engine.groups[0]].values()))[0]), "put"),
        "rows": (HostGroup, "source_of"),
        "let go": (OwnForward, "remove"),
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
    assert not any(isinstance(vars(module).get("forward"), OwnForward) for module in model.modules())


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


def test_what_could_not_be_read_ahead_is_read_when_it_is_needed(device, tmp_path):
    model = pairs(nn.Linear, device=device).requires_grad_(False)
    x = torch.randn(3, 64, device=device)
    expected = model(x)
    engine = Engine(model, list(groups_of(model, device, tmp_path)), device)
    for _ in range(2):
        assert equal(model(x), expected)
    away = [tmp_path / str(n) for n in (2, 3)]
    for file in away:
        file.rename(file.with_suffix(".away"))
    out = model[1](model[0](x))  # those after it are asked for
    engine.pool.copier.finish()
    for file in away:
        file.with_suffix(".away").rename(file)
    demanded = engine.stats().demand_fetches
    assert equal(model[3](model[2](out)), expected)
    for _ in range(2):
        assert equal(model(x), expected)
    assert engine.stats().demand_fetches == demanded + 2  # each of the two once


def test_slot_that_was_used_last_is_the_last_to_be_filled_again(device):
    model = pairs(nn.Linear, 5, device).requires_grad_(False)
    engine = Engine(model, list(groups_of(model, device)), device, slots=3)
    x = torch.randn(3, 64, device=device)
    for index in (0, 1, 2, 3, 4) * 2:
        model[index](x)
    stores = {group.store: group.name for group in engine.groups}
    assert {stores[slot.store] for slot in engine.pool.slots} == {"0", "1", "2"}  # what comes next, and nothing twice
    before = engine.stats()
    for index in (0, 1, 2):
        model[index](x)
    after = engine.stats()
    assert after.demand_fetches == before.demand_fetches


def test_slots_that_were_needed_at_once_are_let_go_of(device):
    model = pairs(Own, device=device).requires_grad_(False)
    engine = Engine(model, list(groups_of(model, device)), device, slots=1)
    with engine._weights[0].swapped_in(), engine._weights[2].swapped_in(), engine._weights[4].swapped_in():
        assert engine.stats().slots == 3
        memories = [weakref.ref(slot.memory) for slot in engine.pool.slots]
    x = torch.randn(3, 64, device=device)
    model(x)
    assert engine.stats().slots == 1
    gc.collect()
    assert sum(memory() is not None for memory in memories) == 1


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


def test_layer_that_runs_last_is_learned(device):
    """It need not be the one that was registered last."""
    model = pairs(nn.Linear, 5, device).requires_grad_(False)
    engine = Engine(model, list(groups_of(model, device)), device)
    x, held, demanded = torch.randn(3, 64, device=device), [], []
    model[1][0].register_forward_hook(lambda *_: held.append({slot.store for slot in engine.pool.slots}))
    for _ in range(4):
        for pair in model:
            pair[0](pair[1](x))
        demanded.append(engine.stats().demand_fetches)
    assert demanded[1] == demanded[-1]
    assert held[-1] == {engine.groups[2].store, engine.groups[3].store}  # the one that comes, and the one after


def test_weights_that_a_call_left_away_are_at_rest_before_others_are_loaded(device):
    model, other = resident("fp32", device), resident("fp32", device)
    with torch.no_grad():
        other.transformer["h"][0].attn.c_attn.weight.mul_(2)
    engine = stream(model, device, poisoned=False)
    weights, each = engine._weights[0], engine._weights[0]._streamed[0]
    with weights.swapped_in() as slot:
        there = each.get()
    each.put(there)  # as Ctrl-C may leave it
    each.is_away = True
    model.load_state_dict(other.state_dict())
    slot.memory.fill_(0xFF)
    engine.pool.forget(engine.groups[0])
    assert equal(model(tokens(device)), other(tokens(device)))


@needs_fork
def test_process_that_is_forked_while_its_parent_reads_reads_for_itself(tmp_path, monkeypatch):
    cpu, parent, is_reading, gate = torch.device("cpu"), os.getpid(), threading.Event(), threading.Event()
    model = pairs(nn.Linear).requires_grad_(False)
    expected = [layer.weight.clone() for pair in model for layer in pair]
    engine = Engine(model, list(groups_of(model, cpu, tmp_path)), cpu)
    brought(engine)
    engine.pool.copier.finish()
    own = FileGroup.read_into

    def read_into(*args):
        if os.getpid() == parent:
            is_reading.set()
            gate.wait()
        own(*args)

    monkeypatch.setattr(FileGroup, "read_into", read_into)
    model[0](torch.randn(3, 64))  # what comes after it is being read for ever, so far
    assert is_reading.wait(60)
    try:
        assert exit_status(lambda: assert_all_equal(brought(engine), expected)) == 0
    finally:
        gate.set()


def test_slot_is_not_let_go_of_while_it_is_read_into(tmp_path):
    cpu, done = torch.device("cpu"), []
    copier = SlotCopier(cpu)
    slot = copier.make_slot(64)
    slow = FileGroup(written({"a": torch.zeros(16)}, tmp_path / "slow"))
    slow.read_into = lambda memory: (time.sleep(0.1), done.append(1))
    copier.copy(slow, slot)
    copier.discard(slot)
    assert done
    copier.close()


def test_engine_without_a_slot_is_refused(device):
    model = resident("fp32", device)
    with pytest.raises(ConfigError, match="slots is 0"):
        stream(model, device, slots=0)


@pytest.mark.parametrize("apart", [False, True], ids=["one thread", "two threads"])
def test_order_in_backward_is_learned_apart_from_that_of_forward(device, apart):
    """Also where backward has a thread of its own, as on a GPU."""
    model = pairs(nn.Linear, 5, device).requires_grad_(False)
    engine = Engine(model, list(groups_of(model, device)), device)
    x = torch.randn(3, 64, device=device, requires_grad=True)
    demanded = []
    for _ in range(4):
        backward = model(x).square().sum().backward
        if apart:
            thread = threading.Thread(target=backward)
            thread.start()
            thread.join()
        else:
            backward()
        demanded.append(engine.stats().demand_fetches)
    assert demanded[-1] == demanded[-2]


def test_each_thread_has_a_place_of_its_own(device):
    model = pairs(nn.Linear, 6, device).requires_grad_(False)
    engine = Engine(model, list(groups_of(model, device)), device, slots=6)
    x = torch.randn(3, 64, device=device)
    for _ in range(2):
        model(x)
    ahead = dict(engine.pool.order._next)
    barrier = threading.Barrier(2, timeout=60)

    def run(order):
        for index in order:
            barrier.wait()
            model[index](x)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, ((0, 1, 2), (3, 4, 5))))
    assert engine.pool.order._next == ahead


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


@needs_fork
def test_forked_process_reads_for_itself(tmp_path):
    cpu = torch.device("cpu")
    model = pairs(nn.Linear).requires_grad_(False)
    expected = [layer.weight.clone() for pair in model for layer in pair]
    engine = Engine(model, list(groups_of(model, cpu, tmp_path)), cpu)
    brought(engine)
    engine.pool.copier.finish()
    assert exit_status(lambda: assert_all_equal(brought(engine), expected)) == 0


# The thread that brings what must be read.


def test_copies_wait_for_what_is_read_into_their_slot(tmp_path):
    """A mixed engine of one slot: what is read slowly must not land on what was copied after it."""
    cpu = torch.device("cpu")
    copier, gate = SlotCopier(cpu), threading.Event()
    slot = copier.make_slot(64)
    slow = FileGroup(written({"a": torch.zeros(16)}, tmp_path / "slow"))
    own = slow.read_into
    slow.read_into = lambda memory: (gate.wait(10), own(memory))  # to its end where nobody waits: too late
    copier.copy(slow, slot)
    wait = slot.pending.wait
    slot.pending.wait = lambda: (gate.set(), wait())
    copier.copy(at_rest({"a": torch.ones(16)}, cpu), slot)
    copier.finish()
    assert equal(slot.memory.view(torch.float32)[:16], torch.ones(16))


def test_finish_waits_for_all_and_nothing_of_it_is_held():
    done, begun = [], BackgroundReader.start(lambda: None)
    memories = [torch.zeros(4) for _ in range(3)]
    held = [weakref.ref(memory) for memory in memories]
    while memories:
        memory = memories.pop()
        begun.given.put(BackgroundRead(lambda: (time.sleep(0.02), done.append(1)), memory))
    del memory
    begun.finish()
    assert done == [1, 1, 1]
    assert not any(memory() is not None for memory in held)
    begun.given.put(None)


def test_error_of_a_landing_is_its_waiters():
    def fail():
        raise ValueError("injected")

    begun, pending = BackgroundReader.start(lambda: None), BackgroundRead(fail)
    begun.given.put(pending)
    for _ in range(2):
        pending.wait()
        assert isinstance(pending.error, ValueError)
    begun.given.put(None)


@pytest.mark.cuda
def test_copy_that_failed_is_waited_for_by_the_next_into_its_slot(tmp_path):
    """The kernels that read the slot are to be done before the copy that succeeds, too."""
    gpu = torch.device("cuda", 0)
    model = pairs(nn.Linear, device=gpu).requires_grad_(False)
    x = torch.randn(3, 64, device=gpu)
    expected, first = model(x), model[0](x)
    engine = Engine(model, list(groups_of(model, gpu, tmp_path)), gpu)
    assert equal(model(x), expected)
    torch.cuda.synchronize()
    file = tmp_path / "2"
    file.rename(tmp_path / "away")
    model[0](x)
    torch.cuda._sleep(int(3e7))  # what uses the first slot is late
    found = model[0](x)
    model[1](x)  # asks for the third group, in the slot of the first, in vain
    engine.pool.copier._background.finish()
    (tmp_path / "away").rename(file)
    model[2](x)
    assert equal(found, first)
    assert equal(model(x), expected)
