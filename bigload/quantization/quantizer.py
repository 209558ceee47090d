"""Quantization of one weight, piece by piece, into memory of its final size."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch

from ..checkpoint.bitsandbytes import QuantizedTensor
from ..model.empty import default_dtype
from ..planning.planned_tensors import PlannedTensor
from .bnb import QuantizedWeight, library, quantize_4bit_into, quantize_int8_into
from .cpu_kernels import quantize_blocks
from .formats import NESTED_BLOCKSIZE, FourBit, Int8, Plain

# Values that bitsandbytes' CPU kernel takes at once before they fall out of the cache.
_CPU_PIECE = 2**18
# Values that its GPU kernel can count; a multiple of every blocksize.
_MOST_VALUES = 2**30


class Quantizer:
    """Takes a weight in pieces of any size, in any order, and gives what bitsandbytes would make of the whole.

    bitsandbytes' 4-bit kernels run on CUDA's default stream whatever stream is current: so must the caller.
    """

    def __init__(self, shape: tuple[int, ...], fmt: FourBit | Int8, dtype: torch.dtype, device: torch.device) -> None:
        """Make ready for a weight.

        Args:
            shape: (out_features, in_features).
            fmt: the format to quantize to.
            dtype: that of the values, which the weight computes back to.
            device: where the values are, and the weight will be.
        """
        self._shape, self._format, self._dtype, self._device = shape, fmt, dtype, device
        self._data = self._bytes = self._scales = torch.empty(0)

    @property
    def granule(self) -> int:
        """Values that belong together, a row or a block: pieces begin and end at multiples of it."""
        return self._format.granule(self._shape)

    def add(self, values: torch.Tensor, begin: int) -> None:
        """Quantize a piece.

        Args:
            values: (n,), contiguous, on the device; read before the next work on the default stream, and not kept.
            begin: the index of the first of them in the flattened weight.
        """
        if not self._scales.numel():
            self._allocate()
        if isinstance(self._format, Int8):
            self._add_rows(values.view(-1, self._shape[-1]), begin // self._shape[-1])
        else:
            self._add_blocks(values, begin, self._format)

    def _allocate(self) -> None:
        weight = self._format.parts(self._shape)["weight"]
        self._data = torch.empty(weight.shape, dtype=weight.dtype, device=self._device)
        self._bytes = self._data.view(torch.uint8).view(-1)
        scales = self._shape[0] if isinstance(self._format, Int8) else -(-math.prod(self._shape) // self.granule)
        self._scales = torch.empty(scales, dtype=torch.float32, device=self._device)

    def _add_rows(self, rows: torch.Tensor, begin: int) -> None:
        # On the CPU the kernel is 8 times faster on what fits the cache.
        step = max(1, _CPU_PIECE // max(1, rows.shape[1])) if rows.device.type == "cpu" else len(rows)
        for piece in torch.split(rows, step):
            end = begin + len(piece)
            quantize_int8_into(piece, self._data[begin:end], self._scales[begin:end])
            begin = end

    def _add_blocks(self, values: torch.Tensor, begin: int, fmt: FourBit) -> None:
        packed, scales = self._bytes[begin // 2 :], self._scales[begin // fmt.blocksize :]
        if values.device.type == "cpu":
            whole = len(values) - len(values) % fmt.blocksize
            table = code_table(fmt.quant_type, self._device)
            blocks = whole // fmt.blocksize
            quantize_blocks(values[:whole], fmt.blocksize, table, packed[: whole // 2], scales[:blocks])
            values, packed, scales = values[whole:], packed[whole // 2 :], scales[blocks:]
            if not len(values):
                return
        for piece in torch.split(values, _MOST_VALUES):
            blocks, nbytes = -(-len(piece) // fmt.blocksize), (len(piece) + 1) // 2
            quantize_4bit_into(piece, fmt.blocksize, fmt.quant_type, packed[:nbytes], scales[:blocks])
            packed, scales = packed[nbytes:], scales[blocks:]

    def finish(self) -> QuantizedWeight:
        """Give the weight, when all of it has been added."""
        if not self._scales.numel():
            self._allocate()
        data, scales = self._data, self._scales
        self._data = self._bytes = self._scales = torch.empty(0)
        if isinstance(self._format, Int8):
            return QuantizedWeight(data, row_scales=scales)
        return QuantizedWeight(data, quant_state=self._state(scales, self._format))

    def _state(self, absmax: torch.Tensor, fmt: FourBit) -> object:
        state = functools.partial(
            library().functional.QuantState,
            shape=torch.Size(self._shape),
            # Each weight has tables of its own: tensors that share memory cannot be saved as safetensors.
            code=code_table(fmt.quant_type, self._device).clone(),
            blocksize=fmt.blocksize,
            quant_type=fmt.quant_type,
            dtype=self._dtype,
        )
        if not fmt.double_quant:
            return state(absmax=absmax)
        quantized, offset, nested = quantize_scales(absmax)
        return state(absmax=quantized, offset=offset, state2=nested)


def quantize_scales(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Quantize a weight's scales in their turn.

    Args:
        absmax: (blocks,), fp32, all of the weight's.

    Returns:
        The scales, (blocks,) uint8; what was taken from them before, () fp32; and bitsandbytes' state of them.

    Source: QLoRA, arXiv 2305.14314, section 3, "Double Quantization".
    """
    offset = absmax.mean()
    quantized, state = library().functional.quantize_blockwise(
        absmax - offset, code=code_table("dynamic", absmax.device), blocksize=NESTED_BLOCKSIZE
    )
    return quantized, offset, state


def quantize(weight: torch.Tensor, fmt: FourBit | Int8) -> QuantizedWeight:
    """Quantize a weight where it lies, on the default stream of its device.

    Args:
        weight: (out_features, in_features), floating point; read, not kept.
        fmt: the format to quantize to.

    Source: LLM.int8(), arXiv 2208.07339; QLoRA, section 3, arXiv 2305.14314.
    """
    quantizer = Quantizer(tuple(weight.shape), fmt, weight.dtype, weight.device)
    if weight.numel():
        quantizer.add(weight.contiguous().view(-1), 0)
    return quantizer.finish()


def from_parts(stored: QuantizedTensor, parts: Mapping[str, torch.Tensor]) -> QuantizedWeight:
    """Make a weight of parts that were stored quantized.

    Args:
        stored: how.
        parts: by the same names, on the weight's device; kept.
    """
    if isinstance(stored.format, FourBit) and stored.format.double_quant:
        device = parts["weight"].device
        parts = {**parts, "nested_offset": torch.tensor(stored.nested_offset, dtype=torch.float32, device=device)}
    return _weight_of(stored.format, stored.shape, stored.dtype, parts)


def weight_of(planned: PlannedTensor, dtype: torch.dtype, parts: Mapping[str, torch.Tensor]) -> QuantizedWeight:
    """Make a weight of the parts that its format has, by their names in it; kept.

    Args:
        planned: a tensor that is quantized.
        dtype: what it computes back to, unless it was stored quantized.
        parts: on one device.
    """
    assert not isinstance(planned.format, Plain)
    stored = planned.sources[0].tensor
    computes_to = stored.dtype if isinstance(stored, QuantizedTensor) else dtype
    return _weight_of(planned.format, planned.shape, computes_to, parts)


def _weight_of(
    fmt: FourBit | Int8, shape: tuple[int, ...], dtype: torch.dtype, parts: Mapping[str, torch.Tensor]
) -> QuantizedWeight:
    if isinstance(fmt, Int8):
        return QuantizedWeight(parts["weight"], row_scales=parts["SCB"])
    make = library().functional.QuantState
    state = functools.partial(
        make,
        absmax=parts["absmax"],
        shape=torch.Size(shape),
        code=parts["quant_map"],
        blocksize=fmt.blocksize,
        quant_type=fmt.quant_type,
        dtype=dtype,
    )
    if not fmt.double_quant:
        return QuantizedWeight(parts["weight"], quant_state=state())
    nested = make(
        absmax=parts["nested_absmax"],
        code=parts["nested_quant_map"],
        blocksize=NESTED_BLOCKSIZE,
        dtype=torch.float32,
    )
    return QuantizedWeight(parts["weight"], quant_state=state(offset=parts["nested_offset"], state2=nested))


@functools.cache
def code_table(name: str, device: torch.device) -> torch.Tensor:
    """Make a code's table on a device once: bitsandbytes builds it from a list of Python's, which makes a GPU wait."""
    kernels = library().functional
    with default_dtype(torch.float32):  # the dtype that the tables are meant in
        if name == "dynamic":
            return kernels.create_dynamic_map().to(device)  # type: ignore[no-any-return]
        return kernels.get_4bit_type(name, device=device)  # type: ignore[no-any-return]
