"""Pairs of a token and an expert, in the order of the experts, and their products with packed weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .packed_experts import PackedExperts


@dataclass(frozen=True, eq=False)
class Routing:
    """Which experts compute which tokens. A pair is one choice of one token; pair p belongs to token p // k.

    Attributes:
        ids: the expert of each pair, (T, k); E and more for none.
        order: the pairs in the order of their experts, (T * k,), those of none last.
        ends: where each expert's pairs end in that order, (E,), int32.
    """

    ids: torch.Tensor
    order: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def of(cls, ids: torch.Tensor, num_experts: int) -> Routing:
        """Sort the pairs of `ids`, (T, k), without waiting for a GPU."""
        flat = ids.reshape(-1).clamp(max=num_experts)
        order = torch.argsort(flat, stable=True)
        counts = torch.zeros(num_experts + 1, dtype=torch.int32, device=ids.device)
        counts.scatter_add_(0, flat.long(), torch.ones_like(flat, dtype=torch.int32))
        return cls(ids, order, counts[:num_experts].cumsum(0, dtype=torch.int32))

    @property
    def tokens(self) -> torch.Tensor:
        """The token of each pair, in the order of the experts."""
        return self.order // self.ids.shape[-1]

    @property
    def experts(self) -> torch.Tensor:
        """The expert of each pair, in the order of the experts; the last for pairs of none."""
        return self.ids.reshape(-1)[self.order].clamp(max=len(self.ends) - 1)

    def combine(self, y: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """Add up the outputs of each token's experts.

        Args:
            y: (pairs, H), in the order of the experts.
            weights: of the pairs, (T, k); None for 1.

        Returns:
            (T, H), in the wider dtype of the two.
        """
        back = torch.empty_like(self.order)
        back[self.order] = torch.arange(len(back), device=back.device)
        absent = self.ids >= len(self.ends)
        y = y[back].view(*self.ids.shape, -1).masked_fill(absent.unsqueeze(-1), 0)
        if weights is not None:
            y = y * weights.unsqueeze(-1)
        return y.sum(1)


def grouped_linear(x: torch.Tensor, weight: PackedExperts, routing: Routing, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply the pairs of each expert with its weight.

    Args:
        x: (pairs, in_features), in the order of the experts.
        weight: of the experts.
        routing: of the pairs.
        bias: (E, out_features) or None.

    Returns:
        (pairs, out_features), in the dtype of x; anything for pairs of no expert. Has gradients to x.
    """
    out: torch.Tensor = _GroupedLinear.apply(x, weight, routing)  # type: ignore[no-untyped-call]
    return out if bias is None else out + bias[routing.experts].to(out.dtype)


class _GroupedLinear(torch.autograd.Function):
    """Keeps only the packed weight for backward, which dequantizes it again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: PackedExperts, routing: Routing) -> torch.Tensor:
        ctx.weight, ctx.routing = weight, routing
        return _by_expert(x, weight, routing, transposed=False)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _by_expert(grad, ctx.weight, ctx.routing, transposed=True), None, None


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
