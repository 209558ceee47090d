"""Experts that stay on the device compute what resident ones do: whatever has room, interrupted, in threads."""

import contextlib
import copy
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import kernels_by_torch
import lazy_gpu
import pytest
import torch
from experts import made, pack, routed
from streaming import assert_at_rest, group_of, poison, tensors_of, written
from torch import nn

from bigload import OffloadError
from bigload.hardware.pinned import HostGroup
from bigload.offload.engine import Engine
from bigload.offload.files import FileGroup
from bigload.offload.leaves import Group, Leaf
from bigload.offload.on_device import expert_cache, gpu_book
from bigload.offload.on_device.expert_books import HostBook
from bigload.offload.on_device.gpu_book import GpuBook, _PlacesInTable

EXPERTS = 6
GPU_BOOK = "bigload.offload.on_device.gpu_book.GpuBook"
# The scales of an expert's down_proj begin in the middle of a block of scales: 128 x 64 weights, 128 scales.
KINDS = [("qwen3", "nf4"), ("gpt_oss", "nf4-dq"), ("nemotron", "nf4-dq"), ("gpt_oss", "fp4")]


KEPT: list[Engine] = []  # as a loaded model keeps its own: what is written is noticed by it


def device_for(where, monkeypatch):
    """Yield the device. "late" is the CPU with streams that are as late as a GPU's may be, "late-book" with kernels."""
    if where == "late-book":
        kernels_by_torch.install_book(monkeypatch)
    elif where != "cuda":
        monkeypatch.setattr(f"{GPU_BOOK}.suits", lambda *_: False)
    with lazy_gpu.installed() if where.startswith("late") else contextlib.nullcontext():
        yield torch.device("cuda", 0) if where.startswith("cuda") else torch.device("cpu")
        KEPT.clear()  # what it holds waits for the streams


@pytest.fixture(
    params=[
        "cpu",
        "late",
        "late-book",
        *(pytest.param(by, marks=pytest.mark.cuda) for by in ("cuda", "cuda-by-the-host")),
    ]
)
def device(request, monkeypatch):
    """Where it may, a GPU keeps the books itself."""
    yield from device_for(request.param, monkeypatch)


@pytest.fixture(params=["cpu", "late", pytest.param("cuda-by-the-host", marks=pytest.mark.cuda)])
def device_of_host(request, monkeypatch):
    """A device whose books the host keeps."""
    yield from device_for(request.param, monkeypatch)


@pytest.fixture(params=["late-book", pytest.param("cuda", marks=pytest.mark.cuda)])
def device_of_book(request, monkeypatch):
    """A device that keeps the books itself."""
    yield from device_for(request.param, monkeypatch)


@pytest.fixture(autouse=True)
def kept():
    yield
    KEPT.clear()


class Model(nn.Module):
    """Some layers of experts, each chosen by what a call says."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x, ids, weights):
        for layer in self.layers:
            x = x + layer.experts(x, ids, weights)
        return x


def resident(kind="qwen3", mode="nf4", device="cpu", layers=1, dtype=torch.float32):
    made_layers = [made(kind, EXPERTS, dtype=dtype, device=device, seed=seed) for seed in range(layers)]
    model = Model(made_layers)
    pack(model, mode, dtype)
    return model.requires_grad_(False)


def leaf_of(model, layer):
    module = model.layers[layer].experts
    return Leaf(f"layers.{layer}.experts", module, module.quantized_experts.weights)


def stream(model, device, cached, folder=None, slots=1):
    """Stream a model's experts, poisoned where they rest and where nothing has been copied to."""
    groups = []
    for layer in range(len(model.layers)):
        leaf = leaf_of(model, layer)
        if folder is None:
            group = group_of(str(layer), [leaf], device)
            poison(group)
        else:
            group = Group(str(layer), (leaf,), FileGroup(written(tensors_of([leaf]), folder / f"{layer}.bin")))
        group.cached = cached
        groups.append(group)
    engine = Engine(model, groups, device, slots)
    KEPT.append(engine)
    for slot in engine.pool.slots:
        slot.memory.fill_(0xFF)
    for cache in caches_of(engine):
        for name, memory in cache._book._memory.tensors.items() if cache._book else ():
            if name != "book":  # it says whether anything else counts
                memory.view(-1).view(torch.uint8).fill_(0xFF)
    return engine


def caches_of(engine):
    return [cache for group in engine.groups for leaf in group.leaves if (cache := engine.pool.caches.of(leaf))]


def routings(model, device, dtype=torch.float32):
    """Calls that want few experts, others, some of these again, all, none, and some that do not exist."""
    module = model.layers[0].experts
    for number, (tokens, top_k) in enumerate([(1, 1), (1, 2), (2, 2), (1, 2), (7, 3), (0, 2), (1, 3), (40, 2)]):
        yield routed(tokens, top_k, module, dtype, seed=number % 5, device=device)
    x, ids, weights = routed(3, 2, module, dtype, seed=9, device=device)
    ids[0, 0], ids[1, 1] = EXPERTS + 3, EXPERTS
    yield x, ids, weights
    yield x, torch.full_like(ids, EXPERTS), weights
    yield x, torch.full_like(ids, 2), weights  # one expert for all


@pytest.mark.parametrize("cached", [0, 1, 2, 3, EXPERTS, EXPERTS + 9])
@pytest.mark.parametrize(("kind", "mode"), KINDS)
def test_any_cache_computes_the_bits_of_resident_experts(kind, mode, cached, device):
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = resident(kind, mode, device, 2, dtype)
    calls = list(routings(model, device, dtype))
    with torch.no_grad():
        expected = [model(*call) for call in calls]
        engine = stream(model, device, cached)
        for call, right in zip(calls, expected, strict=True):
            assert torch.equal(model(*call), right)
    stats = engine.stats()
    assert stats.expert_misses
    assert bool(stats.fetches) == (cached < EXPERTS - 1)  # the last expert is chosen by nobody
    assert_at_rest(engine)


@pytest.mark.parametrize("cached", [0, 1, 3, EXPERTS])
@pytest.mark.parametrize(("kind", "mode"), KINDS[:3])
def test_any_cache_gives_the_gradients_of_resident_experts(kind, mode, cached, device):
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = resident(kind, mode, device, 2, dtype)
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    for bias in biases:
        bias.requires_grad_(True)

    def gradients(call, checkpointed):
        x, ids, weights = call
        given = x.clone().requires_grad_(), weights.clone().requires_grad_()
        run = (lambda *a: torch.utils.checkpoint.checkpoint(model, *a, use_reentrant=False)) if checkpointed else model
        out = run(given[0], ids, given[1])
        return out.detach(), *torch.autograd.grad(out.square().sum(), [*given, *biases], allow_unused=True)

    calls = [call for call in routings(model, device, dtype) if len(call[0])]
    expected = [gradients(call, False) for call in calls]
    stream(model, device, cached)
    for checkpointed, step in ((False, 1), (True, 2)):
        for call, right in zip(calls[::step], expected[::step], strict=True):
            found = gradients(call, checkpointed)
            assert all(one is other is None or torch.equal(one, other) for one, other in zip(found, right, strict=True))


def choose(*experts, device="cpu", model=None):
    """A call of one token for these experts."""
    x, _, _ = routed(1, 1, model.layers[0].experts, device=device)
    ids = torch.tensor([experts], device=device)
    return x, ids, torch.full(ids.shape, 0.5, device=device)


def test_what_was_used_last_stays(device):
    model = resident(device=device)
    engine = stream(model, device, 3)
    (cache,) = caches_of(engine)

    def run(*experts):
        before = engine.stats()
        with torch.no_grad():
            model(*choose(*experts, device=device, model=model))
        after = engine.stats()
        assert after.fetches == before.fetches
        return after.expert_hits - before.expert_hits, after.expert_misses - before.expert_misses

    assert run(0, 1) == (0, 2)
    assert run(1, 0) == (2, 0)
    assert run(2) == (0, 1)
    assert run(0) == (1, 0)
    assert run(3) == (0, 1)  # in the place of 1
    assert run(0, 2, 3) == (3, 0)
    assert run(1) == (0, 1)
    one = sum(slices.nbytes // EXPERTS for name, slices in engine.groups[0].store.tensors.items() if _is_sliced(name))
    shared = sum(tensor.nbytes for name, tensor in engine.groups[0].store.tensors.items() if not _is_sliced(name))
    assert engine.stats().nbytes == 5 * one + shared
    assert 1 in cache._book.places
    assert len(cache._book.places) == len(set(cache._book.places.values())) == 3


def test_an_expert_counts_once_in_a_call_that_the_gpu_takes_in_turns(device_of_book, monkeypatch):
    monkeypatch.setattr(gpu_book, "_AT_ONCE", 2)
    device = device_of_book
    model = resident(device=device)
    engine = stream(model, device, 4)
    with torch.no_grad():
        model(*choose(0, 1, 2, 0, device=device, model=model))
        assert (engine.stats().expert_hits, engine.stats().expert_misses) == (0, 3)
        model(*choose(1, 3, 1, 3, device=device, model=model))
        assert (engine.stats().expert_hits, engine.stats().expert_misses) == (1, 4)


def _is_sliced(name):
    return name.endswith(("proj", "proj.absmax"))


@pytest.mark.parametrize(("wanted", "copied"), [((0, 1, 2), 3), ((0, 1, 2, 3), 0)])
def test_what_has_no_room_is_copied_into_a_slot_and_of_most_experts_all(wanted, copied, device):
    model = resident(device=device)
    calls = [choose(*each, device=device, model=model) for each in (wanted, (4,), wanted)]
    with torch.no_grad():
        expected = [model(*call) for call in calls]
        engine = stream(model, device, 2)
        assert torch.equal(model(*calls[0]), expected[0])
        assert engine.stats().expert_misses == copied
        assert engine.stats().fetches == (not copied)
        assert torch.equal(model(*calls[1]), expected[1])
        assert torch.equal(model(*calls[2]), expected[2])
    assert engine.stats().fetches == (not copied)
    (store,) = (group.store for group in engine.groups)
    assert engine.stats().nbytes < store.layout.nbytes * 2


def test_groups_that_need_few_experts_are_not_prefetched(device):
    model = resident(device=device, layers=4)
    few, many = choose(0, 1, device=device, model=model), routed(40, 3, model.layers[0].experts, device=device)
    engine = stream(model, device, 3, slots=2)
    with torch.no_grad():
        model(*few)
        assert engine.stats().fetches == 0
        model(*many)
        before = engine.stats()
        assert before.demand_fetches < before.fetches  # the others were prefetched
        for _ in range(3):
            model(*few)
        assert engine.stats().fetches == before.fetches


def test_a_layer_that_wants_most_experts_does_not_have_those_prefetched_that_want_few(device):
    model = resident(device=device, layers=4)
    most, few = choose(0, 1, 2, 3, device=device, model=model), choose(0, 1, 0, 1, device=device, model=model)
    engine = stream(model, device, 3, slots=3)
    with torch.no_grad():
        for _ in range(2):
            for number, layer in enumerate(model.layers):
                layer.experts(*(few if number else most))
    assert engine.stats().fetches == 1  # it stays in its slot


def test_values_that_are_written_or_loaded_count_from_the_next_call(device):
    model = resident("gpt_oss", "nf4-dq", device)
    other = resident("gpt_oss", "nf4-dq", device)
    call = choose(0, 1, device=device, model=model)
    module = other.layers[0].experts
    for name in module.quantized_experts.weights:
        parameter = module._parameters[name]
        parameter.data = parameter.data.flip(0)
        parameter.quant_state.offset.mul_(2)
    group = group_of("0", [leaf_of(model, 0)], device)
    group.cached = 2
    with torch.no_grad():
        expected = [model(*call), other(*call)]
        engine = Engine(model, [group], device, 1)
        assert torch.equal(model(*call), expected[0])
        streamed = model.layers[0].experts
        for name in module.quantized_experts.weights:
            streamed._parameters[name].data.copy_(module._parameters[name].data)
            streamed._parameters[name].quant_state.offset.mul_(2)
        assert torch.equal(model(*call), expected[1])
        assert engine.stats().expert_misses == 4


def failing_reads(monkeypatch, at):
    """Let the n-th copy of a slice be interrupted."""
    count = [0]

    def wrap(cls, name):
        own = getattr(cls, name)

        def interrupted(self, *given):
            count[0] += 1
            if count[0] == at:
                raise KeyboardInterrupt
            return own(self, *given)

        monkeypatch.setattr(cls, name, interrupted)

    wrap(HostGroup, "slice_of")
    return count


@pytest.mark.parametrize("at", [1, 8, 12, 16, 17, 18, 20, 21, 24, 25, 28])  # of the first call, and of others
def test_a_call_that_is_interrupted_leaves_what_the_next_can_use(at, device_of_host, monkeypatch):
    device = device_of_host
    model = resident("gpt_oss", "nf4-dq", device)
    calls = [choose(*experts, device=device, model=model) for experts in ((0, 1), (2, 0), (1, 3), (0, 2))]
    with torch.no_grad():
        expected = [model(*call) for call in calls]
        engine = stream(model, device, 2)
        with monkeypatch.context() as patch:
            failing_reads(patch, at)
            with pytest.raises(KeyboardInterrupt):
                _ = [model(*call) for call in calls]
        for call, right in [*zip(calls, expected, strict=True)] * 2:
            assert torch.equal(model(*call), right)
    (cache,) = caches_of(engine)
    assert not cache._running
    assert engine.stats().fetches == 0


@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("done", [0, 0.5, 1])
def test_a_copy_that_is_interrupted_half_way_leaves_what_the_next_call_can_use(at, done, device_of_host, monkeypatch):
    device = device_of_host
    model = resident("gpt_oss", "nf4-dq", device)
    calls = [choose(*experts, device=device, model=model) for experts in ((0, 1), (2, 0), (1, 3), (0, 2))]
    own, count = torch._foreach_copy_, [0]

    def interrupted(targets, sources, **how):
        count[0] += 1
        part = int(done * len(targets)) if count[0] == at else len(targets)
        if part:
            own(targets[:part], sources[:part], **how)
        if count[0] == at:
            raise KeyboardInterrupt

    with torch.no_grad():
        expected = [model(*call) for call in calls]
        stream(model, device, 2)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "_foreach_copy_", interrupted)
            with pytest.raises(KeyboardInterrupt):
                _ = [model(*call) for call in calls]
        for call, right in [*zip(calls, expected, strict=True)] * 2:
            assert torch.equal(model(*call), right)


@pytest.mark.parametrize("step", ["follow", "_empty", "_fetch", "ends"])
@pytest.mark.parametrize("is_done", [False, True])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_gpu_that_keeps_the_book_and_is_interrupted_leaves_what_the_next_call_can_use(
    step, is_done, at, device_of_book, monkeypatch
):
    device = device_of_book
    model = resident("gpt_oss", "nf4-dq", device)
    calls = [choose(*experts, device=device, model=model) for experts in ((0, 1), (2, 0), (1, 3), (0, 2))]
    count = [0]
    with torch.no_grad():
        expected = [model(*call) for call in calls]
        engine = stream(model, device, 2)
        (cache,) = caches_of(engine)
        name = "bring" if step == "ends" else step
        own = getattr(cache._book, name)

        def interrupted(*given):
            count[0] += 1
            is_it = count[0] == at or step == "_empty"  # which runs once
            if is_done or not is_it:
                own(*given)
            if is_it:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(cache._book, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                _ = [model(*call) for call in calls]
        for call, right in [*zip(calls, expected, strict=True)] * 2:
            assert torch.equal(model(*call), right)
    assert not cache._running
    assert engine.stats().fetches == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # between open and close
@pytest.mark.timeout(method="thread")  # the other way has the signal that this takes
@pytest.mark.parametrize("wanted", [((0, 1), (2, 3), (1, 2)), ((0, 1, 2), (2, 3, 4), (1, 3))], ids=["cache", "slot"])
@pytest.mark.parametrize("where", ["host", "disk"])
def test_ctrl_c_at_any_moment_leaves_the_next_call_exact(wanted, where, tmp_path):
    model = resident("gpt_oss", "nf4-dq", layers=2)
    calls = [choose(*each, model=model) for each in wanted]
    random.seed(0)
    tracebacks = []

    def interrupt(*_):
        raise KeyboardInterrupt

    with torch.no_grad():
        expected = [model(*call) for call in calls]
        engine = stream(model, torch.device("cpu"), 2, tmp_path if where == "disk" else None)
        before, longest_s = signal.signal(signal.SIGALRM, interrupt), 4e-3
        try:
            while len(tracebacks) < 50:
                try:
                    signal.setitimer(signal.ITIMER_REAL, random.uniform(2e-6, longest_s))
                    for call in calls:
                        model(*call)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    longest_s /= 1.1  # until most of them come in time
                except KeyboardInterrupt as error:
                    tracebacks.append(error)  # as notebooks keep them
                    longest_s *= 1.05
                assert not any(slot.users for slot in engine.pool.slots)
                assert not any(cache._running for cache in caches_of(engine))
                for call, right in zip(calls, expected, strict=True):
                    assert torch.equal(model(*call), right)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert_at_rest(engine)
    assert len(engine.pool.slots) == 1


def test_inference_mode_leaves_memory_that_training_uses(device):
    model = resident("qwen3", "nf4", device)
    x, ids, weights = choose(0, 1, device=device, model=model)
    expected = model(x.clone().requires_grad_(), ids, weights).detach()
    group = group_of("0", [leaf_of(model, 0)], device)
    group.cached = 2
    with torch.inference_mode():
        KEPT.append(Engine(model, [group], device, 1))
        assert torch.equal(model(x, ids, weights), expected)
        assert model(*choose(2, 3, 4, device=device, model=model)).isfinite().all()
    given = x.clone().requires_grad_()
    model(given, ids, weights).sum().backward()
    assert given.grad.any()
    three = choose(1, 2, 3, device=device, model=model)  # through the slot that was used above
    given = three[0].clone().requires_grad_()
    model(given, *three[1:]).sum().backward()
    assert given.grad.any()


def test_an_error_within_the_experts_leaves_them_usable(device):
    model = resident("nemotron", device=device)
    call = choose(0, 1, device=device, model=model)
    with torch.no_grad():
        expected = model(*call)
        engine = stream(model, device, 2)

        def fail(*_):
            raise KeyboardInterrupt

        hook = model.layers[0].experts.act_fn.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(*call)
        hook.remove()
        assert torch.equal(model(*call), expected)
        assert engine.stats().expert_hits == 2


def test_experts_that_call_themselves_do_not_overwrite_what_they_use(device):
    model = resident("nemotron", device=device)
    calls = choose(0, 1, device=device, model=model), choose(2, 3, device=device, model=model)
    with torch.no_grad():
        expected = [model(*call) for call in calls]
        engine = stream(model, device, 2)
        inner = []

        def again(*_):
            if not inner:
                inner.append(None)
                inner[0] = model(*calls[1])

        model.layers[0].experts.act_fn.register_forward_pre_hook(again)
        assert torch.equal(model(*calls[0]), expected[0])
        assert torch.equal(inner[0], expected[1])
        assert engine.stats().fetches == 0
        assert engine.stats().expert_misses == 4  # those of the inner one are in a slot


def test_threads_compute_with_one_cache(device):
    model = resident("gpt_oss", "nf4-dq", device, 2)
    calls = [choose(e, (e + 1) % EXPERTS, device=device, model=model) for e in range(EXPERTS)]
    with torch.no_grad():
        expected = [model(*call) for call in calls]
    stream(model, device, 2)
    wrong: list[object] = []

    def work(first):
        stream_of_own = torch.cuda.Stream() if device.type == "cuda" else None
        with torch.no_grad(), torch.cuda.stream(stream_of_own):
            for turn in range(12):
                number = (first * 2 + turn) % EXPERTS
                if not torch.equal(model(*calls[number]), expected[number]):
                    wrong.append((first, turn))

    if device.type == "cuda":
        torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("within", [False, True])
def test_a_graph_that_others_capture_is_refused_and_the_model_runs_without_one(within, monkeypatch):
    """Also where a hook within the experts calls them again."""
    model = resident("nemotron")
    call = choose(0, 1, model=model)
    with torch.no_grad():
        expected = model(*call)
        engine = stream(model, torch.device("cpu"), 2)
        (cache,) = caches_of(engine)
        hook = model.layers[0].experts.act_fn.register_forward_hook(lambda *_: cache.run([0], pytest.fail))
        with monkeypatch.context() as patch:
            patch.setattr(expert_cache, "is_capturing", lambda device: bool(cache._running) or not within)
            with pytest.raises(OffloadError, match="no CUDA graph can capture: run the model without one"):
                model(*call)
        hook.remove()
        assert torch.equal(model(*call), expected)
    assert_at_rest(engine)


def test_removed_experts_are_resident(device):
    model = resident("gpt_oss", "nf4-dq", device)
    x, ids, weights = choose(0, 1, device=device, model=model)
    with torch.no_grad():
        expected = model(x, ids, weights)
    group = group_of("0", [leaf_of(model, 0)], device)
    group.cached = 2
    engine = Engine(model, [group], device, 1)
    out = model(x.clone().requires_grad_(), ids, weights)
    seen = []

    def remove_within(*_):
        with pytest.raises(OffloadError, match="in use"):
            engine.remove()
        with ThreadPoolExecutor(1) as pool, pytest.raises(OffloadError, match="in use"):
            pool.submit(engine.remove).result()
        seen.append(True)

    (cache,) = caches_of(engine)
    book = type(cache._book)
    own = book.bring

    def bring(self, wanted):
        own(self, wanted)
        remove_within()

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(book, "bring", bring)
        assert torch.equal(model(x, ids, weights), expected)
    assert seen
    engine.remove()
    assert "forward" in vars(model.layers[0].experts)
    with torch.no_grad():
        assert torch.equal(model(x, ids, weights), expected)
    out.sum().backward()  # recorded while it was streamed
    for name, tensor in tensors_of([leaf_of(model, 0)]).items():
        assert tensor.device == device, name


def test_no_room_for_the_cache_leaves_the_model_as_it_was(device, monkeypatch):
    model = resident(device=device)
    call = choose(0, 1, device=device, model=model)
    with torch.no_grad():
        expected = model(*call)

        def full(*_):
            raise torch.OutOfMemoryError("no room")

        with monkeypatch.context() as patch:
            patch.setattr("bigload.offload.on_device.expert_cache.allocate", full)
            group = group_of("0", [leaf_of(model, 0)], device)
            group.cached = 2
            with pytest.raises(torch.OutOfMemoryError):
                Engine(model, [group], device, 1)
        assert torch.equal(model(*call), expected)


def test_a_model_with_such_experts_is_not_copied(device):
    model = resident(device=device)
    stream(model, device, 2)
    with pytest.raises(OffloadError, match="cannot be copied"):
        copy.deepcopy(model)


def test_experts_are_read_from_files_one_by_one(device, tmp_path):
    model = resident("gpt_oss", "nf4-dq", device, 2)
    calls = list(routings(model, device))
    with torch.no_grad():
        expected = [model(*call) for call in calls]
        engine = stream(model, device, 3, tmp_path)
        for call, right in zip(calls, expected, strict=True):
            assert torch.equal(model(*call), right)
    assert engine.stats().expert_misses


@pytest.mark.cuda
def test_caches_of_experts_in_files_share_what_these_pass_through(tmp_path):
    """Two pinned buffers for each would be 190 MiB for 48 layers of Qwen3-30B-A3B."""
    device = torch.device("cuda", 0)
    model = resident(device=device, layers=3)
    engine = stream(model, device, 2, tmp_path)
    calls = [choose(e, (e + 1) % 5, device=device, model=model) for e in range(5)]
    with torch.no_grad():
        for call in calls:
            model(*call)
    assert all(cache._book._copies._staging is engine.pool.copier.staging for cache in caches_of(engine))
    assert len(engine.pool.copier.staging._buffers) == 2


def test_a_file_that_changed_is_not_read(device, tmp_path):
    model = resident(device=device)
    stream(model, device, 2, tmp_path)
    with torch.no_grad():
        model(*choose(0, 1, device=device, model=model))
        file = Path(tmp_path / "0.bin")
        file.write_bytes(file.read_bytes() + b"more")
        with pytest.raises(OffloadError, match=r"0\.bin.*was changed since"):
            model(*choose(2, 3, device=device, model=model))


def test_written_values_of_experts_in_files_are_read_from_memory(device, tmp_path):
    model, other = resident(device=device), resident(device=device)
    call = choose(0, 1, device=device, model=model)
    weight = other.layers[0].experts.gate_up_proj
    weight.data = weight.data.flip(0)
    with torch.no_grad():
        expected = other(*call)
        stream(model, device, 2, tmp_path)
        model(*call)
        model.layers[0].experts.gate_up_proj.data.copy_(weight.data)
        assert torch.equal(model(*call), expected)


def test_a_weight_in_another_dtype_is_streamed_whole_from_then_on(device):
    """As when a weight is exchanged for one that is quantized with other settings."""
    model, other = resident(mode="nf4", device=device), resident(mode="nf4-dq", device=device)
    call = choose(0, 1, device=device, model=model)
    group = group_of("0", [leaf_of(model, 0)], device)
    group.cached = 2
    with torch.no_grad():
        expected = other(*call)
        engine = Engine(model, [group], device, 1)
        model(*call)
        for name in model.layers[0].experts.quantized_experts.weights:
            model.layers[0].experts._parameters[name] = other.layers[0].experts._parameters[name].cpu()
        assert torch.equal(model(*call), expected)
        assert not caches_of(engine)


@pytest.mark.cuda
@pytest.mark.parametrize("late", ["copies", "computation"])
@pytest.mark.parametrize("cached", [2, 3])
@pytest.mark.parametrize("by", ["gpu", "host"])
def test_experts_wait_for_their_copies_and_copies_for_experts(late, cached, by, monkeypatch):
    device = torch.device("cuda", 0)
    if by == "host":
        monkeypatch.setattr(f"{GPU_BOOK}.suits", lambda *_: False)
    model = resident("gpt_oss", "nf4-dq", device, 3, torch.bfloat16)
    calls = [
        tuple(t.bfloat16() if t.is_floating_point() else t for t in choose(e, (e + 2) % 5, device=device, model=model))
        for e in range(5)
    ]
    with torch.no_grad():
        expected = [model(*call) for call in calls]
        engine = stream(model, device, cached)
        for number in [*range(5)] * 3:
            if late == "copies":
                with torch.cuda.stream(engine.pool.copier.stream):
                    torch.cuda._sleep(20_000_000)
            own = torch.cuda.Stream() if number % 2 else torch.cuda.current_stream()
            own.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(own):
                out = model(*calls[number])
                if late == "computation":
                    torch.cuda._sleep(20_000_000)
                    again = model(*calls[number])
                    torch.cuda._sleep(20_000_000)
            model(*calls[(number + 1) % 5])  # overwrites what the other stream may not have read
            torch.cuda.synchronize()
            assert torch.equal(out, expected[number])
            if late == "computation":
                assert torch.equal(again, expected[number])


@pytest.mark.cuda
def test_experts_are_copied_from_memory_that_cannot_be_pinned(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr("bigload.hardware.pinned._pin", lambda *_: None)
    model = resident("gpt_oss", "nf4-dq", device)
    calls = [choose(e, (e + 1) % 5, device=device, model=model) for e in range(5)]
    with torch.no_grad():
        expected = [model(*call) for call in calls]
        engine = stream(model, device, 2)
        (cache,) = caches_of(engine)
        assert isinstance(cache._book, HostBook)
        for call, right in [*zip(calls, expected, strict=True)] * 3:
            assert torch.equal(model(*call), right)


def test_one_expert_is_enough():
    from bigload.offload.on_device.expert_cache import _pairs_that_choose

    assert _pairs_that_choose(0, 1) == 1
    assert _pairs_that_choose(1, 1) > 10**9
    assert 8 < _pairs_that_choose(8, 128) < 12


@pytest.mark.cuda
def test_a_graph_is_refused_and_without_one_it_runs():
    device = torch.device("cuda", 0)
    model = resident("qwen3", "nf4", device)
    call = choose(0, 1, device=device, model=model)
    with torch.no_grad():
        expected = model(*call)
        stream(model, device, 2)
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(OffloadError, match="which no CUDA graph can capture"), torch.cuda.graph(graph):
            model(*call)
        torch.cuda.synchronize()
        assert torch.equal(model(*call), expected)


@pytest.mark.cuda
def test_memory_stays_what_it_was():
    device = torch.device("cuda", 0)
    model = resident("qwen3", "nf4", device, 3)
    calls = [choose(e, (e + 1) % 5, device=device, model=model) for e in range(5)]
    stream(model, device, 2)
    with torch.no_grad():
        for call in calls:
            model(*call)
        before = torch.cuda.memory_allocated()
        for call in calls * 4:
            model(*call)
        assert torch.cuda.memory_allocated() == before


def test_where_a_gpu_cannot_read_pinned_memory_the_host_keeps_the_book(monkeypatch, logged):
    """As where the system maps none, or Triton cannot compile."""
    model = resident(layers=2)
    calls = list(routings(model, torch.device("cpu")))

    def refused(*_):
        raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")

    monkeypatch.setattr(f"{GPU_BOOK}.suits", lambda *_: True)
    monkeypatch.setattr(f"{GPU_BOOK}.__init__", refused)
    expert_cache._warn_of_host.cache_clear()
    with torch.no_grad():
        expected = [model(*call) for call in calls]
        engine = stream(model, torch.device("cpu"), 2)
        for call, right in zip(calls, expected, strict=True):
            assert torch.equal(model(*call), right)
    assert engine.stats().expert_misses
    assert [record.levelname for record in logged.records] == ["WARNING"]
    assert "the host reads each choice of experts, which takes longer: Pointer argument" in logged.text


def test_counts_of_a_gpu_are_those_of_calls_on_any_stream():
    book = object.__new__(GpuBook)
    book._book, book._expert_nbytes, book._shared_nbytes = torch.tensor([1, 0, 2, 0]), 10, 7
    book._last = SimpleNamespace(synchronize=lambda: book._book.copy_(torch.tensor([3, 4, 5, 0])))
    assert book.count() == (4, 5, 57)


@pytest.mark.cuda
def test_statistics_include_what_another_stream_has_yet_to_run():
    device = torch.device("cuda", 0)
    model = resident(device=device)
    call = choose(0, 1, device=device, model=model)
    engine = stream(model, device, 3)
    side = torch.cuda.Stream()
    with torch.no_grad():
        model(*call)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            model(*call)
    assert (engine.stats().expert_hits, engine.stats().expert_misses) == (2, 2)


def test_the_table_of_a_gpu_is_read_once_a_call():
    """Experts in float32 are dequantized one by one, and each asked three times where it is."""
    read, table = [], [-1, 1, 0]
    places = _PlacesInTable(SimpleNamespace(tolist=lambda: read.append(1) or list(table)))
    assert not read
    assert (places[1], places[2], len(places), sorted(places)) == (1, 0, 2, [1, 2])
    assert 0 not in places
    assert len(read) == 1
    table[:] = [0, 1, -1]
    places.forget()
    assert dict(places) == {0: 0, 1: 1}


@pytest.mark.cuda
@pytest.mark.parametrize("seed", range(6))
def test_a_gpu_keeps_what_was_used_last(seed):
    """Against a list in Python: calls of one expert, so that the order of use is told."""
    device, draw = torch.device("cuda", 0), random.Random(seed)
    model = resident(device=device, dtype=torch.bfloat16)
    engine = stream(model, device, cached := draw.randint(1, EXPERTS))
    (cache,) = caches_of(engine)
    assert isinstance(cache._book, GpuBook)
    used, hits = [], 0
    with torch.no_grad():
        for number in range(60):
            expert = draw.randrange(EXPERTS)
            x, ids, weights = choose(expert, device=device, model=model)
            model(x.bfloat16(), ids, weights.bfloat16())
            hits += expert in used
            used = [*(each for each in used if each != expert), expert][-cached:]
            assert sorted(cache._book.places) == sorted(used)
            assert engine.stats().expert_hits == hits
            assert engine.stats().expert_misses == number + 1 - hits


@pytest.mark.cuda
def test_a_gpu_brings_more_experts_than_one_program_compares():
    device = torch.device("cuda", 0)
    layer = made("qwen3", 72, dtype=torch.bfloat16, device=device)
    model = Model([layer])
    pack(model, "nf4", torch.bfloat16)
    model.requires_grad_(False)
    calls = [routed(tokens, 8, layer.experts, torch.bfloat16, seed=tokens, device=device) for tokens in (1, 3, 6, 8, 5)]
    calls = [(x, ids % 40, weights) for x, ids, weights in calls]
    with torch.no_grad():
        expected = [model(*call) for call in calls]
        engine = stream(model, device, 40)
        (cache,) = caches_of(engine)
        assert isinstance(cache._book, GpuBook)
        for number in [*range(len(calls))] * 3:
            assert torch.equal(model(*calls[number]), expected[number])
            assert set(calls[number][1].flatten().tolist()) <= set(cache._book.places)
    assert engine.stats().fetches == 0
