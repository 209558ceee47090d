"""Times `quantize_checkpoint` against the reading and the writing of the same bytes, and what it takes of memory."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from .checkpoints import build
from .files import PIECE_BYTES, opened, read, shards, total_bytes, warm
from .host import watched_host
from .limits import describe_machine


def measure_quantizing(folder: Path, mode: str, device: str, scratch: Path, commit: str | None) -> dict[str, Any]:
    """Quantize a checkpoint into a folder that is removed again.

    Args:
        folder: the checkpoint in 16 bit; its files are brought into the page cache first.
        mode: as `BnbQuantizationConfig.from_mode` takes it.
        device: "cpu" or "cuda:N".
        scratch: where the result and the file that is written for comparison lie.
        commit: bigload's; by default what git says.

    Returns:
        The result, as docs/benchmarks.md explains it.
    """
    from bigload import quantize_checkpoint
    from bigload.io.ring import RING_BYTES
    from bigload.quantization import bnb

    files = shards(folder)
    warm(files)
    bnb.library()
    if device != "cpu":
        import torch

        torch.zeros(1, device=device)  # the context
    with tempfile.TemporaryDirectory(dir=scratch) as made:
        target = Path(made) / "made"
        model = build(folder)  # which a user would have it do, by transformers: seconds of imports
        with watched_host(on_gpu=device != "cpu") as host:
            started = time.perf_counter()
            quantize_checkpoint(folder, target, mode, model=model, device=device, progress=False)
            seconds = time.perf_counter() - started
        written = total_bytes(shards(target))
        shutil.rmtree(target)
        limits = {"read_gb_per_s": _reading(files), "write_gb_per_s": _writing(Path(made) / "file", written)}
    nbytes = total_bytes(files)
    floor = max(nbytes / limits["read_gb_per_s"], written / limits["write_gb_per_s"]) / 1e9
    return {
        "benchmark": "quantize",
        "checkpoint": folder.name,
        "mode": mode,
        "checkpoint_bytes": nbytes,
        "written_bytes": written,
        **describe_machine(device, commit),
        "limits": {name: float(f"{figure:.4g}") for name, figure in limits.items()},
        "seconds": round(seconds, 4),
        "floor_s": round(floor, 4),
        "share_of_floor": round(floor / seconds, 3),
        "ring_gib": RING_BYTES / 2**30,
        "host_over_start_gib": host.over_start_gib and round(host.over_start_gib, 4),
    }


def _reading(files: list[Path]) -> float:
    """Read files by four threads into buffers that are used again. Returns GB/s."""
    buffers = [memoryview(bytearray(PIECE_BYTES)) for _ in range(4)]
    with opened(files) as pieces:
        seconds = read(pieces, 4, lambda piece, thread, turn: buffers[thread])
    return total_bytes(files) / seconds / 1e9


def _writing(path: Path, nbytes: int) -> float:
    """Write a file of so many bytes and wait until it is lasting. Returns GB/s."""
    buffer = memoryview(os.urandom(PIECE_BYTES))
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for at in range(0, nbytes, PIECE_BYTES):
            file.write(buffer[: nbytes - at])
        os.fsync(file.fileno())
    return nbytes / (time.perf_counter() - started) / 1e9
