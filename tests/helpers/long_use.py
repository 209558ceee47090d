"""What is done again and again, and what the process holds before and after: `python tests/faults --long` does it all.

Each use is repeated a tenth of the times first: what is made once in a process, or grows to a size and stays, is made
then.
"""

import ctypes
import gc
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import empty, offloaded, save_checkpoint
from comparisons import outputs
from models import GPT, llama
from resources import open_files

from bigload import capture_decode, load_and_quantize_model
from bigload.offload.engine import Engine

MODES = ("nf4", "nf4-dq", "int8", "none")
HOST_BYTES = 2**25  # by which allocators may still grow after the first repetitions, in pieces of their own size
TOKENS_A_TIME = 100
_OURS = {"torch", "bitsandbytes", "bigload"}
_libc = ctypes.CDLL(None)
build = partial(GPT, vocab=256, width=256, layers=4)


@dataclass
class Held:
    """What this process holds.

    Attributes:
        host_bytes: memory of its own, without what files back.
        device_bytes: what torch has allocated on the GPU.
        objects: of the classes of torch, bitsandbytes and bigload, tensors among them. Those of other classes grow
            where something watches the process, such as a measurement of coverage.
    """

    host_bytes: int
    device_bytes: int
    objects: int
    open_files: int
    threads: int

    @classmethod
    def now(cls):
        _finish_reads()
        for _ in range(2):  # what finalizers let go of is found by the second
            gc.collect()
        if hasattr(_libc, "malloc_trim"):
            _libc.malloc_trim(0)  # or its allocator keeps what is free, more of it or less
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return cls(
            host_bytes=int(status["RssAnon"].split()[0]) * 1024,
            device_bytes=torch.cuda.memory_allocated() if torch.cuda.is_available() else 0,
            objects=sum(str(type(each).__module__).partition(".")[0] in _OURS for each in gc.get_objects()),
            open_files=len(open_files()),
            threads=threading.active_count(),
        )


def _finish_reads():
    """Wait for what engines read ahead for the next forward."""
    for engine in [each for each in gc.get_objects() if type(each) is Engine]:
        engine.pool.copier.finish()


def loads(folder, device):
    """Load a model in one mode after the other, run it, and let go of it."""
    tokens, expected, turn = torch.arange(16, device=device).view(2, 8), {}, iter(range(10**9))

    def once():
        mode = MODES[next(turn) % len(MODES)]
        model = load_and_quantize_model(empty(build), mode, folder / "checkpoint", device_map=device).eval()
        _check(outputs(model, tokens), expected, mode)

    return once


def loads_of_offloaded(folder, device):
    """Load a model of which four blocks and the embedding are offloaded, run it, and let go of it."""
    tokens, expected = torch.arange(16, device=device).view(2, 8), {}
    return lambda: _check(outputs(_offloaded(folder, device), tokens), expected)


def forwards(folder, device):
    """Run a model of which four blocks and the embedding are offloaded."""
    tokens, expected, model = torch.arange(16, device=device).view(2, 8), {}, _offloaded(folder, device)
    return lambda: _check(outputs(model, tokens), expected)


def threads(folder, device):
    """Run two offloaded models, each in two threads at once."""
    models = _offloaded(folder, device), _offloaded(folder, device, "nf4-dq")
    tokens = [torch.arange(count, device=device).view(1, count) for count in (5, 12)]
    expected = {pair: outputs(models[pair[0]], tokens[pair[1]]) for pair in ((0, 0), (0, 1), (1, 0), (1, 1))}

    def once():
        with ThreadPoolExecutor(4) as pool:
            runs = {(m, t): pool.submit(outputs, models[m], tokens[t]) for m, t in expected}
            assert all(torch.equal(run.result(), expected[pair]) for pair, run in runs.items())

    return once


def captured_tokens(folder, device):
    """Generate 100 tokens by captured decode steps."""
    small = partial(llama, max_position_embeddings=128)
    torch.manual_seed(0)
    save_checkpoint(small().bfloat16(), folder / "llama")
    model = load_and_quantize_model(empty(small), "nf4", folder / "llama", device_map=device).eval()
    capture, prompt, expected = capture_decode(model), torch.arange(1, 6, device=device).view(1, 5), {}
    how = {"max_new_tokens": TOKENS_A_TIME, "min_new_tokens": TOKENS_A_TIME, "do_sample": False, "pad_token_id": 0}

    def once():
        before = capture.stats().replayed
        tokens = model.generate(prompt, cache_implementation="static", disable_compile=True, **how)
        _check(tokens, expected)
        assert capture.stats().replayed - before >= TOKENS_A_TIME - 3, capture.stats()

    return once


# What is done -> how, how often by hand, and how often by each run of the tests.
USES = {
    "load, run, let go": (loads, 200, 16),
    "load with offloaded blocks, run, let go": (loads_of_offloaded, 200, 16),
    "run offloaded blocks": (forwards, 1000, 30),
    "run two offloaded models in four threads": (threads, 250, 20),
}
GPU_USES = USES | {"generate 100 tokens by captured steps": (captured_tokens, 20, 20)}


def _offloaded(folder, device, mode="nf4"):
    away = [f"transformer.h.{number}" for number in range(4)] + ["transformer.wte"]
    return offloaded(build, folder / "checkpoint", device, away, folder / f"kept as {mode}", mode).eval()


def _check(found, expected, name=""):
    """Compare with what was found the first time."""
    assert torch.equal(found, expected.setdefault(name, found))


@contextmanager
def prepared(name, device):
    """Give a function that does something once, in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr("bigload.planning.units.RESIDENT_BYTES", 2000)
        torch.manual_seed(0)
        save_checkpoint(build(), Path(folder) / "checkpoint", dtype=torch.bfloat16)
        yield GPU_USES[name][0](Path(folder), device)


def repeated(name, times, device, patience_s=60):
    """Do something again and again. Returns what was held before and after, as a row of the results.

    Args:
        patience_s: how long threads of models that are gone may take to end.
    """
    begun = time.monotonic()
    with prepared(name, device) as once:
        for _ in range(max(4, times // 10)):
            once()
        before = Held.now()
        for _ in range(times):
            once()
        row = {"use": name, "times": times, "seconds": round(time.monotonic() - begun), "before": asdict(before)}
        row["after"], until = asdict(Held.now()), time.monotonic() + patience_s
        while grown(row) and time.monotonic() < until:
            time.sleep(0.1)
            row["after"] = asdict(Held.now())
    return row


def grown(row):
    """Return what has grown with the repetitions: nothing, if all is well."""
    limits = {"host_bytes": HOST_BYTES, "device_bytes": 0, "objects": row["times"] // 2, "open_files": 0, "threads": 0}
    grew = {name: row["after"][name] - held for name, held in row["before"].items()}
    return {name: much for name, much in grew.items() if much > limits[name]}


def table(rows):
    """Return a table in Markdown: a line for each use."""
    lines = ["| what | times | own memory, MiB | on the GPU, MiB | objects | open files | threads |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["use"], f"{row['times']:,}"]
        for name in row["before"]:
            before, after = row["before"][name], row["after"][name]
            if name.endswith("_bytes"):
                before, after = round(before / 2**20), round(after / 2**20)
            cells.append(f"{before:,} -> {after:,}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines
