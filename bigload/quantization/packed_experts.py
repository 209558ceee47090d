"""The packed weights of fused experts, and their values: one quant_state for all experts, each a slice of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """One weight of all experts, as kernels take it; nothing is copied.

    An expert begins with a block of its own, so that its packed bytes and scales are a slice. Double quantization has
    blocks of scales too, in which an expert may begin anywhere: they are indexed from the first expert's scale.

    Attributes:
        data: packed bytes, uint8, contiguous.
        scales: of the blocks, contiguous; fp32 or, with double quantization, uint8.
        state: the `bitsandbytes.functional.QuantState`, whose shape is (E, out_features, in_features).
    """

    data: torch.Tensor
    scales: torch.Tensor
    state: Any

    @classmethod
    def of(cls, parameter: Any) -> PackedExperts:
        """Return the view of a `Params4bit`."""
        state = parameter.quant_state
        data = parameter.data
        return cls(data if data.dtype == torch.uint8 else data.view(torch.uint8), state.absmax, state)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, out_features, in_features)."""
        return tuple(self.state.shape)

    def dequantize(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the values of one expert, (out_features, in_features)."""
        number, rows, columns = self.shape
        # One row: bitsandbytes' CPU kernel begins new blocks in each.
        flat = torch.ops.bitsandbytes.dequantize_4bit.default(
            self.data.view(number, -1)[expert].view(-1, 1),
            self.plain_scales(expert),
            self.state.blocksize,
            self.state.quant_type,
            [1, rows * columns],
            dtype,
        )
        return flat.view(rows, columns)  # type: ignore[no-any-return]

    def plain_scales(self, expert: int) -> torch.Tensor:
        """Return the scales of one expert in fp32, (blocks,)."""
        each = self.scales.numel() // self.shape[0]
        begin, end = expert * each, (expert + 1) * each
        if not self.state.nested:
            return self.scales.view(-1)[begin:end]
        inner = self.state.state2
        first = begin // inner.blocksize  # the block of scales in which the expert's begin
        values = torch.ops.bitsandbytes.dequantize_blockwise.default(
            self.scales.view(-1)[first * inner.blocksize : end],
            inner.absmax[first:],
            inner.code,
            inner.blocksize,
            inner.dtype,
        )
        return values[begin - first * inner.blocksize :] + self.state.offset  # type: ignore[no-any-return]


def damage(parameter: Any) -> str:
    """Return why a parameter holds no packed weight any more, and what to do; "" if it does."""
    if getattr(parameter, "quant_state", None) is None:
        return "quantized when it was loaded, but the weight there is not any more: load the model again"
    if parameter.dtype != parameter.quant_storage:
        return (
            f"its packed bytes, stored as {parameter.quant_storage}, were cast to {parameter.dtype} as if they were "
            "values: load the model again, and cast it before, by torch_dtype, or not at all; or with "
            "bnb_4bit_quant_storage='uint8', which casts leave alone"
        )
    return ""
