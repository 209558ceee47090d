"""Long use leaves nothing behind; forked and spawned processes compute the same.

`python tests/faults --long` repeats all of it more often.
"""

import json
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import empty, save_checkpoint
from comparisons import outputs
from forks import needs_fork
from long_use import GPU_USES, USES, grown, repeated, table
from models import GPT

from bigload import load_and_quantize_model

ROOT = Path(__file__).parents[2]
HELPERS = str(ROOT / "tests/helpers")
MODES = ["nf4", "nf4-dq", "int8", "none"]
build = partial(GPT, vocab=32, layers=2)


@pytest.mark.parametrize("name", USES)
def test_what_is_repeated_leaves_nothing_behind(name, device):
    assert grown(repeated(name, USES[name][2], device)) == {}


@pytest.mark.cuda
def test_captured_tokens_leave_nothing_behind():
    (name,) = GPU_USES.keys() - USES.keys()
    assert grown(repeated(name, GPU_USES[name][2], torch.device("cuda", 0))) == {}


@pytest.mark.parametrize("kind", ["memory", "tensor", "file"])
def test_what_is_left_behind_is_seen(kind, monkeypatch, tmp_path):
    left = []
    leave = {
        "memory": lambda: left.append(bytearray(b"1" * 2**22)),
        "tensor": lambda: left.append(torch.zeros(4)),
        "file": lambda: left.append((tmp_path / "file").open("w")),
    }[kind]
    monkeypatch.setitem(GPU_USES, "leave", (lambda folder, device: leave, 20, 20))
    more = grown(repeated("leave", 20, torch.device("cpu"), patience_s=0))
    assert {"memory": "host_bytes", "tensor": "objects", "file": "open_files"}[kind] in more
    for each in left if kind == "file" else ():
        each.close()


@pytest.mark.parametrize(("result", "uses"), [("long-use", USES), ("long-use-h200", GPU_USES)])
def test_table_of_the_docs_is_that_of_the_result(result, uses):
    results = json.loads((ROOT / f"benchmarks/results/{result}.json").read_text())
    assert "\n".join(table(results["rows"])) in (ROOT / "docs/reliability.md").read_text()
    assert {row["use"]: row["times"] for row in results["rows"]} == {
        name: times for name, (_, times, _) in uses.items()
    }
    assert [grown(row) for row in results["rows"]] == [{}] * len(uses)
    assert not results["failures"]


def saved(folder):
    return save_checkpoint(build(), folder / "checkpoint", dtype=torch.bfloat16)


@pytest.mark.parametrize("mode", MODES)
def test_a_loaded_model_that_is_pickled_computes_the_same(mode, device, tmp_path):
    tokens = torch.arange(8, device=device).view(1, 8)
    model = load_and_quantize_model(empty(build), mode, saved(tmp_path), device_map=device).eval()
    expected = outputs(model, tokens)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    del model
    made = pickle.loads((tmp_path / "model.pickle").read_bytes())
    assert torch.equal(outputs(made, tokens), expected)
    assert torch.equal(outputs(pickle.loads(pickle.dumps(made)), tokens), expected)


PROGRAM = """
import os, sys
sys.path.insert(0, {helpers!r})
from functools import partial
import torch
from checkpoints import empty, offloaded
from comparisons import outputs
from models import GPT
import bigload.planning.units
import bigload.quantization.cpu_forwards
from bigload import OffloadError, load_and_quantize_model

bigload.planning.units.RESIDENT_BYTES = 2000
bigload.quantization.cpu_forwards._PACKED_ROWS = 2**40  # a kernel that rounds scales, and takes no streamed weight
build, tokens, cpu = partial(GPT, vocab=32, layers=2), torch.arange(8).view(1, 8), torch.device("cpu")
away = ["transformer.h.0", "transformer.h.1", "transformer.wte"]

def load(mode="nf4"):
    return load_and_quantize_model(empty(build), mode, "checkpoint", device_map="cpu").eval()

def load_offloaded(mode="nf4"):
    return offloaded(build, "checkpoint", cpu, away, "kept", mode).eval()
"""


FORKED = """
def forked(run):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if run() else 2
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

def same():
    return torch.equal(outputs(model, tokens), expected)

def removed():
    model.offload.remove()
    return same()

def loaded():
    return torch.equal(outputs(load_offloaded(), tokens), expected) and torch.equal(outputs(load(), tokens), expected)

model = load_offloaded()
expected = outputs(load(), tokens)
forked(same)
print(same())
for run in (same, lambda: same() and removed(), removed, loaded, lambda: forked(same) or same()):
    forked(run)
    print(same())
"""


@needs_fork
def test_processes_that_are_forked_after_a_load_and_after_a_forward_compute_the_same(tmp_path, programs):
    """What the parent runs with then is as it was. torch computes with one thread there: OpenMP's survive no fork."""
    saved(tmp_path)
    printed = programs.run(PROGRAM.format(helpers=HELPERS) + FORKED, tmp_path).split()
    assert printed == ["0", "True"] * 5 + ["0", "0", "True"]


SPAWNED = """
import multiprocessing
from comparisons import send_outputs

spawn, ours, theirs = multiprocessing.get_context("spawn"), *multiprocessing.Pipe()
model = load()
expected = outputs(model, tokens)
process = spawn.Process(target=send_outputs, args=(theirs, model, tokens))
process.start()
print(torch.equal(torch.from_numpy(ours.recv()), expected))
process.join()
try:
    spawn.Process(target=send_outputs, args=(theirs, load_offloaded(), tokens)).start()
except OffloadError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_spawned_process_is_given_a_model_or_told_why_not(tmp_path, programs):
    saved(tmp_path)
    right, refused = programs.run(PROGRAM.format(helpers=HELPERS) + SPAWNED, tmp_path).splitlines()
    assert right == "True"
    assert "remove()" in refused
