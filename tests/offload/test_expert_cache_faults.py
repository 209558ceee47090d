"""Experts that stay on the device, when copies and computations are late, threads train, and memory is short."""

import threading
import time

import pytest
import torch
from checkpoints import empty
from comparisons import outputs
from experts import made, pack, routed
from mixtures import MIXTURES, TOKENS, config, mixture
from streaming import engines_of, group_of, poison
from torch import nn

from bigload import BnbQuantizationConfig, OffloadConfig, PlacementError, load_and_quantize_model
from bigload.offload.engine import Engine
from bigload.offload.leaves import Leaf
from bigload.offload.on_device import expert_cache, slots
from bigload.offload.on_device.expert_copies import ExpertCopies
from bigload.offload.on_device.slots import SlotCopier

EXPERTS = 6


class Layers(nn.Module):
    """Layers of experts, each with choices of its own."""

    def __init__(self, count, device, kind="gpt_oss"):
        super().__init__()
        self.experts = nn.ModuleList(made(kind, EXPERTS, seed=n, device=device).experts for n in range(count))

    def forward(self, x, ids, weights):
        for layer, chosen in zip(self.experts, ids, strict=True):
            x = x + layer(x, chosen, weights)
        return x


def resident(device, layers=2, kind="gpt_oss"):
    model = Layers(layers, device, kind)
    pack(model, "nf4", torch.float32)
    return model.requires_grad_(False)


def stream(model, device, cached, slots=1):
    groups = []
    for number, module in enumerate(model.experts):
        group = group_of(str(number), [Leaf(f"experts.{number}", module, module.quantized_experts.weights)], device)
        poison(group)
        group.cached = cached
        groups.append(group)
    return Engine(model, groups, device, slots)


def calls_of(model, device, tokens=4):
    """One expert for all tokens and layers, each token another one, and each layer others."""
    module = model.experts[0]
    x, _, weights = routed(tokens, 1, module, device=device)
    same = torch.full((tokens, 1), 2, device=device)
    each = torch.arange(tokens, device=device).view(-1, 1)
    alone = [torch.full((1, 1), n, device=device) for n in (0, 3)]
    count = len(model.experts)
    yield x, [same] * count, weights
    yield x, [each] * count, weights
    yield x, [(each + n) % EXPERTS for n in range(count)], weights
    yield x[:1], [alone[n % 2] for n in range(count)], weights[:1]
    yield x[:1], [alone[(n + 1) % 2] for n in range(count)], weights[:1]


def in_threads(count, work):
    failed = []

    def guarded(number):
        try:
            work(number)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "they wait for each other"
    assert not failed


@pytest.mark.parametrize("late", ["copies", "computation"])
@pytest.mark.parametrize("cached", [1, 2])
def test_threads_that_are_late_do_not_overwrite_what_others_compute_with(late, cached, device, monkeypatch):
    model = resident(device)
    calls = list(calls_of(model, device))
    with torch.no_grad():
        expected = [model(*call) for call in calls]
    engine = stream(model, device, cached)
    random = torch.Generator().manual_seed(0)

    def delayed(cls, name, *, before):
        own = getattr(cls, name)

        def slow(*given):
            if before:
                time.sleep(2e-3 * torch.rand((), generator=random).item())
            out = own(*given)
            if not before:
                time.sleep(2e-3 * torch.rand((), generator=random).item())
            return out

        monkeypatch.setattr(cls, name, slow)

    if late == "copies":
        delayed(ExpertCopies, "copy", before=False)  # the table is there, what it names is not used yet
        delayed(SlotCopier, "copy_some", before=True)
    else:
        delayed(type(model.experts[0]), "_apply_gate", before=True)

    def work(first):
        own = torch.cuda.Stream() if device.type == "cuda" else None
        with torch.no_grad(), torch.cuda.stream(own):
            for turn in range(8):
                number = (first + turn) % len(calls)
                assert torch.equal(model(*calls[number]), expected[number]), (first, turn)

    if device.type == "cuda":
        torch.cuda.synchronize()
    in_threads(3, work)
    assert engine.stats().expert_misses


@pytest.mark.parametrize("cached", [1, EXPERTS])
def test_threads_that_train_around_one_cache_do_not_wait_for_each_other(cached, device):
    """On a GPU autograd has one thread for the backwards of all."""
    model = resident(device)
    calls = list(calls_of(model, device))

    def gradients(number):
        x, ids, weights = calls[number]
        given = x.clone().requires_grad_(), weights.clone().requires_grad_()
        out = torch.utils.checkpoint.checkpoint(model, given[0], ids, given[1], use_reentrant=False)
        return torch.autograd.grad(out.square().sum(), given)

    expected = [gradients(number) for number in range(len(calls))]
    stream(model, device, cached)

    def work(first):
        for turn in range(6):
            number = (first + turn) % len(calls)
            found = gradients(number)
            assert all(torch.equal(one, other) for one, other in zip(found, expected[number], strict=True))

    in_threads(3, work)


def test_a_slot_that_has_no_room_is_an_error_and_the_next_forward_is_right(device, monkeypatch):
    """More experts than the cache holds pass through a slot; where another call uses it, a further one is made."""
    model = resident(device, kind="nemotron")
    x, _, weights = routed(3, 1, model.experts[0], device=device)
    call = x, [torch.arange(3, device=device).view(-1, 1)] * 2, weights
    with torch.no_grad():
        expected = model(*call)
        engine = stream(model, device, 1)

        def full(*_):
            raise torch.OutOfMemoryError("no room")

        def again(*_):
            model(*call)

        hook = model.experts[0].act_fn.register_forward_pre_hook(again)
        with monkeypatch.context() as patch:
            patch.setattr(type(engine.pool.copier), "make_slot", full)
            with pytest.raises(torch.OutOfMemoryError):
                model(*call)
        hook.remove()
        assert not any(slot.users for slot in engine.pool.slots)
        assert torch.equal(model(*call), expected)


@pytest.fixture
def room(monkeypatch):
    """Return what limits the memory that the slots and caches of a load may take together."""
    own = slots.allocate

    def limited(nbytes):
        left = [nbytes]

        def allocate(shape, dtype, device):
            left[0] -= shape[0]
            if left[0] < 0:
                raise torch.OutOfMemoryError("no room")
            return own(shape, dtype, device)

        monkeypatch.setattr(slots, "allocate", allocate)
        monkeypatch.setattr(expert_cache, "allocate", allocate)

    return limited


@pytest.mark.usefixtures("small_parts_stream")
def test_a_load_that_finds_no_room_for_the_cache_says_so_and_what_it_names_helps(device, tmp_path, room):
    fields = {"num_hidden_layers": 3}
    mixture("qwen3_moe", **fields).save_pretrained(tmp_path / "source")
    asked = BnbQuantizationConfig.from_mode("nf4", torch_dtype="fp32", bnb_4bit_compute_dtype="fp32")
    away = "cpu" if device.type == "cuda" else "disk"
    device_map = {"": device} | {f"model.layers.{n}.mlp.experts": away for n in range(3)}
    model = empty(lambda: MIXTURES["qwen3_moe"][0](config("qwen3_moe", **fields)))

    def load(how):
        return load_and_quantize_model(
            model, asked, tmp_path / "source", device_map=device_map, offload=how, offload_folder=tmp_path / "off"
        ).eval()

    room(2**40)
    plan = load(OffloadConfig(expert_cache=0.5)).offload.plan
    needed = next(account for account in plan.accounts if account.place == device)
    model = empty(lambda: MIXTURES["qwen3_moe"][0](config("qwen3_moe", **fields)))
    room(needed.ring + needed.cache * 3 // 4)
    with pytest.raises(PlacementError, match=r"slots and caches of offloaded weights: no room; free memory there, or"):
        load(OffloadConfig(expert_cache=0.5))
    assert all(parameter.is_meta for parameter in model.parameters())
    for how, freed in (
        (OffloadConfig(expert_cache=0.25), 0),
        (OffloadConfig(expert_cache=0.5, slots=1), 0),
        (OffloadConfig(expert_cache=0.5), needed.cache),
    ):
        model = empty(lambda: MIXTURES["qwen3_moe"][0](config("qwen3_moe", **fields)))
        room(needed.ring + needed.cache * 3 // 4 + freed)
        loaded = load(how)
        assert outputs(loaded, TOKENS.to(device)).isfinite().all()
        assert engines_of(loaded)


@pytest.mark.cuda
def test_a_cache_that_is_dropped_is_not_overwritten_while_a_stream_computes_with_it():
    """As when a weight is exchanged for one of another format meanwhile."""
    device = torch.device("cuda", 0)
    model = resident(device, 1)
    x, _, weights = routed(1, 1, model.experts[0], device=device)
    call = x, [torch.zeros(1, 1, dtype=torch.int64, device=device)], weights
    with torch.no_grad():
        expected = model(*call)
        engine = stream(model, device, 2)
        model(*call)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000_000)
            out = model(*call)
        (cache,) = engine.pool.caches._caches.values()
        nbytes = cache._book._memory.whole.nbytes
        with engine.pool.lock:
            engine.pool.caches.drop(engine.groups[0])
        del cache
        others = [torch.full((nbytes,), 0xFF, dtype=torch.uint8, device=device) for _ in range(4)]
        torch.cuda.synchronize()
        assert others
        assert torch.equal(out, expected)


def test_memory_that_is_freed_waits_for_calls_that_came_since_the_copies_ended(device, monkeypatch):
    """Of another thread, between the two steps of remove()."""
    model = resident(device, 1)
    x, _, weights = routed(1, 1, model.experts[0], device=device)
    call = x, [torch.zeros(1, 1, dtype=torch.int64, device=device)], weights
    with torch.no_grad():
        expected = model(*call)
        engine = stream(model, device, 2)
        model(*call)
        (cache,) = engine.pool.caches._caches.values()
        nbytes, discard, discarded, found = cache._book._memory.whole.nbytes, cache._book.discard, [], []
        monkeypatch.setattr(cache._book, "discard", lambda: discarded.append(discard()))
        finish, side = engine.pool.copier.finish, torch.cuda.Stream() if device.type == "cuda" else None

        def finish_before_a_call():
            finish()
            with torch.cuda.stream(side):
                if side is not None:
                    torch.cuda._sleep(200_000_000)
                found.append(model(*call))

        monkeypatch.setattr(engine.pool.copier, "finish", finish_before_a_call)
        with engine.pool.lock:
            engine.pool.free_all()
        others = [torch.full((nbytes,), 0xFF, dtype=torch.uint8, device=device) for _ in range(4)]
        if side is not None:
            torch.cuda.synchronize()
        assert others
        assert torch.equal(*found, expected)
        assert len(discarded) == 1


@pytest.mark.cuda
@pytest.mark.usefixtures("small_parts_stream")
def test_where_no_memory_can_be_pinned_the_bits_are_the_same(tmp_path, monkeypatch):
    """Neither the weights at rest, nor the table of what is where, nor what copies pass through."""

    def pageable(nbytes, at_least=None):
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    fields = {"num_hidden_layers": 3}
    mixture("gpt_oss", **fields).save_pretrained(tmp_path)
    build = empty(lambda: MIXTURES["gpt_oss"][0](config("gpt_oss", **fields)))
    whole = load_and_quantize_model(build, "nf4", tmp_path, device_map={"": 0}).eval()
    monkeypatch.setattr("bigload.hardware.pinned._pin", lambda *_: None)
    monkeypatch.setattr("bigload.offload.files.pinned_memory", pageable)
    monkeypatch.setattr("bigload.offload.on_device.expert_copies.pinned_memory", pageable)
    device_map = {"": 0} | {f"model.layers.{n}.mlp.experts": "cpu" for n in range(3)}
    build = empty(lambda: MIXTURES["gpt_oss"][0](config("gpt_oss", **fields)))
    part = load_and_quantize_model(
        build, "nf4", tmp_path, device_map=device_map, offload=OffloadConfig(expert_cache=0.5)
    ).eval()
    assert not any(group.store.is_pinned for engine in engines_of(part) for group in engine.groups)
    options = {"max_new_tokens": 16, "do_sample": False}
    for prompt in (TOKENS[:1, :2].cuda(), TOKENS[:1].cuda()):
        assert torch.equal(part.generate(prompt, **options), whole.generate(prompt, **options))
    assert part.offload.stats().expert_hits


@pytest.mark.multi_gpu
@pytest.mark.parametrize("cached", [0, 2, EXPERTS])
def test_a_cache_on_another_gpu_than_the_current_one(cached):
    device = torch.device("cuda", 1)
    model = resident(device)
    calls = list(calls_of(model, device))
    with torch.no_grad(), torch.cuda.device(0):
        expected = [model(*call) for call in calls]
        engine = stream(model, device, cached)
        for number in [*range(len(calls))] * 3:
            assert torch.equal(model(*calls[number]), expected[number])
        assert {slot.memory.device for slot in engine.pool.slots} == {device}
        assert torch.cuda.current_device() == 0
