"""Where blocks that rest in host memory are computed: decided by what must be moved, and how fast that is here."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from ..hardware.bandwidth import host_gb_per_s, link_gb_per_s
from ..hardware.devices import CPU
from ..sizes import show
from .plan import PlacedUnit

logger = logging.getLogger(__name__)


def is_faster_on_cpu(units: Sequence[PlacedUnit]) -> bool:
    """Whether the CPU would compute what rests in host memory sooner than a GPU could be sent it.

    For one token that is a question of bytes: a GPU is sent what is quantized over its link, the CPU reads float32 from
    its memory. Both rates are measured for a moment. With more tokens at once the GPU only gains.

    Args:
        units: placed, with what is streamed from host memory among them.
    """
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
    """Measure the link to a GPU and the host's memory; None where there is no such GPU, as in a plan for another."""
    is_there = torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    return (link_gb_per_s(device), host_gb_per_s()) if is_there else None
