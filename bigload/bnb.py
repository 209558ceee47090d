"""bitsandbytes itself, imported when first needed, and a weight as it holds it."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch

from .optional import import_optional


@functools.cache
def library() -> Any:
    """Import bitsandbytes, which takes seconds and initializes the GPU.

    Raises:
        MissingDependencyError: it is not installed, or its native library does not load.
    """
    cpu_log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = cpu_log.level
    cpu_log.setLevel(logging.ERROR)  # it warns of a kernel from the hub that it can do without
    try:
        return import_optional("bitsandbytes", "pip install bitsandbytes")
    finally:
        cpu_log.setLevel(level)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight as bitsandbytes holds it.

    Attributes:
        data: the packed 4-bit bytes in quant_storage, (n, 1), or the int8 rows, (out_features, in_features).
        quant_state: of a 4-bit weight, a `bitsandbytes.functional.QuantState`.
        row_scales: of an int8 weight, its SCB: fp32, (out_features,).
    """

    data: torch.Tensor
    quant_state: Any = None
    row_scales: torch.Tensor | None = None

    @property
    def scales(self) -> list[torch.Tensor]:
        """What is not finite if any weight was not: SCB, absmax, or offset and scales of double-quantized absmax."""
        if self.row_scales is not None:
            return [self.row_scales]
        if self.quant_state.nested:
            return [self.quant_state.offset, self.quant_state.state2.absmax]
        return [self.quant_state.absmax]


def dequantize_4bit(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """Dequantize a 4-bit weight of any shape.

    As one row of all its elements: then bitsandbytes' CPU kernel counts the blocks as they were quantized. An odd
    number of elements is padded to the whole byte it lies in, which stays within the last block.
    """
    absmax = state.absmax
    if state.nested:
        inner = state.state2
        blockwise = torch.ops.bitsandbytes.dequantize_blockwise.default
        absmax = blockwise(absmax, inner.absmax, inner.code, inner.blocksize, inner.dtype) + state.offset
    packed = packed.view(torch.uint8).view(-1, 1)
    flat = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed, absmax, state.blocksize, state.quant_type, [1, 2 * packed.numel()], dtype
    )
    return flat.view(-1)[: state.shape.numel()].view(state.shape)  # type: ignore[no-any-return]
