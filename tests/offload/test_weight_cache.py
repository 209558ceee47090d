"""Models of which part rests on the disk: quantized once into files, or read where the checkpoint has it."""

import os
from functools import partial

import pytest
import torch
from checkpoints import PLAIN, empty, offloaded, save_checkpoint
from comparisons import assert_same_bits, outputs
from models import GPT, TOKENS, llama
from streaming import engines_of

from bigload import OffloadError, PlacementError, load_and_quantize_model, plan_device_map, quantize_checkpoint
from bigload.io.tensors import StoredTensor
from bigload.model.tensors import ModelTensor
from bigload.offload import weight_cache
from bigload.planning.planned_tensors import PlannedTensor
from bigload.planning.sources import Source
from bigload.quantization.formats import Int8

pytestmark = pytest.mark.usefixtures("small_parts_stream")

BLOCKS = [f"transformer.h.{n}" for n in range(4)]
MODES = ["nf4", "nf4-dq", "int8", PLAIN]
build = partial(GPT, layers=4)


def loaded(folder, device, tmp_path, mode="nf4", names=BLOCKS, cache="cache"):
    return offloaded(build, folder, device, names, cache and tmp_path / cache, mode, home="disk")


def logits(model, device):
    return outputs(model.eval(), TOKENS.to(device))


def files(tmp_path):
    folder = tmp_path / "cache"
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")} if folder.exists() else {}


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode if isinstance(mode, str) else "none")
def test_what_rests_on_the_disk_gives_the_same_bits_and_is_quantized_once(tmp_path, device, mode):
    folder = save_checkpoint(build().bfloat16(), tmp_path / "source")
    whole = load_and_quantize_model(empty(build), mode, folder, device_map=device)
    read = []
    for _ in range(2):
        model = loaded(folder, device, tmp_path, mode)
        for _ in range(2):
            assert torch.equal(logits(model, device), logits(whole, device))
        read.append(model.load_report.bytes_read)
        made = files(tmp_path)
        assert len(made) == (0 if mode is PLAIN else 16)
        assert model.offload.stats().nbytes > 0
    assert read[1] < read[0] or mode is PLAIN
    assert_same_bits(model.state_dict(), whole.state_dict())
    assert files(tmp_path) == made
    model.offload.remove()
    assert torch.equal(logits(model, device), logits(whole, device))


def test_parts_of_one_tensor_have_files_of_their_own(tmp_path):
    """As the experts of a layer, which some checkpoints hold stacked; and a weight and its transpose."""
    stored = StoredTensor("experts", tmp_path / "0.safetensors", torch.bfloat16, (2, 64, 64), 8, 2 * 64 * 64 * 2)
    stored.file.write_bytes(bytes(stored.offset + stored.nbytes))
    cache = weight_cache.WeightCache(tmp_path / "cache", torch.bfloat16)
    sources = [
        Source(stored),
        Source(stored, region=(slice(0, 1),)),
        Source(stored, region=(slice(1, 2),)),
        Source(stored, transposed=True),
    ]
    tensor = ModelTensor(("made",), torch.empty(64, 64, device="meta"), is_parameter=True, persistent=True)
    weights = [PlannedTensor(tensor, (64, 64), (source,), Int8(), torch.device("cpu")) for source in sources]
    parts = {"weight": torch.zeros(64, 64, dtype=torch.int8), "SCB": torch.zeros(64)}
    assert len({cache.put(weight, parts)["weight"].file for weight in weights}) == 4


def test_files_may_be_read_by_whoever_may_read_what_this_user_writes(tmp_path, device):
    folder = save_checkpoint(build().bfloat16(), tmp_path / "source")
    (tmp_path / "plain").touch()
    loaded(folder, device, tmp_path)
    modes = {path.stat().st_mode for path in (tmp_path / "cache").glob("*.safetensors")}
    assert modes == {(tmp_path / "plain").stat().st_mode}


def test_file_that_may_not_be_read_is_no_damaged_one(tmp_path, device, monkeypatch):
    folder = save_checkpoint(build().bfloat16(), tmp_path / "source")
    loaded(folder, device, tmp_path)
    made = files(tmp_path)

    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(weight_cache, "read_header", refused)
    with pytest.raises(OffloadError, match="belongs to another user and cannot be read"):
        loaded(folder, device, tmp_path)
    assert files(tmp_path) == made


def test_what_was_left_behind_long_ago_is_swept_out_and_nothing_else(tmp_path, device):
    folder = save_checkpoint(build().bfloat16(), tmp_path / "source")
    there = tmp_path / "cache"
    loaded(folder, device, tmp_path)
    (writing,) = (path for path in there.iterdir() if path.is_dir())  # in which files are until they are whole
    old = [writing / "a.safetensors.1.2", writing / ".tmpAb12Cd", there / ".tmpAb12Cd", there / "mine.partial"]
    new = writing / "b.safetensors.1.2"
    for path in (*old, new):
        path.touch()
    for path in old:
        os.utime(path, (0, 0))
    loaded(folder, device, tmp_path, "fp4")
    assert [path for path in (*old, new) if path.exists()] == [*old[2:], new]


def test_page_cache_is_spared_for_what_it_has_room_for(tmp_path, device, monkeypatch):
    from bigload.offload import handle

    folder = save_checkpoint(build().bfloat16(), tmp_path / "source")
    whole = loaded(folder, device, tmp_path)
    groups = [group.store for engine in engines_of(whole) for group in engine.groups]
    assert all(group.stays_in_page_cache for group in groups)
    monkeypatch.setattr(handle, "free_bytes", lambda place: 2 * sum(group.layout.nbytes for group in groups[:2]))
    model = loaded(folder, device, tmp_path)
    stay = [group.store.stays_in_page_cache for engine in engines_of(model) for group in engine.groups]
    assert stay == [True, False, True, False]
    assert torch.equal(logits(model, device), logits(whole, device))


def test_map_that_needs_a_folder_is_refused_when_it_is_planned(tmp_path):
    folder = save_checkpoint(build().bfloat16(), tmp_path / "source")
    places = {"": "cpu"} | dict.fromkeys(BLOCKS, "disk")
    with pytest.raises(PlacementError, match="name an offload_folder"):
        plan_device_map(empty(build), "nf4", folder, device_map=places)
    assert plan_device_map(empty(build), PLAIN, folder, device_map=places)


def test_another_map_finds_what_was_quantized(tmp_path, device):
    folder = save_checkpoint(build().bfloat16(), tmp_path / "source")
    loaded(folder, device, tmp_path, names=BLOCKS[:2])
    first = files(tmp_path)
    loaded(folder, device, tmp_path, names=BLOCKS[1:3])
    both = files(tmp_path)
    assert len(first) == 8
    assert len(both) == 12
    assert first.items() <= both.items()


def test_another_checkpoint_mode_or_dtype_does_not(tmp_path, device):
    folder = save_checkpoint(build().bfloat16(), tmp_path / "source")
    loaded(folder, device, tmp_path, names=BLOCKS[:1])
    loaded(folder, device, tmp_path, "fp4", names=BLOCKS[:1])
    loaded(
        folder,
        device,
        tmp_path,
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "torch_dtype": "fp16"},
        names=BLOCKS[:1],
    )
    assert len(files(tmp_path)) == 12
    torch.manual_seed(5)
    folder = save_checkpoint(build().bfloat16(), tmp_path / "source")  # the same names, and other values
    whole = load_and_quantize_model(empty(build), "nf4", folder, device_map=device)
    assert torch.equal(logits(loaded(folder, device, tmp_path, names=BLOCKS[:1]), device), logits(whole, device))
    assert len(files(tmp_path)) == 16


@pytest.mark.parametrize("damage", ["cut", "garbage", "another"])
def test_damaged_file_is_made_again(tmp_path, device, damage, logged):
    folder = save_checkpoint(build().bfloat16(), tmp_path / "source")
    whole = load_and_quantize_model(empty(build), "nf4", folder, device_map=device)
    loaded(folder, device, tmp_path)
    made = sorted((tmp_path / "cache").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    first, second = made[:: len(BLOCKS) * 4 - 1]
    content = {"cut": second.read_bytes()[:-1], "garbage": b"x" * 50, "another": first.read_bytes()}[damage]
    second.write_bytes(content)
    assert torch.equal(logits(loaded(folder, device, tmp_path), device), logits(whole, device))
    assert "written again" in logged.text


def test_weights_that_were_brought_back_are_in_no_file_any_more(tmp_path, device):
    folder = save_checkpoint(build().bfloat16(), tmp_path / "source")
    model = loaded(folder, device, tmp_path, names=["transformer.wte", *BLOCKS])
    expected = logits(model, device)
    model.offload.remove()
    for path in (*folder.glob("*.safetensors"), *(tmp_path / "cache").glob("*.safetensors")):
        path.write_bytes(b"")  # what maps it would end the process
    assert torch.equal(logits(model, device), expected)


@pytest.mark.parametrize(("mode", "where"), [("nf4", "cache"), (PLAIN, "source")], ids=["cache", "original"])
def test_file_that_goes_while_the_model_runs_is_an_error_that_names_it(tmp_path, device, mode, where):
    folder = save_checkpoint(build().bfloat16(), tmp_path / "source")
    model = loaded(folder, device, tmp_path, mode)
    expected = logits(model, device)
    for path in (tmp_path / where).glob("*.safetensors"):
        path.rename(tmp_path / path.name)

    def run():
        for _ in range(3):  # the groups in the slots are there still
            logits(model, device)

    with pytest.raises(OffloadError, match=where):
        run()
    for path in tmp_path.glob("*.safetensors"):
        path.rename(tmp_path / where / path.name)
    assert torch.equal(logits(model, device), expected)


def test_embedding_whose_file_is_cut_short_is_an_error_and_not_the_end_of_the_process(tmp_path, device):
    folder = save_checkpoint(build().bfloat16(), tmp_path / "source")
    model = loaded(folder, device, tmp_path, names=["transformer.wte"])
    expected = logits(model, device)
    (shard,) = folder.glob("*.safetensors")
    whole = shard.rename(tmp_path / "whole")
    shard.write_bytes(whole.read_bytes()[:1000])
    with pytest.raises(OffloadError, match=r"'transformer\.wte\.weight' cannot be read"):
        logits(model, device)
    whole.rename(shard)
    assert torch.equal(logits(model, device), expected)


def test_full_disk_leaves_the_model_as_it_was_and_no_half_file(tmp_path, device, monkeypatch):
    folder, model = save_checkpoint(build().bfloat16(), tmp_path / "source"), empty(build)
    save, calls = weight_cache.save_file, []

    def failing(tensors, path):
        calls.append(path)
        if len(calls) == 5:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(weight_cache, "save_file", failing)
    options = {"device_map": {"": device} | dict.fromkeys(BLOCKS, "disk"), "offload_folder": tmp_path / "cache"}
    with pytest.raises(OffloadError, match="No space left"):
        load_and_quantize_model(model, "nf4", folder, **options)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert len(files(tmp_path)) == 4
    load_and_quantize_model(model, "nf4", folder, **options)
    assert len(files(tmp_path)) == 16


def test_file_that_another_program_writes_at_that_moment_is_not_taken_for_ours(tmp_path, device, monkeypatch):
    folder, own = save_checkpoint(build().bfloat16(), tmp_path / "source"), weight_cache._publish

    def publish(partial, path, planned):
        own(partial, path, planned)
        path.write_bytes(b"of another program")

    with monkeypatch.context() as patch:
        patch.setattr(weight_cache, "_publish", publish)
        with pytest.raises(OffloadError, match="is not what was just written there: is another program writing it"):
            loaded(folder, device, tmp_path)
    whole = load_and_quantize_model(empty(build), "nf4", folder, device_map=device)
    assert torch.equal(logits(loaded(folder, device, tmp_path), device), logits(whole, device))


def test_without_a_folder_only_what_the_checkpoint_has_may_rest_on_the_disk(tmp_path, device):
    folder = save_checkpoint(build().bfloat16(), tmp_path / "source")
    with pytest.raises(PlacementError, match="offload_folder"):
        loaded(folder, device, tmp_path, cache=None)
    loaded(folder, device, tmp_path, PLAIN, cache=None)


def test_originals_are_never_written(tmp_path, device):
    folder = save_checkpoint(build().bfloat16(), tmp_path / "source")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    model = loaded(folder, device, tmp_path, PLAIN)
    with torch.no_grad():
        model.transformer["h"][0].mlp["c_fc"].weight.zero_()
    logits(model, device)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


def test_quantized_checkpoint_rests_on_the_disk_too(tmp_path, device):
    folder = save_checkpoint(build().bfloat16(), tmp_path / "source")
    quantize_checkpoint(folder, tmp_path / "made", "nf4-dq", model=empty(build), device=device)
    whole = load_and_quantize_model(empty(build), None, tmp_path / "made", device_map=device)
    assert torch.equal(logits(loaded(tmp_path / "made", device, tmp_path, None), device), logits(whole, device))


def test_models_own_weights_rest_on_the_disk_too(tmp_path, device):
    own, twin = build().bfloat16(), build().bfloat16()
    twin.load_state_dict(own.state_dict())
    whole = load_and_quantize_model(own, "int8", device_map=device)
    device_map = {"": device} | dict.fromkeys(BLOCKS, "disk")
    model = load_and_quantize_model(twin, "int8", device_map=device_map, offload_folder=tmp_path / "cache")
    assert torch.equal(logits(model, device), logits(whole, device))
    assert len(files(tmp_path)) == 16


def test_larger_than_all_budgets_together_a_model_runs(tmp_path, device, monkeypatch):
    monkeypatch.setenv("BIGLOAD_RING_BYTES", "64KiB")

    def wide():
        return llama(tied=False, num_hidden_layers=8, hidden_size=128, intermediate_size=256)

    folder = save_checkpoint(wide().bfloat16(), tmp_path / "source")
    whole = plan_device_map(empty(wide), "nf4", folder, device_map=device).accounts[0].needed
    budgets = {device: whole - 150_000, "disk": "1GiB"}
    if device.type == "cuda":
        budgets["cpu"] = 64 * 2**10 + 30_000
    model = load_and_quantize_model(
        empty(wide), "nf4", folder, device_map="auto", max_memory=budgets, offload_folder=tmp_path / "cache"
    )
    homes = {placed.home for placed in model.offload.plan.offloaded}
    assert "disk" in homes
    resident = load_and_quantize_model(empty(wide), "nf4", folder, device_map=device).eval()
    assert torch.equal(logits(model, device), logits(resident, device))


def test_values_that_the_format_cannot_hold_are_named_each_time(tmp_path, device):
    from bigload import QuantizationError

    full = build().bfloat16()
    full.transformer["h"][1].mlp["c_fc"].weight.data[0, 0] = float("inf")
    folder = save_checkpoint(full, tmp_path / "source")
    for _ in range(2):
        with pytest.raises(QuantizationError, match=r"transformer\.h\.1\.mlp\.c_fc"):
            loaded(folder, device, tmp_path)


def test_checkpoints_that_were_given_one_time_are_told_apart(tmp_path, device):
    logits_of = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        folder = save_checkpoint(build().bfloat16(), tmp_path / str(seed))
        for path in folder.iterdir():
            os.utime(path, (1, 1))
        whole = load_and_quantize_model(empty(build), "nf4", folder, device_map=device)
        logits_of.append(logits(whole, device))
        assert torch.equal(logits(loaded(folder, device, tmp_path), device), logits_of[-1])
    assert not torch.equal(*logits_of)


def test_threads_may_quantize_into_one_folder(tmp_path, device):
    from concurrent.futures import ThreadPoolExecutor

    folder = save_checkpoint(build().bfloat16(), tmp_path / "source")
    whole = logits(load_and_quantize_model(empty(build), "nf4", folder, device_map=device), device)
    with ThreadPoolExecutor(4) as pool:
        models = [pool.submit(loaded, folder, device, tmp_path) for _ in range(4)]
    assert all(torch.equal(logits(model.result(), device), whole) for model in models)


def test_folder_that_is_a_file_is_named(tmp_path, device):
    folder = save_checkpoint(build().bfloat16(), tmp_path / "source")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OffloadError, match="cache"):
        loaded(folder, device, tmp_path)


def test_command_loads_what_rests_on_the_disk(tmp_path, capsys, device):
    import json

    from bigload.cli import main

    folder = tmp_path / "source"
    llama(tied=False).bfloat16().save_pretrained(folder)
    device_map = json.dumps({"": str(device), "model.layers.1": "disk"})
    arguments = ["load", str(folder), "--device-map", device_map]
    assert main(arguments) == 1
    assert "--offload-folder" in capsys.readouterr().err
    assert main([*arguments, "--offload-folder", str(tmp_path / "cache"), "--max-memory", f"{device}=10GiB"]) == 0
    assert "as nf4" in capsys.readouterr().out
    assert len(files(tmp_path)) == 5  # k_proj and v_proj are too small to leave


def test_state_dict_is_not_loaded_into_files(tmp_path, device):
    folder = save_checkpoint(build().bfloat16(), tmp_path / "source")
    model = loaded(folder, device, tmp_path, PLAIN)
    other = load_and_quantize_model(build().bfloat16(), PLAIN, device_map=device)
    state = other.state_dict()
    with pytest.raises(OffloadError, match=r"offload\.remove\(\)"):
        model.load_state_dict(state)
    model.load_state_dict({"transformer.ln_f.bias": state["transformer.ln_f.bias"]}, strict=False)
    model.offload.remove()
    model.load_state_dict(state)
    assert torch.equal(logits(model, device), logits(other, device))
