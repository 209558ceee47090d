"""What the machine is and what it can do with a checkpoint's files: the limits that a load is held against."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from bigload.quantization.formats import FourBit, Int8
from bigload.quantization.quantizer import quantize

from .files import PIECE_BYTES, Piece, cores, drop, opened, read, shards, total_bytes, warm
from .floors import read_and_copy_s

PACKAGES = (
    "torch",
    "bitsandbytes",
    "transformers",
    "accelerate",
    "safetensors",
    "fastsafetensors",
    "instanttensor",
    "runai-model-streamer",
)
THREADS = (1, 2, 4, 8, 12, 16)
# The buffers that all threads have together, as much as bigload's ring: what is read into more falls out of the CPU's
# caches, and into less it hardly leaves them.
RING_BYTES = 128 * 2**20
COPIED_BYTES = 16 * 2**20  # at once: the link is slower with less
MOST_BYTES = 8 * 10**9  # read for one figure, so that a large checkpoint takes no longer
# Of the weight that is quantized; bitsandbytes takes seconds for more on a CPU.
_SHAPE, _SHAPE_ON_GPU = (2048, 2048), (2048, 4096)
_QUANTIZING_S = 0.5  # on a CPU, by each
FORMATS: dict[str, FourBit | Int8] = {
    "nf4": FourBit("nf4", 64, False, torch.uint8),
    "fp4": FourBit("fp4", 64, False, torch.uint8),
    "int8": Int8(),
}
# Modes whose bytes go into the model as they are.
UNCHANGED = ("none", "stored")


def describe_machine(device: str, commit: str | None = None) -> dict[str, Any]:
    """Say what is measured, and on what.

    Args:
        device: "cpu" or "cuda:N".
        commit: bigload's; by default what git says.
    """
    on_gpu = device != "cpu"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "device_memory_gib": _gib(torch.cuda.get_device_properties(device).total_memory) if on_gpu else None,
        "cores": cores(),
        "memory_gib": _gib(psutil.virtual_memory().total),
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "commit": commit or _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _gib(nbytes: int) -> float:
    return round(nbytes / 2**30, 1)


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """Give the commit's short name, marked when tracked files differ from it; empty where there is no git."""
    git = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent)]
    asked = (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    try:
        name, changed = (subprocess.run([*git, *words], capture_output=True, text=True).stdout for words in asked)
    except OSError:
        return ""
    return name.strip() + ("-dirty" if changed else "")


def floor(nbytes: int, limits: Mapping[str, Any], mode: str, *, cold: bool = False) -> float | None:
    """Give the seconds that no load of so many bytes can beat: those of the slowest stage, the others overlapping it.

    Onto a GPU, from the page cache, they are those of a program in C that reads and copies and does nothing else. Where
    that was not measured, the stages are the reading, from the page cache at the best count of threads, or from the
    disk; and the link to the GPU. On the CPU there is no link, and bytes that stay as they are must be written into
    memory as large as the model, where bytes to be quantized pass through small buffers; the quantizing itself is not
    counted.

    Args:
        nbytes: the checkpoint's.
        limits: what `measure_limits` gave.
        mode: the quantization mode, "none" or "stored".
        cold: the files are not in the page cache.

    Returns:
        None where a stage was not measured.
    """
    link, together = limits.get("link_gb_per_s"), limits.get("read_and_copy_gb_per_s")
    if together and not cold:
        return nbytes / 1e9 / float(together)
    if cold:
        reading = limits.get("cold_disk_gb_per_s")
    elif link is None and mode in UNCHANGED:
        reading = limits.get("memory_gb_per_s")
    else:
        reading = max(limits.get("page_cache_gb_per_s", {}).values(), default=None)
    if reading is None:
        return None
    return nbytes / 1e9 / float(reading if link is None else min(reading, link))


def measure_limits(folder: Path | None, device: str, *, cold: bool = False) -> dict[str, Any]:
    """Measure what the machine can do.

    Args:
        folder: the checkpoint whose files are read; None measures only what needs no files.
        device: "cpu" or "cuda:N".
        cold: also read the files from the disk, which drops them from the page cache.

    Returns:
        Speeds in GB/s (10^9), by their names; see docs/benchmarks.md.
    """
    limits: dict[str, Any] = {}
    if device != "cpu":
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)  # the context, which is no part of what pinning takes
    started = time.perf_counter()
    ring = _ring(pinned=device != "cpu")
    if device != "cpu":
        limits["pinning_s_per_gib"] = (time.perf_counter() - started) * 2**30 / RING_BYTES
        limits["link_gb_per_s"] = _link(ring.split(COPIED_BYTES), device)
    if folder is not None:
        if device != "cpu":
            limits |= _reading_and_copying(shards(folder))
        limits |= _reading(shards(folder), ring.split(PIECE_BYTES), with_memory=device == "cpu", cold=cold)
    del ring
    limits["quantize_gb_per_s"] = {name: _quantizing(name, device) for name in FORMATS}
    return {name: _rounded(figure) for name, figure in limits.items()}


def _rounded(figure: Any) -> Any:
    if isinstance(figure, dict):
        return {name: _rounded(inner) for name, inner in figure.items()}
    return figure if figure is None else float(f"{figure:.4g}")


def _ring(*, pinned: bool) -> torch.Tensor:
    ring = torch.empty(RING_BYTES, dtype=torch.uint8, pin_memory=pinned)
    # Memory that was never touched is not there yet; what is pinned is.
    return ring if pinned else ring.fill_(1)


def _link(slots: Sequence[torch.Tensor], device: str) -> float:
    targets = [torch.empty_like(slot, device=device) for slot in slots]

    def copy_all() -> None:
        for slot, target in zip(slots, targets, strict=True):
            target.copy_(slot, non_blocking=True)

    return RING_BYTES / _gpu_seconds(copy_all, calls=16) / 1e9


def _gpu_seconds(call: Callable[[], object], calls: int) -> float:
    """Give the seconds a call takes on the GPU's current stream, the mean of many that follow one another."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    call()
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / calls


def _reading(files: Sequence[Path], slots: Sequence[torch.Tensor], *, with_memory: bool, cold: bool) -> dict[str, Any]:
    views = [memoryview(slot.numpy()) for slot in slots]  # type: ignore[arg-type]
    limits: dict[str, Any] = {}
    if cold:
        limits["cached_share_after_drop"] = drop(files)
        with opened(files, MOST_BYTES) as pieces:
            limits["cold_disk_gb_per_s"] = _ring_speed(pieces, min(16, 2 * cores()), views)
    warm(files)
    with opened(files, MOST_BYTES) as pieces:
        speeds = {
            count: max(_ring_speed(pieces, count, views) for _ in range(2))
            for count in THREADS
            if count <= max(2, cores())
        }
    limits["page_cache_gb_per_s"] = {str(count): speed for count, speed in speeds.items()}
    if with_memory and total_bytes(files) <= psutil.virtual_memory().total / 2:
        limits["memory_gb_per_s"] = _memory_speed(files, max(speeds, key=lambda count: speeds[count]))
    return limits


def _reading_and_copying(files: Sequence[Path]) -> dict[str, Any]:
    warm(files)
    found = read_and_copy_s(files, gpus=1)
    if not found:
        return {}
    return {"read_and_copy_gb_per_s": total_bytes(files) / 1e9 / min(found.values()), "read_and_copy_s": found}


def _ring_speed(pieces: Sequence[Piece], threads: int, views: Sequence[memoryview]) -> float:
    """Read pieces by threads that each reuse their own buffers, as readers into a ring do. Returns GB/s."""
    own = [views[thread::threads] for thread in range(threads)]
    seconds = read(pieces, threads, lambda piece, thread, turn: own[thread][turn % len(own[thread])])
    return sum(piece.nbytes for piece in pieces) / seconds / 1e9


def _memory_speed(files: Sequence[Path], threads: int) -> float:
    """Read files into memory of their size that was touched before, the better of two times. Returns GB/s."""
    nbytes = total_bytes(files)
    view = memoryview(torch.empty(nbytes, dtype=torch.uint8).fill_(1).numpy())  # type: ignore[arg-type]
    with opened(files) as pieces:
        seconds = min(read(pieces, threads, lambda piece, thread, turn: view[piece.position :]) for _ in range(2))
    return nbytes / seconds / 1e9


def _quantizing(name: str, device: str) -> dict[str, float]:
    """Quantize one weight over and over, by bitsandbytes' own call and by bigload's. Returns GB/s of 16-bit input."""
    weight = torch.randn(_SHAPE if device == "cpu" else _SHAPE_ON_GPU, device=device).bfloat16()
    calls = {
        "bitsandbytes": _bitsandbytes_call(name, weight),
        "bigload": lambda: quantize(weight, FORMATS[name]),
    }
    seconds = _best_seconds if device == "cpu" else lambda call: _gpu_seconds(call, calls=50)
    return {who: weight.nbytes / seconds(call) / 1e9 for who, call in calls.items()}


def _bitsandbytes_call(name: str, weight: torch.Tensor) -> Callable[[], object]:
    import bitsandbytes.functional as kernels

    if name == "int8":
        return lambda: kernels.int8_vectorwise_quant(weight.half())  # the one dtype that it takes
    return lambda: kernels.quantize_4bit(weight, quant_type=name, blocksize=64)


def _best_seconds(call: Callable[[], object]) -> float:
    """Give the fewest seconds that a call took, of at least four and of as many as there is time for."""
    taken: list[float] = []
    while len(taken) < 4 or sum(taken) < _QUANTIZING_S:
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return min(taken)
