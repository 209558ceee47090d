"""Files that change, processes that are killed or work side by side, few descriptors."""

import fcntl
import os
import resource
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import contents, empty, save_checkpoint
from comparisons import assert_same_bits, state_of
from forks import needs_fork
from injected_faults import anatomy
from models import GPT
from resources import open_files

from bigload import CheckpointError, load_and_quantize_model, quantize_checkpoint
from bigload.io.feed import Feed

HELPERS = str(Path(__file__).parents[1] / "helpers")
build = partial(GPT, vocab=32, width=64, layers=2)


def load(model, folder, **options):
    return load_and_quantize_model(model, "nf4", folder, device_map="cpu", **options)


def quantize(model, folder):
    return quantize_checkpoint(folder, folder.parent / "made", "nf4", model=model, device="cpu")


@pytest.mark.parametrize("what", ["another file", "other bytes", "no file"])
@pytest.mark.parametrize("verb", [load, quantize])
def test_file_that_changes_between_planning_and_reading_is_refused(tmp_path, monkeypatch, what, verb):
    """The bytes that are read are not those that the header spoke of, or not all of one version."""
    folder, other = save_checkpoint(build(), tmp_path / "one"), save_checkpoint(build(), tmp_path / "two")
    path, opened, model = folder / "model.safetensors", Feed._open, empty(build)
    whole, before = path.read_bytes(), anatomy(model)

    def changing(self):
        if what == "another file":
            (other / "model.safetensors").replace(path)
        elif what == "other bytes":
            path.write_bytes(whole[:-4] + b"\1\2\3\4")
            os.utime(path, ns=(0, 10**9))
        opened(self)
        if what == "no file":
            path.unlink()

    monkeypatch.setattr(Feed, "_open", changing)
    with pytest.raises(CheckpointError, match=r"model\.safetensors' (was changed while|cannot be read any more)"):
        verb(model, folder)
    assert anatomy(model) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    monkeypatch.undo()
    path.write_bytes(whole)
    assert_same_bits(load(model, folder).state_dict(), load(empty(build), folder).state_dict())


KILLED = """
import itertools, os, signal, sys
sys.path.insert(0, {helpers!r})
import bitsandbytes
from functools import partial
from checkpoints import empty
from models import GPT
from bigload import load_and_quantize_model, save_quantized_model
import bigload.planning.units
bigload.planning.units.RESIDENT_BYTES = 2000
build = partial(GPT, vocab=32, width=64, layers=2)

def save():
    model = load_and_quantize_model(empty(build), "nf4", "checkpoint", device_map="cpu")
    save_quantized_model(model, "saved", max_shard_size="20KB", overwrite=True)

def cache():
    device_map = {{"": "cpu", "transformer.h.0": "disk", "transformer.h.1": "disk"}}
    load_and_quantize_model(empty(build), "nf4", "checkpoint", device_map=device_map, offload_folder="cache")

def run(act, function, call):
    own, calls = getattr(os, function), itertools.count(1)

    def killing(*arguments, **options):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return own(*arguments, **options)

    setattr(os, function, killing)
    act()

{act}
"""


def killed_at(act, function, calls):
    lines = [
        f"for call in {list(calls)}:",
        "    child = os.fork()",
        "    if child == 0:",
        f"        run({act}, {function!r}, call)",
        "        os._exit(0)",
        "    print(os.waitpid(child, 0)[1])",
    ]
    return KILLED.format(helpers=HELPERS, act="\n".join(lines))


@needs_fork
@pytest.mark.parametrize(
    ("function", "call"), [("pwrite", 9), ("fsync", 3), ("rename", 2), ("rename", 5), ("fsync", 9)]
)
def test_folder_is_whole_or_not_there_after_a_kill_while_it_is_saved(tmp_path, programs, function, call):
    folder = save_checkpoint(build(), tmp_path / "checkpoint", dtype=torch.bfloat16)
    printed = programs.run(killed_at("save", function, [call]), tmp_path)
    assert printed.split() == [str(int(signal.SIGKILL))]
    expected = state_of(load(empty(build), folder))
    if (tmp_path / "saved").exists():
        model = load_and_quantize_model(empty(build), None, tmp_path / "saved", device_map="cpu", strict=True)
        assert_same_bits(model.state_dict(), expected)
    programs.run(KILLED.format(helpers=HELPERS, act="save()"), tmp_path)
    model = load_and_quantize_model(empty(build), None, tmp_path / "saved", device_map="cpu", strict=True)
    assert_same_bits(model.state_dict(), expected)


@needs_fork
def test_cache_is_right_after_kills_while_it_is_written(tmp_path, programs, small_parts_stream):
    folder = save_checkpoint(build(), tmp_path / "checkpoint", dtype=torch.bfloat16)
    printed = programs.run(killed_at("cache", "fsync", [1, 2]) + killed_at("cache", "link", [1, 2]), tmp_path)
    assert printed.split() == [str(int(signal.SIGKILL))] * 4
    device_map = {"": "cpu", "transformer.h.0": "disk", "transformer.h.1": "disk"}
    model = load_and_quantize_model(
        empty(build), "nf4", folder, device_map=device_map, offload_folder=tmp_path / "cache"
    )
    other = load_and_quantize_model(
        empty(build), "nf4", folder, device_map=device_map, offload_folder=tmp_path / "other"
    )
    assert_same_bits(model.state_dict(), other.state_dict())
    mine, theirs = contents(tmp_path / "cache"), contents(tmp_path / "other")
    assert {name: raw for name, raw in mine.items() if "/" not in name} == theirs


TOGETHER = """
import os, sys, time
sys.path.insert(0, {helpers!r})
import bitsandbytes
from functools import partial
from checkpoints import empty
from models import GPT
from bigload import BigloadError, load_and_quantize_model, quantize_checkpoint
import bigload.planning.units
bigload.planning.units.RESIDENT_BYTES = 2000
build = partial(GPT, vocab=32, width=64, layers=4)
begin, children = time.time() + 0.5, []
for number in range(4):
    child = os.fork()
    if child == 0:
        status = 0
        time.sleep(max(0, begin - time.time()))
        try:
            {act}
        except BigloadError as error:
            status = 1 + ("another run is making" in str(error) or "is not empty" in str(error))
        except BaseException:
            status = 9
        os._exit(status)
    children.append(child)
print(*[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


@needs_fork
def test_processes_quantize_into_one_offload_folder(tmp_path, programs, small_parts_stream):
    layers = partial(GPT, vocab=32, width=64, layers=4)
    folder = save_checkpoint(layers(), tmp_path / "checkpoint", dtype=torch.bfloat16)
    act = 'load_and_quantize_model(empty(build), "nf4", "checkpoint", device_map={"": "cpu", "transformer.h": "disk"}, '
    act += 'offload_folder="cache")'
    assert programs.run(TOGETHER.format(helpers=HELPERS, act=act), tmp_path).split() == ["0"] * 4
    device_map = {"": "cpu", "transformer.h": "disk"}
    for name in ("cache", "other"):
        load_and_quantize_model(empty(layers), "nf4", folder, device_map=device_map, offload_folder=tmp_path / name)
    assert contents(tmp_path / "cache") == contents(tmp_path / "other")


@needs_fork
@pytest.mark.parametrize("overwrite", [False, True])
def test_processes_quantize_into_one_target(tmp_path, programs, overwrite):
    layers = partial(GPT, vocab=32, width=64, layers=4)
    folder = save_checkpoint(layers(), tmp_path / "checkpoint", dtype=torch.bfloat16)
    options = f'model=empty(build), device="cpu", max_shard_size="20KB", overwrite={overwrite}'
    act = f'quantize_checkpoint("checkpoint", "made", "nf4", {options})'
    statuses = programs.run(TOGETHER.format(helpers=HELPERS, act=act), tmp_path).split()
    assert "0" in statuses
    assert set(statuses) <= {"0", "2"}
    quantize_checkpoint(folder, tmp_path / "alone", "nf4", model=empty(layers), device="cpu", max_shard_size="20KB")
    made, alone = contents(tmp_path / "made"), contents(tmp_path / "alone")
    assert {n: raw for n, raw in made.items() if n != "README.md"} == {
        n: r for n, r in alone.items() if n != "README.md"
    }
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "made", "alone"}


def test_lock_that_another_run_deletes_at_its_end_locks_nothing(tmp_path, monkeypatch):
    """Between its opening and its locking the file may go; a third run then would lock another one of that name."""
    folder = save_checkpoint(build(), tmp_path / "checkpoint", dtype=torch.bfloat16)
    lock, own, seen = tmp_path / ".made.lock", fcntl.flock, []

    def late(descriptor, how):
        if not seen:
            lock.unlink()
        own(descriptor, how)
        seen.append(lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat()))

    monkeypatch.setattr(fcntl, "flock", late)
    quantize_checkpoint(folder, tmp_path / "made", "nf4", model=empty(build), device="cpu")
    assert seen == [False, True]
    assert not lock.exists()


def test_a_model_of_many_files_runs_with_few_descriptors(tmp_path, small_parts_stream):
    """A weight has a file of its own in offload_folder: none of them stays open."""
    many = partial(GPT, vocab=32, width=64, layers=12)
    folder = save_checkpoint(many(), tmp_path / "checkpoint", dtype=torch.bfloat16)
    device_map = {"": "cpu", "transformer.h": "disk"}
    tokens, limits = torch.arange(8).view(1, 8), resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(number) for number, _ in open_files())
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 24, limits[1]))
        model = load_and_quantize_model(
            empty(many), "nf4", folder, device_map=device_map, offload_folder=tmp_path / "cache"
        ).eval()
        with torch.no_grad():
            found = model(tokens)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) >= 40
    model.offload.remove()
    with torch.no_grad():
        assert torch.equal(model(tokens), found)
    until = time.monotonic() + 60
    while left := [name for _, name in open_files() if str(tmp_path / "cache") in name]:  # what is read ahead still is
        assert time.monotonic() < until, left
        time.sleep(0.01)
