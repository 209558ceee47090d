"""A quantized weight as bitsandbytes holds it, and its parts by the names that its format gives them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .bnb import library
from .formats import NESTED_BLOCKSIZE, FourBit, Int8


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

    @classmethod
    def from_parts(
        cls, fmt: FourBit | Int8, shape: tuple[int, ...], dtype: torch.dtype, parts: Mapping[str, torch.Tensor]
    ) -> QuantizedWeight:
        """Make a weight around its parts.

        Args:
            fmt: its format.
            shape: (out_features, in_features).
            dtype: what it is dequantized to.
            parts: by their names in the format, on one device; kept.
        """
        if isinstance(fmt, Int8):
            return cls(parts["weight"], row_scales=parts["SCB"])
        make, nested = library().functional.QuantState, {}
        if fmt.double_quant:
            nested["offset"] = parts["nested_offset"]
            nested["state2"] = make(
                absmax=parts["nested_absmax"],
                code=parts["nested_quant_map"],
                blocksize=NESTED_BLOCKSIZE,
                dtype=torch.float32,
            )
        state = make(
            absmax=parts["absmax"],
            shape=torch.Size(shape),
            code=parts["quant_map"],
            blocksize=fmt.blocksize,
            quant_type=fmt.quant_type,
            dtype=dtype,
            **nested,
        )
        return cls(parts["weight"], quant_state=state)

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """Its tensors, by their names in the format."""
        if self.row_scales is not None:
            return {"weight": self.data, "SCB": self.row_scales}
        held = state_holders(self.quant_state)
        return {"weight": self.data, **{part: getattr(*holder) for part, holder in held.items()}}

    @property
    def scales(self) -> list[torch.Tensor]:
        """What is not finite if any weight was not: SCB, absmax, or offset and scales of double-quantized absmax."""
        parts = self.parts
        if "nested_absmax" in parts:
            return [parts["nested_offset"], parts["nested_absmax"]]
        return [parts["SCB"] if self.row_scales is not None else parts["absmax"]]


def state_holders(state: Any) -> dict[str, tuple[Any, str]]:
    """Say which attribute of which object holds each part of a 4-bit weight beside its packed values.

    Args:
        state: a `bitsandbytes.functional.QuantState`.
    """
    held = {"absmax": (state, "absmax"), "quant_map": (state, "code")}
    if state.nested:
        held["nested_offset"] = (state, "offset")
        held["nested_absmax"] = (state.state2, "absmax")
        held["nested_quant_map"] = (state.state2, "code")
    return held


def state_around(state: Any, parts: Mapping[str, torch.Tensor]) -> Any:
    """Copy a QuantState, with other tensors in the place of its own.

    Args:
        state: stays as it is.
        parts: by their names in the format.
    """
    made = copy.copy(state)
    if state.nested:
        made.state2 = copy.copy(state.state2)
    for part, (holder, attribute) in state_holders(made).items():
        setattr(holder, attribute, parts[part])
    return made


def row_scales(layer: Any) -> Any:
    """Return an int8 layer's scales, which bitsandbytes moves from the weight to the state at the first forward."""
    return layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
