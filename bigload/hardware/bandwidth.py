"""How fast this machine moves bytes: measured in a fraction of a second."""

from __future__ import annotations

import time

import torch
from torch.nn import functional

from .layout import TensorSpec
from .pinned import HostGroup

_LINK_BYTES = 256 * 2**20
_FEATURES = 4096


def link_gb_per_s(device: torch.device) -> float:
    """Measure copies to a GPU from the kind of memory that holds offloaded weights.

    Returns:
        GB/s (10^9 bytes a second), the best of five copies of 256 MiB.
    """
    group = HostGroup({"bytes": TensorSpec(torch.uint8, (_LINK_BYTES,))}, device)
    target = torch.empty(_LINK_BYTES, dtype=torch.uint8, device=device)
    stream, best_ms = torch.cuda.current_stream(device), float("inf")
    try:
        for _ in range(5):
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begun.record(stream)
            target.copy_(group.source, non_blocking=True)
            ended.record(stream)
            ended.synchronize()
            best_ms = min(best_ms, begun.elapsed_time(ended))
    finally:
        group.release()
    return _LINK_BYTES / best_ms / 1e6


def host_gb_per_s() -> float:
    """Measure how fast the CPU multiplies one token by float32 weights, which is limited by reading the weights.

    Returns:
        GB/s (10^9 bytes of weights a second), the best of five weights of 64 MiB, none of them in the cache.
    """
    weights = torch.zeros(5, _FEATURES, _FEATURES)
    token = torch.zeros(1, _FEATURES)
    best_s = float("inf")
    with torch.inference_mode():
        for weight in weights:
            begun = time.perf_counter()
            functional.linear(token, weight)
            best_s = min(best_s, time.perf_counter() - begun)
    return weights[0].nbytes / best_s / 1e9
