"""Decides whether the CPU or a GPU computes what is in host memory, from bytes and measured rates."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Sequence

import torch

from ...hardware.bandwidth import host_gb_per_s, link_gb_per_s
from ...hardware.devices import CPU
from ...notation import show
from ...quantization.expert_linears import Routing, grouped_linear
from ...quantization.formats import FourBit
from ...quantization.packed_experts import PackedExperts
from ...quantization.quantized_weight import QuantizedWeight
from ...quantization.quantizer import code_table
from .accounts import PlacedUnit

logger = logging.getLogger(__name__)

# Of what is measured: experts as large as those of mixtures of 30 billion parameters.
_FORMAT, _EXPERTS = FourBit("nf4", 64, False, torch.uint8), (5, 1536, 2048)


def is_faster_on_cpu(units: Sequence[PlacedUnit]) -> bool:
    """Whether the CPU would compute the blocks offloaded to it faster than they could be copied to a GPU.

    For one token the bytes decide: the link copies quantized weights to the GPU, the CPU reads float32 weights from its
    memory. Both rates are measured briefly. With more tokens at once the GPU has a further advantage.

    Args:
        units: all units of the plan; only those streamed from host memory count.
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


def experts_are_faster_on_cpu(
    copied: Sequence[PlacedUnit], by_cpu: Sequence[PlacedUnit], visited: int | None, dtype: torch.dtype
) -> bool:
    """Whether the CPU would compute the experts offloaded to it faster than those that a token lacks could be copied.

    Args:
        copied: all units, where experts that are offloaded are copied to GPUs, on which some stay.
        by_cpu: all units, where the CPU computes them.
        visited: how many experts of each module a token visits; None if not known.
        dtype: that they compute in.
    """
    away = [placed for placed in copied if placed.home is not None and placed.streamed_bytes]
    computed = [placed for placed in by_cpu if placed.home is not None or placed.device == CPU]
    if visited is None or not all(placed.by_cpu for placed in computed) or any(one.home != CPU for one in away):
        return False
    rate = _link_rate(away[0].device)
    if rate is None:
        return False
    sent: dict[torch.device, float] = defaultdict(float)
    for placed in away:
        sent[placed.device] += placed.token_bytes(visited)
    read, host = sum(placed.visited_bytes(visited) for placed in computed), experts_gb_per_s(dtype)
    gpu_s, cpu_s = max(sent.values()) / rate / 1e9, read / host / 1e9
    logger.info(
        "execute='auto': experts in host memory are computed on the %s: for a token that visits %d of each module, a "
        "GPU is sent %s in %.4f s at %.1f GB/s, the CPU computes %s in %.4f s at %.1f GB/s",
        "CPU" if cpu_s < gpu_s else "GPU",
        visited,
        show(int(max(sent.values()))),
        gpu_s,
        rate,
        show(read),
        cpu_s,
        host,
    )
    return cpu_s < gpu_s


def experts_gb_per_s(dtype: torch.dtype) -> float:
    """Measure how fast the CPU multiplies one token by experts in 4 bit.

    Args:
        dtype: that is computed in.

    Returns:
        GB/s (10^9 bytes of packed weights and scales a second), the best of five experts, none of them in the cache.
    """
    specs = _FORMAT.parts(_EXPERTS)
    parts = {name: torch.zeros(spec.shape, dtype=spec.dtype, device=CPU) for name, spec in specs.items()}
    parts["quant_map"] = code_table(_FORMAT.quant_type, CPU)
    weight = PackedExperts.of(QuantizedWeight.from_parts(_FORMAT, _EXPERTS, dtype, parts))
    number, _, columns = _EXPERTS
    token, best_s = torch.zeros(1, columns, dtype=dtype, device=CPU), float("inf")
    with torch.inference_mode():
        for expert in range(number):
            routing = Routing.of(torch.tensor([[expert]], device=CPU), number, False)
            begun = time.perf_counter()
            grouped_linear(token, weight, routing, None)
            best_s = min(best_s, time.perf_counter() - begun)
    return sum(parts[name].nbytes for name in ("weight", "absmax")) / number / best_s / 1e9


def _rates(device: torch.device) -> tuple[float, float] | None:
    """Return the GB/s of the link to a GPU and of host memory; None if this machine does not have that GPU."""
    link = _link_rate(device)
    return None if link is None else (link, host_gb_per_s())


def _link_rate(device: torch.device) -> float | None:
    is_there = torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    return link_gb_per_s(device) if is_there else None
