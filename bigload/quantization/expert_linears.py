"""Products of many pairs of a token and an expert with packed weights, with gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import expert_launches as launches
from .packed_experts import PackedExperts


@dataclass
class ExpertLimits:
    """Up to which sizes experts are computed in which way on a GPU. Measured on an H100; may be set at any time.

    Attributes:
        gemv_tokens: up to so many tokens each pair is multiplied by itself.
        grouped_tokens: up to so many the pairs of an expert are multiplied together, its weight dequantized on the way.
            Above, and in backward, the experts that have pairs are dequantized into memory.
        scratch_bytes: the most memory that they are dequantized into; more is done in several steps.

    Examples:
        >>> from bigload.quantization.expert_linears import expert_limits
        >>> expert_limits.grouped_tokens
        256
    """

    gemv_tokens: int = 3
    grouped_tokens: int = 256
    scratch_bytes: int = 384 * 2**20


expert_limits = ExpertLimits()


def most_scratch_bytes(shapes: Iterable[tuple[int, int, int]], dtype: torch.dtype) -> int:
    """Return the most memory that weights are dequantized into at once.

    Args:
        shapes: of the weights of experts, (E, out_features, in_features).
        dtype: that is computed in.

    Examples:
        >>> most_scratch_bytes([(128, 1536, 2048), (128, 2048, 768)], torch.bfloat16) // 2**20
        384
        >>> most_scratch_bytes([(8, 64, 64)], torch.bfloat16)
        65536
    """
    return min(expert_limits.scratch_bytes, max(map(math.prod, shapes), default=0) * dtype.itemsize)


@dataclass(frozen=True, eq=False)
class Routing:
    """Which experts compute which tokens. A pair is one choice of one token; pair p belongs to token p // k.

    Attributes:
        ids: the expert of each pair, (T, k), contiguous; E and more for none.
        order: the pairs in the order of their experts, (T * k,), those of none last.
        ends: where each expert's pairs end in that order, (E,), int32.
        by_kernels: whether Triton's kernels compute what can be computed by them.
    """

    ids: torch.Tensor
    order: torch.Tensor
    ends: torch.Tensor
    by_kernels: bool

    @classmethod
    def of(cls, ids: torch.Tensor, num_experts: int, by_kernels: bool) -> Routing:
        """Sort the pairs of `ids`, (T, k), without waiting for a GPU; numbers below 0 become E."""
        ids = ids.masked_fill(ids < 0, num_experts)  # of none, as E and more are
        flat = ids.reshape(-1).clamp(max=num_experts)
        order = torch.argsort(flat, stable=True)
        counts = torch.zeros(num_experts + 1, dtype=torch.int32, device=ids.device)
        counts.scatter_add_(0, flat.long(), torch.ones_like(flat, dtype=torch.int32))
        return cls(ids.contiguous(), order, counts[:num_experts].cumsum(0, dtype=torch.int32), by_kernels)

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.ends)

    @cached_property
    def in_order(self) -> torch.Tensor:
        """The numbers of the pairs when they are in the order of the experts."""
        return torch.arange(len(self.order), device=self.order.device)

    @cached_property
    def tokens(self) -> torch.Tensor:
        """The token of each pair, in the order of the experts."""
        return self.order // self.ids.shape[-1]

    @cached_property
    def experts(self) -> torch.Tensor:
        """The expert of each pair, in the order of the experts; the last for pairs of none."""
        return self.ids.view(-1)[self.order].clamp(max=self.num_experts - 1)

    @cached_property
    def places(self) -> torch.Tensor:
        """Where each pair is in the order of the experts."""
        places = torch.empty_like(self.order)
        places[self.order] = torch.arange(len(places), device=places.device)
        return places

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Return the row of x, (T, H), of each pair, (pairs, H), in the order of the experts."""
        if self.by_kernels:
            return _Gather.apply(x, self)  # type: ignore[no-any-return, no-untyped-call]
        return x[self.tokens]

    def combine(self, y: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """Add up the outputs of each token's experts.

        Args:
            y: (pairs, H), in the order of the experts; rows of pairs of no expert may hold anything.
            weights: of the pairs, (T, k); None for 1.

        Returns:
            (T, H), in the dtype of y, or a wider one of the weights.
        """
        if self.by_kernels:
            return _Combine.apply(y, weights, self)  # type: ignore[no-any-return, no-untyped-call]
        absent = (self.ids >= self.num_experts).unsqueeze(-1)
        y = y[self.places].view(*self.ids.shape, y.shape[-1]).masked_fill(absent, 0)
        return (y if weights is None else y * weights.unsqueeze(-1)).sum(1)


class _Gather(torch.autograd.Function):
    """Its gradients are added up by the kernel, in the order of the pairs: torch would add them as they come."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        ctx.routing = routing
        return x[routing.tokens]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        routing = ctx.routing
        return launches.combine(grad.contiguous(), routing.ids, None, routing.num_experts, routing.places), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, weights: torch.Tensor | None, routing: Routing) -> torch.Tensor:
        y, weights = y.contiguous(), None if weights is None else weights.contiguous()
        ctx.routing = routing
        ctx.save_for_backward(y, weights)
        return launches.combine(y, routing.ids, weights, routing.num_experts, routing.places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        y, weights = ctx.saved_tensors
        routing = ctx.routing
        made = launches.combine_backward(grad.contiguous(), y, routing.order, routing.ids, weights, routing.num_experts)
        return *made, None


def grouped_linear(x: torch.Tensor, weight: PackedExperts, routing: Routing, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply the pairs of each expert with its weight.

    Args:
        x: (pairs, in_features), in the order of the experts.
        weight: of the experts.
        routing: of the pairs.
        bias: (E, out_features) or None.

    Returns:
        (pairs, out_features), in the dtype of x; any values for pairs of no expert. Has gradients to x.
    """
    out: torch.Tensor = _GroupedLinear.apply(x, weight, routing)  # type: ignore[no-untyped-call]
    if bias is None:
        return out
    added = bias[routing.experts].to(out.device, out.dtype)  # biases of experts that a CPU computes may be on a GPU
    if bias.requires_grad:  # what comes back to pairs of no expert may be anything too
        added = added.masked_fill((routing.ids.view(-1)[routing.order] >= routing.num_experts).unsqueeze(-1), 0)
    return out + added


class _GroupedLinear(torch.autograd.Function):
    """Keeps only the packed weight for backward, which dequantizes it again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: PackedExperts, routing: Routing) -> torch.Tensor:
        ctx.weight, ctx.routing = weight, routing
        if routing.by_kernels and len(routing.ids) <= expert_limits.grouped_tokens:
            return launches.grouped(x.contiguous(), weight, routing.in_order, routing.ends, 1, None)
        return _multiplied(x, weight, routing, transposed=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _multiplied(grad, ctx.weight, ctx.routing, transposed=True), None, None


def _multiplied(x: torch.Tensor, weight: PackedExperts, routing: Routing, transposed: bool) -> torch.Tensor:
    """Return x @ W.T of each expert, or x @ W if transposed."""
    has_aligned_rows = weight.shape[1] % 8 == 0  # grouped_mm takes rows of a multiple of 16 bytes
    if routing.by_kernels and x.dtype == torch.bfloat16 and has_aligned_rows and _grouped_mm is not None:
        return _in_steps(x.contiguous(), weight, routing, transposed)
    return _by_expert(x, weight, routing, transposed)


_grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def _in_steps(x: torch.Tensor, weight: PackedExperts, routing: Routing, transposed: bool) -> torch.Tensor:
    """Dequantize all experts that have pairs, some of the output's features at a time; does not wait for the GPU."""
    experts, rows, columns = weight.shape
    features, summed = (columns, rows) if transposed else (rows, columns)
    out, steps = None, _steps(features, experts * summed * x.element_size(), max(64, weight.state.blocksize))
    for step in steps:
        height, width = (slice(0, rows), step) if transposed else (step, slice(0, columns))
        values = launches.dequantize_visited(weight, routing.ends, height, width, x.dtype)
        assert _grouped_mm is not None
        made: torch.Tensor = _grouped_mm(x, values if transposed else values.mT, offs=routing.ends)
        if len(steps) == 1:
            return made
        out = x.new_empty(len(x), features) if out is None else out
        out[:, step] = made
        del values, made  # before the next step's are allocated
    assert out is not None
    return out


def _steps(features: int, bytes_of_one: int, multiple: int) -> list[slice]:
    """Cut features into steps of about the same size, of whole multiples, within `scratch_bytes` if they can be."""
    most = max(1, expert_limits.scratch_bytes // (bytes_of_one * multiple))
    parts = -(-features // multiple)
    each = -(-parts // -(-parts // most)) * multiple
    return [slice(begin, min(begin + each, features)) for begin in range(0, features, each)]


def _by_expert(x: torch.Tensor, weight: PackedExperts, routing: Routing, transposed: bool) -> torch.Tensor:
    """Multiply by one dequantized expert after the other; waits for a GPU once, for the numbers of their pairs."""
    _, rows, columns = weight.shape
    out = x.new_zeros(len(x), columns if transposed else rows)
    begin = 0
    for expert, end in enumerate(routing.ends.tolist()):
        if end > begin:
            values = weight.dequantize(expert, x.dtype)
            torch.mm(x[begin:end], values if transposed else values.t(), out=out[begin:end])
        begin = end
    return out
