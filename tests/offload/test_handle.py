"""Models loaded with part of their weights off the device that computes: the outputs are those of the whole on it.

On the CPU the "device" is the CPU too: a plan is changed so that blocks rest in host memory and pass through slots.
"""

import copy
import dataclasses
import gc
import weakref
from functools import partial

import pytest
import torch
from adapters import lora_losses
from checkpoints import PLAIN, empty, save_checkpoint
from comparisons import assert_same_bits, outputs
from models import GPT, TOKENS, llama
from streaming import engines_of, hooks_of
from torch import nn
from torch.utils._pytree import tree_map_only

from bigload import ConfigError, OffloadConfig, OffloadError, PlacementError, load_and_quantize_model, loading
from bigload.checkpoint import pickled
from bigload.pipeline.assembly import Assembly
from bigload.planning import planner
from bigload.planning.placing.accounts import PlacedUnit

pytestmark = pytest.mark.usefixtures("small_parts_stream")

CPU = torch.device("cpu")


@pytest.fixture
def options(device, monkeypatch):
    """Return a function from the names of units to the options that offload them."""

    def offloading(*names):
        if device.type == "cuda":
            return {"device_map": {"": 0} | dict.fromkeys(names, "cpu")}
        place = planner.place_units

        def placed(*given):
            made = place(*given)
            units = tuple(PlacedUnit(one.unit, CPU, CPU) if one.unit.name in names else one for one in made.units)
            assert set(names) <= {one.unit.name for one in units}
            return dataclasses.replace(made, units=units)

        monkeypatch.setattr(planner, "place_units", placed)
        monkeypatch.setattr(planner, "only_device", lambda request: None)
        return {"device_map": "cpu"}

    return offloading


BUILDS = {"gpt": partial(GPT, layers=4), "llama": partial(llama, num_hidden_layers=4)}
BLOCKS = {"gpt": [f"transformer.h.{n}" for n in range(4)], "llama": [f"model.layers.{n}" for n in range(4)]}
FP32 = PLAIN | {"torch_dtype": "fp32"}
EMBEDDING = {"gpt": "transformer.wte", "llama": "model.embed_tokens"}
MODES = ["nf4", "nf4-dq", "fp4", "int8", PLAIN]


def logits(model, device):
    return outputs(model.eval(), TOKENS.to(device))


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode if isinstance(mode, str) else "none")
@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_offloaded_blocks_give_the_same_bits(tmp_path, device, options, kind, mode, slots):
    build = BUILDS[kind]
    folder = save_checkpoint(build().bfloat16(), tmp_path)
    whole = load_and_quantize_model(empty(build), mode, folder, device_map=device)
    names = [BLOCKS[kind][0], BLOCKS[kind][2], BLOCKS[kind][3], EMBEDDING[kind]]
    model = load_and_quantize_model(empty(build), mode, folder, offload=OffloadConfig(slots=slots), **options(*names))
    for _ in range(3):
        assert torch.equal(logits(model, device), logits(whole, device))
    stats = model.offload.stats()
    assert stats.nbytes > 0
    assert stats.slots == slots
    assert model.hf_device_map == whole.hf_device_map
    assert_same_bits(model.state_dict(), whole.state_dict())
    model.offload.remove()
    assert torch.equal(logits(model, device), logits(whole, device))
    assert {parameter.device for parameter in model.parameters()} == {device}


@pytest.mark.parametrize("source", ["own", "pickled"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode if isinstance(mode, str) else "none")
@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_weights_that_come_from_memory_are_streamed(tmp_path, device, options, kind, mode, source):
    """Above all those that are not quantized, which nothing makes anew on their way."""
    build, names = BUILDS[kind], [*BLOCKS[kind], EMBEDDING[kind], "lm_head"]
    full, location = build().bfloat16(), None
    if source == "pickled":
        location = tmp_path / "pickled.bin"
        torch.save(full.state_dict(), location)
    whole, model = (copy.deepcopy(full) if source == "own" else empty(build) for _ in range(2))
    whole = load_and_quantize_model(whole, mode, location, device_map=device)
    model = load_and_quantize_model(model, mode, location, **options(*names))
    for _ in range(2):
        assert torch.equal(logits(model, device), logits(whole, device))
    assert_same_bits(model.state_dict(), whole.state_dict())
    model.offload.remove()
    assert torch.equal(logits(model, device), logits(whole, device))


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_a_models_own_weights_are_freed_when_they_are_loaded(device, options, mode):
    """Its plan stays, and says what it said before."""
    model = GPT(layers=4).bfloat16()
    own = [weakref.ref(parameter) for name, parameter in model.named_parameters() if "c_fc" in name]
    layers = [weakref.ref(module) for name, module in model.named_modules() if "c_fc" in name]
    seen = []

    def plan_of_load(view, request):
        plan = planner.plan_load(view, request)
        seen.append((plan.held_bytes, plan.source_bytes, plan.nbytes, str(plan), plan.device_bytes))
        return plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "plan_load", plan_of_load)
        model = load_and_quantize_model(model, mode, None, **options("transformer.h.1", "transformer.h.2"))
    gc.collect()
    assert own
    assert layers
    assert not any(reference() is not None for reference in (*own, *layers))
    plan = model.offload.plan
    assert [(plan.held_bytes, plan.source_bytes, plan.nbytes, str(plan), plan.device_bytes)] == seen
    assert plan.held_bytes


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
def test_quantized_weights_of_a_pickle_are_freed_when_they_are_loaded(tmp_path, device, options, mode):
    """Of one that is read whole, as files from before torch 1.6 are."""
    whole = load_and_quantize_model(GPT(layers=4).bfloat16(), mode, device_map="cpu")
    torch.save(whole.state_dict(), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    own, held = pickled._described, []

    def described(path, rank, name, value):
        held.append(weakref.ref(value))
        return own(path, rank, name, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pickled, "_described", described)
        model = load_and_quantize_model(
            empty(GPT, layers=4), None, tmp_path / "old.bin", **options("transformer.h.1", "transformer.h.2")
        )
    gc.collect()
    assert model.offload.plan.layers
    assert len(held) > 20
    assert not any(reference() is not None for reference in held)


def test_what_is_offloaded_rests_in_host_memory(tmp_path, device, options):
    folder = save_checkpoint(GPT(layers=4).bfloat16(), tmp_path)
    model = load_and_quantize_model(empty(GPT, layers=4), "nf4", folder, **options("transformer.h.1"))
    block = model.transformer["h"][1]
    assert block.mlp["c_fc"].weight.device == CPU
    assert block.mlp["c_fc"].weight.quant_state.absmax.device == CPU
    assert block.ln_1.weight.device == device
    with model.offload.materialize(block):
        assert block.mlp["c_fc"].weight.device == device


def test_quantized_checkpoint_is_offloaded_as_it_is_stored(tmp_path, device, options):
    from bigload import quantize_checkpoint

    build = BUILDS["gpt"]
    quantize_checkpoint(
        save_checkpoint(build().bfloat16(), tmp_path / "source"),
        tmp_path / "made",
        "nf4",
        model=empty(build),
        device=device,
    )
    whole = load_and_quantize_model(empty(build), None, tmp_path / "made", device_map=device)
    model = load_and_quantize_model(empty(build), None, tmp_path / "made", **options(*BLOCKS["gpt"]))
    assert torch.equal(logits(model, device), logits(whole, device))


def test_tokens_are_generated_as_by_the_whole_model(tmp_path, device, options):
    build = BUILDS["llama"]
    folder = save_checkpoint(build().bfloat16(), tmp_path)
    whole = load_and_quantize_model(empty(build), "nf4", folder, device_map=device).eval()
    model = load_and_quantize_model(empty(build), "nf4", folder, **options(*BLOCKS["llama"])).eval()
    tokens = TOKENS.to(device)
    for more in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
        made = [
            one.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=8,
                do_sample=False,
                pad_token_id=0,
                **more,
            )
            for one in (model, whole)
        ]
        assert torch.equal(*made)


def test_adapters_are_trained_as_on_the_whole_model(tmp_path, device, options):
    pytest.importorskip("peft")
    build = BUILDS["llama"]
    folder = save_checkpoint(build().bfloat16(), tmp_path)
    losses = []
    for options_ in ({"device_map": device}, options(*BLOCKS["llama"][::2])):
        model = load_and_quantize_model(empty(build), "nf4", folder, **options_)
        losses.append(lora_losses(model, TOKENS.to(device), 5))
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_load_that_has_no_room_for_the_slots_leaves_the_model_as_it_was(tmp_path, device, options, monkeypatch):
    folder, model = save_checkpoint(GPT(layers=4), tmp_path), empty(GPT, layers=4)
    given = options("transformer.h.1")

    def failing(*_):
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("bigload.offload.on_device.slots.SlotCopier.make_slot", failing)
        patch.setattr("bigload.offload.on_device.slots.CudaSlotCopier.make_slot", failing)
        with pytest.raises(PlacementError, match="no room on the GPU"):
            load_and_quantize_model(model, "nf4", folder, **given)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert type(model.transformer["h"][1].mlp["c_fc"]) is nn.Linear
    model = load_and_quantize_model(model, "nf4", folder, **given)
    assert logits(model, device).isfinite().all()


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["int8", "nf4"])
def test_blocks_in_fp32_on_the_cpu(tmp_path, mode):
    build = BUILDS["llama"]
    folder = save_checkpoint(build(), tmp_path)
    config = {"llm_int8_enable_fp32_cpu_offload": True, "torch_dtype": "bf16"}
    config |= {"load_in_8bit": True} if mode == "int8" else {"load_in_4bit": True}
    model = load_and_quantize_model(empty(build), config, folder, device_map={"": 0, "model.layers.2": "cpu"})
    block = model.model.layers[2]
    original = torch.nn.Module.state_dict(load_and_quantize_model(empty(build), FP32, folder, device_map="cpu"))
    for name, value in block.state_dict().items():
        assert value.dtype == torch.float32
        assert value.device == CPU
        assert torch.equal(value, original[f"model.layers.2.{name}"])
    held = {id(tensor.untyped_storage()) for tensor in _on_gpu()}
    assert not held & {id(tensor.untyped_storage()) for tensor in (*block.parameters(), *block.buffers())}
    seen = []
    block.register_forward_hook(lambda _, args, kwargs, out: seen.append((args, kwargs, out)), with_kwargs=True)
    found = logits(model, "cuda")
    assert found.dtype == torch.bfloat16
    ((args, kwargs, out),) = seen
    exact = load_and_quantize_model(empty(build), FP32, folder, device_map="cpu").eval()
    args, kwargs = tree_map_only(
        torch.Tensor,
        lambda tensor: tensor.float().cpu() if tensor.is_floating_point() else tensor.cpu(),
        (args, kwargs),
    )
    with torch.no_grad():
        alone = exact.model.layers[2](*args, **(kwargs | {"past_key_values": None}))
    assert torch.equal(out.cpu().to(torch.float32), alone.to(torch.bfloat16).to(torch.float32))
    whole = load_and_quantize_model(empty(build), config, folder, device_map=0)
    wanted = logits(exact, "cpu")
    error, quantized = ((one.float().cpu() - wanted).norm() for one in (found, logits(whole, "cuda")))
    assert error < 1.1 * quantized  # of what a whole model in this mode is off by


def _on_gpu():
    return [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and each.is_cuda]


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_plan_counts_the_slots_that_there_are(tmp_path, options, slots):
    """No more than blocks: of one block, one."""
    build = BUILDS["gpt"]
    folder = save_checkpoint(build().bfloat16(), tmp_path)
    for names in (BLOCKS["gpt"][:1], BLOCKS["gpt"]):
        model = load_and_quantize_model(
            empty(build), "nf4", folder, offload=OffloadConfig(slots=slots), **options(*names)
        )
        planned = {account.place.type: account.ring for account in model.offload.plan.accounts}
        held = sum(slot.memory.nbytes for engine in engines_of(model) for slot in engine.pool.slots)
        assert planned["cuda" if torch.cuda.is_available() else "cpu"] == held
        model.offload.remove()


def test_host_memory_is_that_of_the_bytes_and_each_byte_is_read_once(tmp_path, device, options):
    build = BUILDS["gpt"]
    folder = save_checkpoint(build().bfloat16(), tmp_path)
    whole = load_and_quantize_model(empty(build), "nf4", folder, device_map=device)
    model = load_and_quantize_model(empty(build), "nf4", folder, **options(*BLOCKS["gpt"]))
    assert model.load_report.bytes_read == whole.load_report.bytes_read
    for engine in engines_of(model):
        for group in engine.groups:
            own = sum(tensor.nbytes for tensor in group.store.tensors.values())
            assert own <= len(group.store._mapping) <= own + 256 * len(group.store.tensors)


def test_hooks_of_a_removed_engine_are_off_and_accelerates_never_on(tmp_path, device, options):
    build = BUILDS["gpt"]
    folder = save_checkpoint(build().bfloat16(), tmp_path)
    model = load_and_quantize_model(empty(build), "nf4", folder, **options(*BLOCKS["gpt"]))
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    assert hooks_of(model)
    model.offload.remove()
    assert not any(hooks_of(part) for part in model.children())
    assert not hasattr(model, "offload")


def test_what_is_no_module_cannot_be_materialized(tmp_path, device, options):
    build = BUILDS["gpt"]
    folder = save_checkpoint(build().bfloat16(), tmp_path)
    model = load_and_quantize_model(empty(build), "nf4", folder, **options(*BLOCKS["gpt"]))
    with pytest.raises(ConfigError, match="takes a module of the model, not 'x'"), model.offload.materialize("x"):
        pass


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["nf4", "int8", "none"])
def test_gpu_holds_what_was_planned_and_no_more_however_long_it_generates(tmp_path, mode):

    def build():
        return llama(tied=False, num_hidden_layers=8, hidden_size=512, intermediate_size=2048)

    gpu, config = torch.device("cuda", 0), {"none": PLAIN}.get(mode, mode)
    folder = save_checkpoint(build().bfloat16(), tmp_path)
    tokens = TOKENS.to(gpu)
    gc.collect()
    before = torch.cuda.memory_allocated(gpu)
    away = {f"model.layers.{n}": "cpu" for n in range(0, 8, 2)}
    model = load_and_quantize_model(empty(build), config, folder, device_map={"": 0} | away).eval()
    (planned,) = (account.needed for account in model.offload.plan.accounts if account.place == gpu)
    torch.cuda.reset_peak_memory_stats(gpu)
    held = []
    for count in (2, 64, 64):
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        held.append(torch.cuda.memory_allocated(gpu))
    assert held[1] == held[2]
    assert torch.cuda.max_memory_allocated(gpu) - before <= planned


def test_parameters_that_others_put_into_a_streamed_block_are_brought_to_its_device(monkeypatch):
    from bigload import plan_device_map
    from bigload.offload import handle

    brought = []
    monkeypatch.setattr(handle, "_move", lambda parameter, device: brought.append((parameter, device)))
    model = GPT(layers=2)
    (placed,) = plan_device_map(model, "nf4", device_map={"": 0, "transformer.h.1": "cpu"}).offloaded
    block = model.transformer["h"][1]
    hook = handle.MoveAddedParameters(model, "transformer.h.1", placed.device, handle.leaves_of(model, placed))
    stay = {planned.tensor.name for planned in placed.unit.offloaded}
    others = [p for name, p in block.named_parameters(prefix="transformer.h.1") if name not in stay]
    assert len(stay) == 4
    block.adapter = nn.Linear(4, 4)
    hook(block, ())
    assert [id(p) for p, _ in brought] == [id(p) for p in (*others, *block.adapter.parameters())]
    assert {device for _, device in brought} == {torch.device("cuda", 0)}
    brought.clear()
    with torch.no_grad():
        hook(block, ())  # an inference that goes on has no time for it
        assert not brought
        block.second = nn.Linear(4, 4)  # but looks when anything was added
        hook(block, ())
        assert {id(p) for p in block.second.parameters()} <= {id(p) for p, _ in brought}
        brought.clear()
        block.second.weight = nn.Parameter(torch.ones(4, 4))
        hook(block, ())
        assert id(block.second.weight) in {id(p) for p, _ in brought}
    brought.clear()
    hook(block, ())
    assert brought


def test_offloaded_model_is_saved_and_dequantized_only_when_its_weights_are_back(tmp_path, device, options):
    from bigload import QuantizationError, dequantize_model, save_quantized_model

    folder = save_checkpoint(GPT(layers=4).bfloat16(), tmp_path / "source")
    model = load_and_quantize_model(empty(GPT, layers=4), "nf4", folder, **options("transformer.h.1"))
    expected = logits(model, device)
    save_quantized_model(model, tmp_path / "saved")
    again = load_and_quantize_model(empty(GPT, layers=4), None, tmp_path / "saved", device_map=device)
    assert torch.equal(logits(again, device), expected)
    with pytest.raises(QuantizationError, match=r"offload\.remove\(\)"):
        dequantize_model(model)
    model.offload.remove()
    assert logits(dequantize_model(model), device).isfinite().all()


def test_copies_of_an_offloaded_model_are_refused(tmp_path, device, options):
    folder = save_checkpoint(GPT(layers=4).bfloat16(), tmp_path)
    model = load_and_quantize_model(empty(GPT, layers=4), "nf4", folder, **options("transformer.h.1"))
    with pytest.raises(OffloadError, match=r"remove\(\)"):
        copy.deepcopy(model)
    model.offload.remove()
    assert torch.equal(logits(copy.deepcopy(model), device), logits(model, device))


def test_state_dict_that_is_loaded_counts_at_once(tmp_path, device, options):
    build = BUILDS["gpt"]
    folder = save_checkpoint(build().bfloat16(), tmp_path / "source")
    model = load_and_quantize_model(empty(build), PLAIN, folder, **options(*BLOCKS["gpt"]))
    logits(model, device)
    torch.manual_seed(7)
    other = load_and_quantize_model(build().bfloat16(), PLAIN, device_map=device)
    model.load_state_dict(other.state_dict())
    for _ in range(2):
        assert torch.equal(logits(model, device), logits(other, device))


def test_a_second_load_into_an_offloaded_model_is_refused_until_its_weights_are_back(tmp_path, device, options):
    build = BUILDS["gpt"]
    folder = save_checkpoint(build().bfloat16(), tmp_path / "source")
    given = options(*BLOCKS["gpt"])
    model = load_and_quantize_model(empty(build), PLAIN, folder, **given)
    expected = logits(model, device)
    with pytest.raises(ConfigError, match=r"offload\.remove\(\)"):
        load_and_quantize_model(model, PLAIN, folder, **given)
    model.offload.remove()
    assert not hasattr(model, "offload")
    model = load_and_quantize_model(model, PLAIN, folder, **given)
    assert torch.equal(logits(model, device), expected)


@pytest.mark.parametrize("call", [1, 3, 6])
def test_interrupted_while_leaves_are_taken_over_the_model_is_as_it_was(tmp_path, device, options, monkeypatch, call):
    import itertools

    from bigload.offload import engine

    build, own, calls = BUILDS["gpt"], engine.StreamedForward, itertools.count(1)
    folder = save_checkpoint(build().bfloat16(), tmp_path / "source")
    given, model = options(*BLOCKS["gpt"]), empty(build)

    def interrupted(*arguments):
        if next(calls) == call:
            raise KeyboardInterrupt
        return own(*arguments)

    monkeypatch.setattr(engine, "StreamedForward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_and_quantize_model(model, PLAIN, folder, **given)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())
    model = load_and_quantize_model(model, PLAIN, folder, **given)
    assert logits(model, device).isfinite().all()


def test_interrupted_after_the_engine_was_made_the_model_streams_nothing(tmp_path, device, options, monkeypatch):
    """The report is the last that a load puts onto a model."""
    build = BUILDS["gpt"]
    folder = save_checkpoint(build().bfloat16(), tmp_path)
    given, model, seen = options(*BLOCKS["gpt"]), empty(build), []

    def interrupted(*arguments, **more):
        seen.append(model.offload)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loading, "LoadReport", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_and_quantize_model(model, PLAIN, folder, **given)
    assert len(seen) == 1
    assert all(parameter.is_meta for parameter in model.parameters())
    assert "offload" not in vars(model)
    assert not hooks_of(model)
    model = load_and_quantize_model(model, PLAIN, folder, **given)
    assert logits(model, device).isfinite().all()


def test_int8_training_leaves_nothing_off_the_device(tmp_path, device, options):
    folder = save_checkpoint(GPT(layers=4), tmp_path / "source")
    with pytest.raises(ConfigError, match="int8-training"):
        load_and_quantize_model(empty(GPT, layers=4), "int8-training", folder, **options(BLOCKS["gpt"][1]))


def test_guard_of_shared_weights_sees_the_layers_that_the_load_has_made(tmp_path, options, monkeypatch):
    """Not those that they replaced: a weight of theirs that another module holds too must not be streamed."""
    folder = save_checkpoint(GPT(layers=4).bfloat16(), tmp_path)
    own, other = Assembly.commit, nn.Module()

    def sharing(assembly, then):
        def shared(model):
            other.weight = model.transformer["h"][1].mlp["c_fc"].weight
            model.other = other
            then(model)

        return own(assembly, shared)

    monkeypatch.setattr(Assembly, "commit", sharing)
    model = empty(GPT, layers=4)
    with pytest.raises(OffloadError, match=r"'other\.weight' is offloaded as another module's"):
        load_and_quantize_model(model, "nf4", folder, **options("transformer.h.1"))
    assert model.transformer["h"][1].mlp["c_fc"].weight.is_meta


def test_handle_shows_itself_in_a_line_and_in_notebooks_as_a_table(options, device, tmp_path):
    folder = save_checkpoint(BUILDS["gpt"](), tmp_path)
    model = load_and_quantize_model(empty(BUILDS["gpt"]), "nf4", folder, **options(*BLOCKS["gpt"][:2]))
    assert repr(model.offload).startswith("Offload(2 units offloaded, ")
    assert "0 B so far" in repr(model.offload)
    logits(model, device)
    assert "0 B so far" not in repr(model.offload)
    assert str(model.offload.stats().nbytes) in model.offload._repr_html_()
    assert len(repr(model.offload)) < 200
