"""Offloaded blocks in captured steps: the graph copies them into fixed slots, one after the other."""

import threading

import pytest
import torch
from checkpoints import empty, save_checkpoint
from models import llama
from static_caches import given
from streaming import group_of, poison
from transformers import StaticCache

from bigload import BnbQuantizationConfig, OffloadError, capture_decode, load_and_quantize_model
from bigload.hardware.pinned import HostGroup
from bigload.offload.device_hooks import detach
from bigload.offload.engine import Engine
from bigload.offload.leaves import Leaf
from bigload.offload.on_device.captured_copies import CapturedCopies

LAYERS = 5


def build():
    return llama(num_hidden_layers=LAYERS)


@pytest.fixture
def loaded(tmp_path, device, small_parts_stream):
    folder = save_checkpoint(build().bfloat16(), tmp_path)

    def load(mode="nf4"):
        return load_and_quantize_model(empty(build), mode, folder, device_map=device).eval().requires_grad_(False)

    return load


def stream(model, device, blocks, slots, is_poisoned=True):
    """Offload the layers of some blocks into host memory; poison it, and the slots."""
    detach(model)  # the load's hooks ask a layer of the model where it is
    groups = []
    for block in blocks:
        path = f"model.layers.{block}"
        leaves = [
            Leaf(f"{path}.{name}", module, ("weight",))
            for name, module in model.model.layers[block].named_modules()
            if name.endswith("_proj")
        ]
        groups.append(group_of(path, leaves, device))
        if is_poisoned:
            poison(groups[-1])
    vars(model)["engine"] = engine = Engine(model, groups, device, slots)
    for slot in engine.pool.slots:
        slot.memory.fill_(0xFF)
    return engine


@torch.no_grad()
def decoded(model, steps=6, between=lambda step: None):
    device = model.lm_head.weight.device
    cache = StaticCache(config=model.config, max_cache_len=16)
    found = [model(torch.arange(3, 6, device=device).view(1, 3), **given(model, cache)).logits[:, -1:]]
    for step in range(steps):
        between(step)
        found.append(model(torch.full((1, 1), 7 * step % 50, device=device), **given(model, cache)).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("slots", [1, 2, 3, 7])
@pytest.mark.parametrize("blocks", [(1, 3), range(LAYERS), (0,), (4, 2, 0)], ids=str)
def test_captured_steps_compute_what_resident_ones_do(blocks, slots, loaded, device, captures):
    model = loaded()
    expected = decoded(model)
    engine = stream(model, device, blocks, slots)
    capture = capture_decode(model)
    assert torch.equal(decoded(model), expected)
    assert (capture.stats().replayed, capture.stats().captures, capture.stats().reasons) == (5, 1, ())
    fetches = engine.stats().fetches

    def overwrite(step):  # what is on the device is what the graph has copied
        for slot in engine.pool.slots if step % 2 else ():
            if slot.store is None:
                slot.memory.fill_(0xFF)

    assert torch.equal(decoded(model, between=overwrite), expected)
    assert capture.stats().replayed == 11
    assert engine.stats().fetches > fetches or len(blocks) <= slots
    assert len(engine.pool.slots) <= slots
    assert all(not slot.users for slot in engine.pool.slots)
    capture.remove()
    assert torch.equal(decoded(model), expected)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_int8_blocks_are_captured_where_no_layer_waits_for_the_host(threshold, loaded, device, captures):
    model = loaded(BnbQuantizationConfig(load_in_8bit=True, llm_int8_threshold=threshold))
    model.model.layers[1].input_layernorm.weight.data[3] = 100.0  # makes outliers
    expected = decoded(model)
    stream(model, device, (1, 3), 1, is_poisoned=False)
    capture = capture_decode(model)
    assert torch.equal(decoded(model), expected)
    assert capture.stats().replayed == (5 if threshold == 0.0 or device.type == "cuda" else 0)


@pytest.mark.parametrize("mode", ["nf4-dq", "none"])
def test_other_modes(mode, loaded, device, captures):
    plain = build().bfloat16().to(device).eval().requires_grad_(False)
    model = plain if mode == "none" else loaded(mode)
    expected = decoded(model)
    stream(model, device, range(1, LAYERS), 2)
    capture = capture_decode(model)
    assert torch.equal(decoded(model), expected)
    assert capture.stats().replayed == 5


def test_prompts_and_captured_steps_take_turns(loaded, device, captures):
    model = loaded()
    prompts = [torch.arange(number, number + 9, device=device).view(1, 9) for number in (1, 20)]
    with torch.no_grad():
        expected, right = [model(prompt).logits for prompt in prompts], decoded(model)
        engine = stream(model, device, range(LAYERS), 2)
        capture = capture_decode(model)

        def prompt(step):
            assert torch.equal(model(prompts[step % 2]).logits, expected[step % 2])

        for _ in range(2):
            assert torch.equal(decoded(model, between=prompt), right)
        with model.engine.materialize(model.model.layers[2]):
            assert torch.equal(decoded(model), right)
        assert torch.equal(decoded(model), right)
    assert capture.stats().replayed > 11
    assert len(engine.pool.slots) == 2


def test_writes_to_weights_at_rest_count_in_the_next_step(loaded, device, captures):
    model = loaded()
    stream(model, device, range(LAYERS), 2, is_poisoned=False)
    capture = capture_decode(model)
    before = decoded(model)

    @torch.no_grad()
    def exchange(step):
        if step == 3:
            for block in (0, 2):  # the first is on the device already
                layers = model.model.layers
                layers[block].mlp.up_proj.weight.copy_(layers[4].mlp.up_proj.weight)

    found = decoded(model, between=exchange)
    assert torch.equal(found[:, :4], before[:, :4])
    assert not torch.equal(found[:, 4:], before[:, 4:])
    written = decoded(model)
    capture.remove()
    assert torch.equal(written, decoded(model))


def test_blocks_that_come_back_to_the_device_are_captured_as_resident_ones(loaded, device, captures):
    model = loaded()
    expected = decoded(model)
    engine = stream(model, device, (1, 2, 3), 2)
    capture = capture_decode(model)
    assert torch.equal(decoded(model), expected)
    engine.remove()
    assert torch.equal(decoded(model), expected)
    assert (capture.stats().captures, capture.stats().replayed) == (2, 10)


def test_a_second_kind_of_step_that_uses_other_blocks_is_not_captured(loaded, device, captures, warned):
    model = loaded()
    stream(model, device, range(LAYERS), 2)
    capture = capture_decode(model)
    first = decoded(model)
    model.model.config.num_hidden_layers = 3  # the forward of the model runs so many
    fewer = decoded(model)
    model.model.config.num_hidden_layers = LAYERS
    assert not torch.equal(first, fewer)
    assert torch.equal(decoded(model), first)
    assert capture.stats().replayed == 11
    assert "in another order" in warned()[-1]


WAYS = {
    "others": (3, LAYERS, "offloaded blocks ran in another order than in the step before"),
    "fewer": (LAYERS, 3, "offloaded blocks were left out that ran in the step before"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_uses_other_blocks_than_the_one_before_is_not_captured(way, loaded, device, captures, warned):
    first, later, reason = WAYS[way]
    model = loaded()

    def run():
        model.model.config.num_hidden_layers = LAYERS  # for which the cache has room
        return decoded(model, between=change)

    def change(step):
        model.model.config.num_hidden_layers = later if step == 1 else first  # the second step is captured

    expected = run()
    stream(model, device, range(LAYERS), 2)
    with capture_decode(model) as capture:
        assert torch.equal(run(), expected)
        assert reason in " ".join(warned())
        assert capture.stats().uncaptured >= 2


def test_a_block_that_runs_more_layers_than_in_the_step_before_is_not_captured(loaded, device, captures, warned):
    model, again = loaded(), []
    mlp = model.model.layers[1].mlp
    own = mlp.forward
    mlp.forward = lambda x: own(own(x)) if again else own(x)

    def change(step):
        again[:] = [True] if step == 1 else []

    expected = decoded(model, between=change)
    stream(model, device, range(LAYERS), 2)
    with capture_decode(model):
        assert torch.equal(decoded(model, between=change), expected)
    assert "an offloaded block ran more layers than in the step before" in " ".join(warned())


def test_a_block_that_runs_twice_is_not_captured_and_said(loaded, device, captures, warned):
    model = loaded()
    model.model.layers[3].mlp = model.model.layers[1].mlp
    stream(model, device, (0, 1, 2), 2)
    expected = decoded(model)
    capture = capture_decode(model)
    assert torch.equal(decoded(model), expected)
    assert capture.stats().replayed == 0
    assert "comes back to an offloaded block" in warned()[-1]


def test_threads_that_use_offloaded_weights_take_turns(loaded, device, captures):
    model = loaded()
    expected = decoded(model, steps=10)
    stream(model, device, range(LAYERS), 2)
    capture, found = capture_decode(model), {}

    def run(number):
        found[number] = decoded(model, steps=10)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], expected) for number in range(3))
    assert capture.stats().replayed + capture.stats().uncaptured == 30


def test_no_step_is_captured_while_a_call_uses_a_slot(loaded, device, captures):
    model = loaded()
    expected = decoded(model)
    engine = stream(model, device, range(LAYERS), 2)
    capture = capture_decode(model)
    with engine.materialize(model.model.layers[2]):
        assert torch.equal(decoded(model), expected)
    assert (capture.stats().captures, capture.stats().replayed, capture.stats().uncaptured) == (0, 0, 6)
    assert torch.equal(decoded(model), expected)
    assert (capture.stats().captures, capture.stats().replayed) == (1, 5)  # the slots are others now
    assert not capture.stats().reasons


def test_an_offloaded_weight_that_cannot_be_used_is_the_error_of_the_step(loaded, device, captures):
    model = loaded()
    expected = decoded(model)
    stream(model, device, range(LAYERS), 2)
    layer = model.model.layers[2].mlp.up_proj
    weight = layer.weight
    with capture_decode(model):
        with pytest.raises(OffloadError, match="has no parameter 'weight' to stream"):
            decoded(model, between=lambda step: delattr(layer, "weight"))
        layer.weight = weight
        assert torch.equal(decoded(model), expected)


def test_ctrl_c_and_errors_while_it_captures(loaded, device, captures, warned):
    model = loaded()
    expected = decoded(model)
    engine = stream(model, device, range(LAYERS), 2)
    capture = capture_decode(model)
    for error in (KeyboardInterrupt(), ValueError("of the step")):
        own = CapturedCopies.leave
        with pytest.MonkeyPatch.context() as patch:

            def leave(self, own=own, error=error):
                own(self)
                if self._place == 2:
                    raise error

            patch.setattr(CapturedCopies, "leave", leave)
            if isinstance(error, KeyboardInterrupt):
                with pytest.raises(KeyboardInterrupt):
                    decoded(model)
            else:
                assert torch.equal(decoded(model), expected)
        assert engine.pool.captured is None
        assert all(not slot.users for slot in engine.pool.slots)
        capture.release()
        assert torch.equal(decoded(model), expected)
        assert capture.stats().captures >= 1


def test_what_is_captured_goes_one_way(loaded, device):
    model = loaded()
    engine = stream(model, device, range(3), 2)
    first, second, third = engine.groups
    with pytest.raises(OffloadError, match="comes back"):
        CapturedCopies(engine.pool.copier, [first, second, first], engine.pool.slots)
    copies = CapturedCopies(engine.pool.copier, [first, first, second, third], engine.pool.slots)
    assert copies.copied() == [first.store.layout.nbytes, third.store.layout.nbytes]
    assert [group for _, group in copies.first()] == [first, second]
    assert copies.is_same(engine.pool.slots)
    assert not copies.is_same(engine.pool.slots[1:])


@pytest.mark.cuda
def test_a_loaded_model_with_offloaded_blocks_generates_the_same_tokens_captured(tmp_path, small_parts_stream):
    device = torch.device("cuda", 0)
    folder = save_checkpoint(build().bfloat16(), tmp_path)
    away = {f"model.layers.{block}": "cpu" for block in (1, 3, 4)}
    model = load_and_quantize_model(empty(build), "nf4", folder, device_map={"": device, **away}).eval()
    tokens = torch.arange(3, 9, device=device).view(1, 6)
    how = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    how |= {"cache_implementation": "static", "disable_compile": True}
    expected = model.generate(tokens, **how)
    before = torch.cuda.memory_allocated()
    with capture_decode(model) as capture:
        for _ in range(3):
            assert torch.equal(model.generate(tokens, **how), expected)
        assert capture.stats().replayed > 60
        assert capture.stats().reasons == ()
    torch.cuda.synchronize()
    # cuBLAS keeps a workspace for the stream on which graphs are captured.
    assert torch.cuda.memory_allocated() <= before + 34 * 2**20


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("late", ["copies", "computation"])
def test_copies_of_a_graph_wait_for_what_reads_the_slots_and_are_waited_for(
    late, device, loaded, captures, monkeypatch
):
    """With a GPU that is slow on one of the two branches, values are right only if events order them."""
    model = loaded()
    expected = decoded(model, steps=12)
    engine = stream(model, device, range(LAYERS), 2)
    assert all(isinstance(group.store, HostGroup) for group in engine.groups)
    own = CapturedCopies._pass_on

    def slow(self):
        if not self._is_passed_on:
            with torch.cuda.stream(self._stream if late == "copies" and self._ready else torch.cuda.current_stream()):
                torch.cuda._sleep(2_000_000)
        own(self)

    monkeypatch.setattr(CapturedCopies, "_pass_on", slow)
    capture = capture_decode(model)
    for _ in range(2):
        assert torch.equal(decoded(model, steps=12), expected)
    assert capture.stats().replayed > 20
