"""Decides whether the CPU or a GPU computes the blocks in host memory, from bytes and measured rates."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from ...hardware.bandwidth import host_gb_per_s, link_gb_per_s
from ...hardware.devices import CPU
from ...sizes import show
from ..plan import PlacedUnit

logger = logging.getLogger(__name__)


def is_faster_on_cpu(units: Sequence[PlacedUnit]) -> bool:
    """Whether the CPU would compute the blocks offloaded to it faster than they could be copied to a GPU.

    For one token the bytes decide: the link copies quantized weights to the GPU, the CPU reads float32 weights from its
    memory. Both rates are measured briefly. With more tokens at once the GPU has a further advantage.

    Args:
        units: all units of the plan; only those streamed from host memory count.
    """
    if any(placed.cached for placed in units):
        return False  # few of their weights are copied for a token
    streamed = [placed for placed in units if placed.home == CPU and placed.streamed_bytes]
    rates = _rates(streamed[0].device) if streamed else None
    if rates is None:
        return False
    link, host = rates
    sent, read = sum(placed.streamed_bytes for placed in streamed), sum(placed.unit.fp32_bytes for placed in streamed)
    gpu_s, cpu_s = sent / link / 1e9, read / host / 1e9
    logger.info(
        "execute='auto': %d blocks in host memory are computed on the %s: a GPU is sent %s in %.4f s at %.1f GB/s, "
        "the CPU reads %s in %.4f s at %.1f GB/s",
        len(streamed),
        "CPU" if cpu_s < gpu_s else "GPU",
        show(sent),
        gpu_s,
        link,
        show(read),
        cpu_s,
        host,
    )
    return cpu_s < gpu_s


def _rates(device: torch.device) -> tuple[float, float] | None:
    """Return the GB/s of the link to a GPU and of host memory; None if this machine does not have that GPU."""
    is_there = torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    return (link_gb_per_s(device), host_gb_per_s()) if is_there else None
