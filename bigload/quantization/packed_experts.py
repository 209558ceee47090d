"""The packed weights of fused experts, and their values: one quant_state for all experts, each a slice of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..hardware.layout import Layout, TensorSpec
from .formats import FourBit, part_name
from .quantized_weight import state_around


class Places(NamedTuple):
    """Where experts are in memory that does not hold all of them, in the order of their numbers.

    Attributes:
        slots: the slot of each expert that is there, by its number. The n-th slot is the n-th expert in memory.
        table: the same for kernels, (E,), int32, on the device; any number for experts that are not there.
    """

    slots: Mapping[int, int]
    table: torch.Tensor


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """One weight of all experts, as kernels take it; nothing is copied.

    An expert begins with a block of its own, so that its packed bytes and scales are a slice. Double quantization has
    blocks of scales too, in which an expert may begin anywhere: they are indexed from the first expert's scale.

    Attributes:
        data: packed bytes, uint8, contiguous.
        scales: of the blocks, contiguous; fp32 or, with double quantization, uint8.
        state: the `bitsandbytes.functional.QuantState`, whose shape is (E, out_features, in_features).
        places: where the experts are in `data` and `scales`; None if these hold all experts, one after the other. What
            belongs to blocks of scales, in double quantization, is there for all experts.
    """

    data: torch.Tensor
    scales: torch.Tensor
    state: Any
    places: Places | None = None

    @classmethod
    def of(cls, parameter: Any) -> PackedExperts:
        """Return the view of a `Params4bit`."""
        state = parameter.quant_state
        with torch._C.DisableTorchFunctionSubclass():  # of a parameter at rest in host memory a plain tensor, too
            data = parameter.data
        return cls(data if data.dtype == torch.uint8 else data.view(torch.uint8), state.absmax, state)

    @classmethod
    def cached(cls, name: str, state: Any, tensors: Mapping[str, torch.Tensor], places: Places) -> PackedExperts:
        """Return the weight of the experts that are in a memory laid out by `cache_layout`.

        Args:
            name: of the weight in that memory.
            state: its QuantState, wherever its tensors are.
            tensors: the memory's, by name.
            places: of the experts in it.
        """
        own = {part: tensors.get(part_name(name, part)) for part in _PARTS}
        parts = {part: tensor for part, tensor in own.items() if tensor is not None}
        return cls(tensors[name], parts["absmax"], state_around(state, parts), places)

    @classmethod
    def whole(cls, name: str, state: Any, tensors: Mapping[str, torch.Tensor]) -> PackedExperts:
        """Return the weight of all experts whose parts are `tensors`, by name; arguments as of `cached`."""
        own = {part: tensors.get(part_name(name, part)) for part in _PARTS}
        parts = {part: tensor for part, tensor in own.items() if tensor is not None}
        return cls(tensors[name].view(torch.uint8), parts["absmax"], state_around(state, parts))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, out_features, in_features)."""
        return tuple(self.state.shape)

    def dequantize(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the values of one expert, (out_features, in_features)."""
        _, rows, columns = self.shape
        # One row: bitsandbytes' CPU kernel begins new blocks in each.
        flat = torch.ops.bitsandbytes.dequantize_4bit.default(
            self.data.view(-1, rows * columns // 2)[self._slot(expert)].view(-1, 1),
            self.plain_scales(expert),
            self.state.blocksize,
            self.state.quant_type,
            [1, rows * columns],
            dtype,
        )
        return flat.view(rows, columns)  # type: ignore[no-any-return]

    def plain_scales(self, expert: int) -> torch.Tensor:
        """Return the scales of one expert in fp32, (blocks,)."""
        _, rows, columns = self.shape
        each = rows * columns // self.state.blocksize
        own = self.scales.view(-1, each)[self._slot(expert)]
        if not self.state.nested:
            return own
        inner = self.state.state2
        before = expert * each % inner.blocksize  # scales of other experts in the block in which the expert's begin
        values = torch.ops.bitsandbytes.dequantize_blockwise.default(
            torch.nn.functional.pad(own, (before, 0)),
            inner.absmax[expert * each // inner.blocksize :],
            inner.code,
            inner.blocksize,
            inner.dtype,
        )
        return values[before:] + self.state.offset  # type: ignore[no-any-return]

    def _slot(self, expert: int) -> int:
        return expert if self.places is None else self.places.slots[expert]


_PARTS = ("absmax", "quant_map", "nested_offset", "nested_absmax", "nested_quant_map")
TABLE, BOOK = "table", "book"


# Numbers of the book: of all, of each slot, and of each part of which experts have their own.
BOOK_HEAD, BOOK_SLOT, BOOK_PART = 4, 4, 3


def cache_layout(weights: Mapping[str, tuple[FourBit, tuple[int, ...]]], slots: int) -> Layout:
    """Return the layout of a memory that holds some experts of a module, and what all of them share.

    Args:
        weights: the format and shape, (E, out_features, in_features), of each of the module's packed weights, by name.
        slots: how many experts it holds.

    Returns:
        Of each weight the packed bytes, (slots, bytes), uint8, under its name; the scales, (slots, blocks), and the
        other parts of its format by `part_name`; "table", (E,), int32: the slots of the experts; and "book", int64:
        what a GPU notes that keeps the cache itself.

    Examples:
        >>> nf4 = FourBit("nf4", 64, False, torch.uint8)
        >>> weights = {"gate_up_proj": (nf4, (128, 1536, 2048)), "down_proj": (nf4, (128, 2048, 768))}
        >>> [cache_layout(weights, slots).nbytes for slots in (0, 1, 2)]
        [1024, 2655744, 5310464]
    """
    parts: dict[str, TensorSpec] = {}
    for name, (fmt, shape) in weights.items():
        _, rows, columns = shape
        own = dict(fmt.parts(shape))
        own["weight"] = TensorSpec(torch.uint8, (slots, rows * columns // 2))
        own["absmax"] = TensorSpec(own["absmax"].dtype, (slots, rows * columns // fmt.blocksize))
        parts |= {part_name(name, part): spec for part, spec in own.items()}
        parts[TABLE] = TensorSpec(torch.int32, shape[:1])
    parts[BOOK] = TensorSpec(torch.int64, (BOOK_HEAD + BOOK_SLOT * slots + BOOK_PART * 2 * len(weights),))
    return Layout(parts)


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
