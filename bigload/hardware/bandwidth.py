"""How fast this machine moves bytes, measured for a moment."""

from __future__ import annotations

import time

import torch
from torch.nn import functional

from .layout import TensorSpec
from .pinned import HostGroup

_LINK_BYTES = 256 * 2**20
_FEATURES = 4096


def link_gb_per_s(device: torch.device) -> float:
    """Measure the copies onto a GPU from memory such as offloaded weights rest in.

    Returns:
        10^9 bytes a second: the best of five copies, 256 MiB each.
    """
    rest = HostGroup({"bytes": TensorSpec(torch.uint8, (_LINK_BYTES,))}, device)
    target = torch.empty(_LINK_BYTES, dtype=torch.uint8, device=device)
    stream, best_ms = torch.cuda.current_stream(device), float("inf")
    try:
        for _ in range(5):
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begun.record(stream)
            target.copy_(rest.source, non_blocking=True)
            ended.record(stream)
            ended.synchronize()
            best_ms = min(best_ms, begun.elapsed_time(ended))
    finally:
        rest.release()
    return _LINK_BYTES / best_ms / 1e6


def host_gb_per_s() -> float:
    """Measure how fast the CPU multiplies one token by weights in float32, which is as fast as it reads them.

    Returns:
        10^9 bytes of weights a second: the best of five times 64 MiB, all different, as those of a model are.
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
