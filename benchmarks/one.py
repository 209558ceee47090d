"""Loads in this process, one peer in one mode: seconds and memory. `load` runs it in a process for each row."""

from __future__ import annotations

import gc
import statistics
import time
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

from .files import config_of, drop, shards
from .host import GIB, HostMemory, watched_host
from .peers import Peer

# Loads after the first: as many, but no further one after so many seconds.
_LATER, _LATER_S = 5, 10.0


def measure(folder: Path, peer: Peer, mode: str, device: str, *, cold: bool = False) -> dict[str, Any]:
    """Load again and again, or once from a cold disk.

    Args:
        folder: the checkpoint.
        peer: how to load it.
        mode: one of `peers.MODES`.
        device: "cpu" or "cuda:N".
        cold: drop the files from the page cache before the load.

    Returns:
        The figures of a row, as docs/benchmarks.md explains them.
    """
    row: dict[str, Any] = {"imports_s": _imports(peer, folder), "context_s": _context(device)}
    first = last = _load_once(peer, folder, mode, device, cold=cold, watched=True)
    later_s: list[float] = []
    while not cold and len(later_s) < _LATER and (not later_s or sum(later_s) < _LATER_S):
        last = _load_once(peer, folder, mode, device, cold=False, watched=False)
        later_s.append(last.pop("load_s"))
    row |= {"first_s": first.pop("load_s"), "second_s": None, **last}
    if later_s:
        row |= {"second_s": statistics.median(later_s), "later_s": [round(each, 4) for each in later_s]}
    # Of the first load: what the process keeps for the next one is part of what it takes.
    row |= {name: first[name] for name in ("host_over_start_gib", "host_kept_gib")}
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}


def _imports(peer: Peer, folder: Path) -> float:
    started = time.perf_counter()
    for name in peer.modules_for(config_of(folder)):
        import_module(name)
    return time.perf_counter() - started


def _context(device: str) -> float | None:
    """Make the first tensor on the GPU, and with it CUDA's context. Returns seconds."""
    if device == "cpu":
        return None
    import torch

    started = time.perf_counter()
    torch.cuda.set_device(device)
    torch.zeros(1, device=device)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def _load_once(peer: Peer, folder: Path, mode: str, device: str, *, cold: bool, watched: bool) -> dict[str, Any]:
    """Load, and let go of what was loaded, so that the next load finds the memory as this one did."""
    import torch

    on_gpu = device != "cpu"
    figures: dict[str, Any] = {}
    started = time.perf_counter()
    model = peer.build(folder) if peer.build else None
    figures["build_s"] = time.perf_counter() - started if peer.build else None
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if cold:
        figures["cached_share_after_drop"] = drop(shards(folder))
    before = torch.cuda.memory_allocated() if on_gpu else 0
    with watched_host(on_gpu=on_gpu) if watched else nullcontext(HostMemory()) as host:
        started = time.perf_counter()
        loaded = peer.load(model, folder, mode, device)
        if on_gpu:
            torch.cuda.synchronize()
        figures["load_s"] = time.perf_counter() - started
    final = torch.cuda.memory_allocated() if on_gpu else 0
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    figures["gpu_final_gib"] = (final - before) / GIB if on_gpu else None
    figures["gpu_peak_over_final_gib"] = (peak - final) / GIB if on_gpu else None
    figures |= {"host_over_start_gib": host.over_start_gib, "host_kept_gib": host.kept_gib}
    del loaded
    return figures
