"""A checkpoint quantized file to file has the bits of one that was loaded and saved, whatever became of the run."""

import errno
import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import contents, empty, empty_like, loaded, save, save_checkpoint, stored
from comparisons import assert_same_bits
from failures import act_at, fail_at
from forks import needs_fork
from models import GPT, Layers, llama
from references import FOUR_BIT
from scaled import BLOCKS, FP8, says
from torch import nn

from bigload import (
    BnbQuantizationConfig,
    CheckpointError,
    ConfigError,
    QuantizationError,
    load_and_quantize_model,
    quantize_checkpoint,
    save_quantized_model,
)
from bigload.cli import main
from bigload.pipeline import file_output

MODES = (*FOUR_BIT, "int8")


def source(folder, build=Layers, dtype=torch.bfloat16, **options):
    torch.manual_seed(0)
    return save_checkpoint(build(), folder, dtype=dtype, **options)


def without_padding(state):
    """A double-quantized weight is described in JSON whose length no value changes: spaces follow it."""
    return {
        name: torch.tensor(list(bytes(tensor.numpy()).rstrip())) if ".quant_state." in name else tensor
        for name, tensor in state.items()
    }


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "int8"])
def test_scales_are_held_of_one_weight_at_a_time(tmp_path, device, monkeypatch, mode):
    sinks, held = [], []
    begin, take = file_output._QuantizedFileSink.__init__, file_output._QuantizedFileSink.take

    def begun(self, *args):
        sinks.append(self)
        begin(self, *args)

    def taken(self, *args):
        take(self, *args)
        held.append(sum(isinstance(each, torch.Tensor) for sink in sinks for each in vars(sink).values()))

    monkeypatch.setattr(file_output._QuantizedFileSink, "__init__", begun)
    monkeypatch.setattr(file_output._QuantizedFileSink, "take", taken)
    quantize_checkpoint(source(tmp_path / "source"), tmp_path / "made", mode, model=empty(), device=device)
    assert len(sinks) > 2
    assert set(held) == {1}


WATCHED = """
import torch
from torch import nn
from benchmarks.host import watched_host
from bigload import init_empty_weights, quantize_checkpoint
from bigload.io.ring import RING_BYTES
from bigload.quantization import bnb

bnb.library()
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.zeros(1, device=device)
with init_empty_weights():
    model = nn.Sequential(*(nn.Linear(4096, 2048, bias=False) for _ in range(40)))
with watched_host(on_gpu=device == "cuda") as host:
    quantize_checkpoint("fp8", "nf4", "nf4", model=model, device=device, progress=False)
print(host.over_start_gib, RING_BYTES / 2**30)
"""


@pytest.mark.slow
def test_host_memory_is_the_ring_and_what_one_weight_needs(tmp_path, programs):
    state, numbers = {}, torch.randn(2048, 4096).mul_(100).clamp_(-448, 448).to(FP8)
    for number in range(40):  # 320 MiB, which are 640 in bfloat16 and 180 in nf4
        state |= {f"{number}.weight": numbers.clone(), f"{number}.weight_scale_inv": torch.full((16, 32), 2e-4)}
    says(save(state, tmp_path / "fp8"), **BLOCKS)
    over_start, ring = programs.run(WATCHED, tmp_path).split()
    if over_start == "None":
        pytest.skip("the system does not tell a process's memory")
    assert float(over_start) < float(ring) + 150 / 1024


@pytest.mark.parametrize("ring", ["1KiB", "128MiB"])
@pytest.mark.parametrize("max_shard_size", ["5GB", 2_000, 1])
@pytest.mark.parametrize("mode", MODES)
def test_files_hold_what_a_load_makes(tmp_path, device, monkeypatch, mode, max_shard_size, ring):
    folder = source(tmp_path / "source", shards=3)
    model = loaded(folder, device, mode)
    monkeypatch.setenv("BIGLOAD_RING_BYTES", ring)  # the least: a row of int8 does not fit a slot
    quantize_checkpoint(folder, tmp_path / "made", mode, model=empty(), max_shard_size=max_shard_size, device=device)
    again = loaded(tmp_path / "made", device)
    assert_same_bits(again.state_dict(), model.state_dict())
    save_quantized_model(model, tmp_path / "saved", max_shard_size)
    assert_same_bits(without_padding(stored(tmp_path / "made")), without_padding(stored(tmp_path / "saved")))
    made, saved = (json.loads((tmp_path / name / "bigload.json").read_text()) for name in ("made", "saved"))
    assert made | {"layout": ""} == saved | {"layout": ""}  # the padding is part of it


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocksize", [64, 128])
def test_every_choice_of_the_config_counts(tmp_path, device, blocksize, storage):
    folder = source(tmp_path / "source", dtype=torch.float32)
    config = BnbQuantizationConfig.from_mode(
        "nf4-dq",
        bnb_4bit_blocksize=blocksize,
        bnb_4bit_quant_storage=storage,
        torch_dtype="fp16",
        skip_modules=["proj", "head"],
        keep_in_fp32_modules=["norm"],
        bnb_4bit_compute_dtype="fp32",
    )
    model = loaded(folder, device, config)
    quantize_checkpoint(folder, tmp_path / "made", config, model=empty(), device=device)
    again = loaded(tmp_path / "made", device)
    assert_same_bits(again.state_dict(), model.state_dict())
    assert type(again.proj) is nn.Linear
    assert again.norm.weight.dtype == torch.float32
    assert again.c_proj.compute_dtype == torch.float32


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "t5", "mixtral"])
def test_from_files_and_a_config_alone(tmp_path, device, name, mode):
    """GPT-2's weights are transposed, Mixtral's experts merged from others; transformers reads what was made.

    It reads no experts in 4 bit, which are therefore left out.
    """
    from architectures import build

    torch.manual_seed(0)
    full = build(name).bfloat16()
    full.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    skipped = ["experts", "lm_head"] if name == "mixtral" else None
    config = BnbQuantizationConfig.from_mode(mode, skip_modules=skipped)
    quantize_checkpoint(tmp_path / "source", tmp_path / "made", config, max_shard_size="20KB", device=device)
    assert (tmp_path / "made" / "tokenizer.json").read_text() == "{}"
    model = load_and_quantize_model(empty_like(full), config, tmp_path / "source", device_map=device)
    again = load_and_quantize_model(empty_like(full), None, tmp_path / "made", device_map=device, strict=True)
    assert_same_bits(again.state_dict(), model.state_dict())
    theirs = type(full).from_pretrained(tmp_path / "made", device_map={"": device})
    assert_same_bits(theirs.state_dict(), model.state_dict())


def test_pickled_checkpoint(tmp_path, device):
    torch.manual_seed(0)
    full = Layers().half()
    (tmp_path / "source").mkdir()
    torch.save(full.state_dict(), tmp_path / "source" / "pytorch_model.bin")
    quantize_checkpoint(tmp_path / "source", tmp_path / "made", "nf4", model=empty(), device=device)
    model = loaded(tmp_path / "source", device, "nf4")
    assert_same_bits(loaded(tmp_path / "made", device).state_dict(), model.state_dict())


def test_command_quantizes_and_says_what_it_made(tmp_path, capsys):
    llama(False).bfloat16().save_pretrained(tmp_path / "source")
    assert (
        main(["quantize", str(tmp_path / "source"), str(tmp_path / "made"), "--quant", "int8", "--device", "cpu"]) == 0
    )
    assert "as int8" in capsys.readouterr().out
    assert main(["quantize", str(tmp_path / "source"), str(tmp_path / "made"), "--device", "cpu"]) == 1
    assert "not empty" in capsys.readouterr().err
    again = [str(tmp_path / "source"), str(tmp_path / "made"), "--device", "cpu", "--overwrite"]
    assert main(["quantize", *again]) == 0
    assert "as nf4" in capsys.readouterr().out


# Runs that do not reach their end.


@pytest.mark.parametrize("call", [1, 5, 20])
def test_full_disk_leaves_nothing(tmp_path, device, monkeypatch, call):
    folder = source(tmp_path / "source")
    before = contents(tmp_path)
    fail_at(monkeypatch, os, "pwrite", call, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(CheckpointError, match=r"made' cannot be written.*No space left"):
        quantize_checkpoint(folder, tmp_path / "made", "nf4", model=empty(), max_shard_size="4KB", device=device)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
@pytest.mark.parametrize("call", [1, 4, 9, 15])
def test_interrupted_run_goes_on_and_ends_with_the_same_bytes(tmp_path, device, monkeypatch, mode, call):
    folder = source(tmp_path / "source", shards=2)

    def run(name):
        quantize_checkpoint(folder, tmp_path / name, mode, model=empty(), max_shard_size="4KB", device=device)

    run("expected")
    fail_at(monkeypatch, os, "pwrite", call, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run("made")
    monkeypatch.undo()
    assert not (tmp_path / "made").exists()
    finished = sorted((tmp_path / ".made.partial").glob("*.safetensors"))
    times = {path.name: path.stat().st_mtime_ns for path in finished}
    run("made")
    assert contents(tmp_path / "made") == contents(tmp_path / "expected")
    assert {name: (tmp_path / "made" / name).stat().st_mtime_ns for name in times} == times  # kept, not made again
    assert call < 15 or times
    assert not (tmp_path / ".made.partial").exists()


def test_finished_files_of_another_run_are_not_taken(tmp_path, device, monkeypatch):
    folder = source(tmp_path / "source")
    for mode, error in (("nf4", KeyboardInterrupt()), ("fp4", None)):
        if error:
            fail_at(monkeypatch, os, "pwrite", 25, error)
            with pytest.raises(KeyboardInterrupt):
                quantize_checkpoint(folder, tmp_path / "made", mode, model=empty(), max_shard_size=1, device=device)
            monkeypatch.undo()
            assert list((tmp_path / ".made.partial").glob("*.safetensors"))
        else:
            quantize_checkpoint(folder, tmp_path / "made", mode, model=empty(), max_shard_size=1, device=device)
    assert_same_bits(loaded(tmp_path / "made", device).state_dict(), loaded(folder, device, "fp4").state_dict())


KILLED = """
import itertools, os, signal, sys
from pathlib import Path
sys.path.insert(0, {helpers!r})
import bitsandbytes  # once for all that are killed
from checkpoints import empty
from models import GPT
from bigload import quantize_checkpoint

def run(function, call):
    own, calls = getattr(os, function), itertools.count(1)

    def killing(*arguments):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return own(*arguments)

    setattr(os, function, killing)
    model = empty(GPT, layers=24)
    quantize_checkpoint({source!r}, {target!r}, "nf4-dq", model=model, max_shard_size="30KB", device="cpu")

for function, call in (("pwrite", 250), ("fsync", 10), ("pwrite", 250)):
    child = os.fork()  # before torch has threads, which would stay behind
    if child == 0:
        run(function, call)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    print(len(list(Path({partial!r}).glob("*.safetensors"))))
"""


@needs_fork
def test_run_that_was_killed_goes_on_and_ends_with_the_same_bytes(tmp_path, programs):
    folder, target = source(tmp_path / "source", partial(GPT, layers=24)), tmp_path / "made"

    def run(target):
        model = empty(GPT, layers=24)
        quantize_checkpoint(folder, target, "nf4-dq", model=model, max_shard_size="30KB", device="cpu")

    run(tmp_path / "expected")
    paths = {"source": str(folder), "target": str(target), "partial": str(tmp_path / ".made.partial")}
    code = KILLED.format(helpers=str(Path(__file__).parent / "helpers"), **paths)
    printed = programs.run(code, tmp_path)
    # In the midst of it each time: a few of the files that are whole wait for the disk still, and are lost.
    first, second, third = map(int, printed.split())
    assert 0 < first < second < third
    run(target)
    assert contents(target) == contents(tmp_path / "expected")


def test_finished_files_made_of_other_tensors_are_not_taken(tmp_path, device, monkeypatch):
    """By a run that read the same checkpoint by other names."""
    torch.manual_seed(0)
    one, other = Layers().state_dict(), Layers().state_dict()
    state = {f"model.{name}": value for name, value in one.items()}
    state |= {f"ema.{name}": value.clone() for name, value in other.items()}
    save(state, tmp_path / "source")
    save(other, tmp_path / "other")

    def run(prefix):
        mapping = {f"^{prefix}": ""}
        options = {"model": empty(), "max_shard_size": 1, "device": device, "key_mapping": mapping}
        quantize_checkpoint(tmp_path / "source", tmp_path / "made", "nf4", **options)

    fail_at(monkeypatch, os, "pwrite", 20, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run("model.")
    monkeypatch.undo()
    assert list((tmp_path / ".made.partial").glob("*.safetensors"))
    run("ema.")
    assert_same_bits(
        loaded(tmp_path / "made", device).state_dict(), loaded(tmp_path / "other", device, "nf4").state_dict()
    )


def test_a_second_run_for_the_same_folder_is_refused_while_one_is_at_work(tmp_path, device, monkeypatch):
    folder = source(tmp_path / "source")

    def run(**options):
        quantize_checkpoint(folder, tmp_path / "made", "nf4", model=empty(), device=device, **options)

    def run_meanwhile():
        with pytest.raises(CheckpointError, match="another run is making"):
            run()
        refused.append(True)

    refused = []
    act_at(monkeypatch, os, "pwrite", 2, run_meanwhile)
    run()
    assert refused
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "source"]


def test_what_comes_to_the_target_meanwhile_is_not_lost(tmp_path, device, monkeypatch):
    folder = source(tmp_path / "source")

    def appear():
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "thesis.txt").write_text("mine")

    act_at(monkeypatch, os, "pwrite", 2, appear)
    with pytest.raises(CheckpointError, match="not empty"):
        quantize_checkpoint(folder, tmp_path / "made", "nf4", model=empty(), device=device)
    assert contents(tmp_path / "made") == {"thesis.txt": b"mine"}


def test_other_files_of_source_and_target_are_there_whole(tmp_path, device, monkeypatch):
    folder = source(tmp_path / "source")
    (folder / "tokenizer.json").write_text("{}" * 500)
    (folder / "more").mkdir()

    def run(**more):
        quantize_checkpoint(folder, tmp_path / "made", "nf4", model=empty(), device=device, **more)

    copy = shutil.copyfile

    def half(path, other):
        other.write_bytes(path.read_bytes()[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", half)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(shutil, "copyfile", copy)
    run()
    assert (tmp_path / "made" / "tokenizer.json").read_text() == "{}" * 500
    assert not (tmp_path / "made" / "more").exists()
    (tmp_path / "made" / "NOTES.md").write_text("mine")
    run(overwrite=True)
    assert (tmp_path / "made" / "NOTES.md").read_text() == "mine"


def test_home_is_meant_by_a_tilde(tmp_path, device, monkeypatch):
    source(tmp_path / "source")
    monkeypatch.setenv("HOME", str(tmp_path))
    quantize_checkpoint("~/source", "~/made", "nf4", model=empty(), device=device)
    save_quantized_model(loaded("~/made", device), "~/saved")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "saved", "source"]


def test_a_file_may_be_quantized_into_a_folder_beside_it(tmp_path, device):
    folder = source(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    quantize_checkpoint(folder / "model.safetensors", tmp_path / "made", "nf4", model=empty(), device=device)
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        "README.md",
        "bigload.json",
        "model.safetensors",
    ]
    assert_same_bits(
        loaded(tmp_path / "made", device).state_dict(),
        loaded(tmp_path / "model.safetensors", device, "nf4").state_dict(),
    )


def test_command_loads_what_the_command_quantized(tmp_path, capsys):
    llama(False).bfloat16().save_pretrained(tmp_path / "source")
    made = str(tmp_path / "made")
    assert main(["quantize", str(tmp_path / "source"), made, "--quant", "nf4-dq", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main(["load", made, "--device-map", "cpu"]) == 0
    assert "as nf4-dq" in capsys.readouterr().out


# What is refused.


def test_target_where_the_source_is(tmp_path, device):
    folder = source(tmp_path / "source")
    (tmp_path / "link").symlink_to(folder)
    before = contents(folder)
    for target in (folder, folder / "inside", tmp_path / "link", tmp_path / "link" / "inside", tmp_path):
        with pytest.raises(CheckpointError, match=r"overlaps the checkpoint's folder|holds 'link', 'source'"):
            quantize_checkpoint(folder, target, "nf4", model=empty(), device=device, overwrite=True)
    assert contents(folder) == before


def test_what_cannot_be_quantized(tmp_path, device):
    folder = source(tmp_path / "source")
    quantize_checkpoint(folder, tmp_path / "made", "nf4", model=empty(), device=device)
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize_checkpoint(tmp_path / "made", tmp_path / "other", "nf4", model=empty(), device=device)
    with pytest.raises(ConfigError, match="int8-training"):
        quantize_checkpoint(folder, tmp_path / "other", "int8-training", model=empty(), device=device)
    config = BnbQuantizationConfig.from_mode("nf4", skip_modules=["*"])
    with pytest.raises(ConfigError, match="nothing in this Layers would be quantized"):
        quantize_checkpoint(folder, tmp_path / "other", config, model=empty(), device=device)
    for target in (None, "", 3):
        with pytest.raises(ConfigError, match="expected a path"):
            quantize_checkpoint(folder, target, "nf4", model=empty(), device=device)
    with pytest.raises(CheckpointError, match=r"no config\.json.*model="):
        quantize_checkpoint(folder, tmp_path / "other", "nf4", device=device)
    with pytest.raises(CheckpointError, match=r"missing|not found in|not in the checkpoint"):
        quantize_checkpoint(folder, tmp_path / "other", "nf4", model=empty(GPT), device=device)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "source"]


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "int8"])
def test_values_that_the_format_cannot_hold_are_named(tmp_path, device, mode):
    full = Layers()
    with torch.no_grad():
        full.proj.weight[3, 3] = float("inf")
    save_checkpoint(full, tmp_path / "source")
    with pytest.raises(QuantizationError, match=r"'proj\.weight': values that are not finite"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "made", mode, model=empty(), device=device)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
