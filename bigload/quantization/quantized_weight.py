"""A quantized weight in bitsandbytes' representation, and its parts by their names in `formats`."""

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
    """A quantized weight in bitsandbytes' representation.

    Attributes:
        data: the packed 4-bit values, (n, 1), in quant_storage; or the int8 rows, (out_features, in_features).
        quant_state: of a 4-bit weight, its `bitsandbytes.functional.QuantState`.
        row_scales: of an int8 weight, its SCB, (out_features,), fp32.
    """

    data: torch.Tensor
    quant_state: Any = None
    row_scales: torch.Tensor | None = None

    @classmethod
    def from_parts(
        cls, fmt: FourBit | Int8, shape: tuple[int, ...], dtype: torch.dtype, parts: Mapping[str, torch.Tensor]
    ) -> QuantizedWeight:
        """Make a weight of its parts, without copying them.

        Args:
            fmt: its format.
            shape: (out_features, in_features).
            dtype: what it is dequantized to.
            parts: by name, all on one device.
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
        """Its parts, by name."""
        if self.row_scales is not None:
            return {"weight": self.data, "SCB": self.row_scales}
        held = state_holders(self.quant_state)
        return {"weight": self.data, **{part: getattr(*holder) for part, holder in held.items()}}

    @property
    def scales(self) -> list[torch.Tensor]:
        """The floating parts that are not finite if any value was not finite."""
        parts = self.parts
        if "nested_absmax" in parts:
            return [parts["nested_offset"], parts["nested_absmax"]]
        return [parts["SCB"] if self.row_scales is not None else parts["absmax"]]


def state_holders(state: Any) -> dict[str, tuple[Any, str]]:
    """Return the object, and the name of its attribute, that holds each part of a QuantState, by the part's name."""
    held = {"absmax": (state, "absmax"), "quant_map": (state, "code")}
    if state.nested:
        held["nested_offset"] = (state, "offset")
        held["nested_absmax"] = (state.state2, "absmax")
        held["nested_quant_map"] = (state.state2, "code")
    return held


def state_around(state: Any, parts: Mapping[str, torch.Tensor]) -> Any:
    """Return a copy of a QuantState with other parts, given by name."""
    made = copy.copy(state)
    if state.nested:
        made.state2 = copy.copy(state.state2)
    for part, (holder, attribute) in state_holders(made).items():
        setattr(holder, attribute, parts[part])
    return made


def row_scales(layer: Any) -> Any:
    """Return the SCB of an int8 layer, which bitsandbytes moves from the weight to the state in the first forward."""
    return layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB


def keep_row_scales(layer: Any) -> None:
    """Let an int8 layer that has run keep its scales, if its weight was exchanged by what `weight.to()` returns.

    As PEFT's DoRA does. bitsandbytes would take the scales of the new weight, which has none.
    """
    weight = layer._parameters.get("weight")
    if getattr(weight, "CB", None) is not None and weight.SCB is None:
        weight.SCB = layer.state.SCB
