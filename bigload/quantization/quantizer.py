"""Quantizes a weight piece by piece, into memory of its final size."""

from __future__ import annotations

import functools
import math
from contextlib import nullcontext

import torch

from ..hardware.devices import current_gpu
from ..model.empty import default_dtype
from .bnb import library, quantize_4bit_into, quantize_int8_into
from .cpu_kernels import quantize_blocks
from .formats import NESTED_BLOCKSIZE, FourBit, Int8
from .quantized_weight import QuantizedWeight

# Values that bitsandbytes' CPU kernel gets at once, so that they stay in the cache.
_CPU_PIECE = 2**18
# Values that its GPU kernel gets at once: below 2^31, and a multiple of every blocksize.
_MAX_VALUES = 2**30


class Quantizer:
    """Quantizes a weight in pieces of any size and order, to the same bits as bitsandbytes quantizes the whole.

    bitsandbytes' 4-bit kernels run on CUDA's default stream, whatever stream is current: so must the caller's work.
    """

    def __init__(self, shape: tuple[int, ...], fmt: FourBit | Int8, dtype: torch.dtype, device: torch.device) -> None:
        """Prepare to quantize a weight; memory is allocated with the first piece.

        Args:
            shape: (out_features, in_features).
            fmt: the format to quantize to.
            dtype: of the values, and of the weight when it is dequantized.
            device: of the values and of the weight.
        """
        self._shape, self._format, self._dtype, self._device = shape, fmt, dtype, device
        self._is_allocated = False

    @property
    def values_per_scale(self) -> int:
        """Values in a row or block: each piece begins, and all but the last end, at a multiple of it."""
        return self._format.values_per_scale(self._shape)

    def add(self, values: torch.Tensor, begin: int) -> None:
        """Quantize a piece.

        Args:
            values: (n,), contiguous, on the device. Its memory may be reused after the call, in the order of the
                default stream.
            begin: the index of the first value in the flattened weight.
        """
        if not self._is_allocated:
            self._allocate()
        if isinstance(self._format, Int8):
            self._add_rows(values.view(-1, self._shape[-1]), begin // self._shape[-1])
        else:
            self._add_blocks(values, begin, self._format)

    def _allocate(self) -> None:
        weight = self._format.parts(self._shape)["weight"]
        self._data = torch.empty(weight.shape, dtype=weight.dtype, device=self._device)
        self._bytes = self._data.view(torch.uint8).view(-1)
        scales = (
            self._shape[0] if isinstance(self._format, Int8) else -(-math.prod(self._shape) // self.values_per_scale)
        )
        self._scales = torch.empty(scales, dtype=torch.float32, device=self._device)
        self._is_allocated = True

    def _add_rows(self, rows: torch.Tensor, begin: int) -> None:
        # On the CPU, the kernel is 8 times faster on what fits in the cache.
        step = max(1, _CPU_PIECE // max(1, rows.shape[1])) if rows.device.type == "cpu" else len(rows)
        for piece in torch.split(rows, step):
            end = begin + len(piece)
            quantize_int8_into(piece, self._data[begin:end], self._scales[begin:end])
            begin = end

    def _add_blocks(self, values: torch.Tensor, begin: int, fmt: FourBit) -> None:
        if values.device.type == "cpu":
            begin, values = self._add_whole_blocks(values, begin, fmt)
        count = values.numel()
        for first in range(begin, begin + count, _MAX_VALUES):
            end = min(first + _MAX_VALUES, begin + count)
            piece = values if count <= _MAX_VALUES else values[first - begin : end - begin]
            packed = self._bytes[first // 2 : (end + 1) // 2]
            scales = self._scales[first // fmt.blocksize : -(-end // fmt.blocksize)]
            quantize_4bit_into(piece, fmt.blocksize, fmt.quant_type, packed, scales)

    def _add_whole_blocks(self, values: torch.Tensor, begin: int, fmt: FourBit) -> tuple[int, torch.Tensor]:
        """Quantize the whole blocks of a piece on the CPU. Returns where the rest begins, and the rest."""
        whole = len(values) - len(values) % fmt.blocksize
        packed, scales = self._bytes[begin // 2 :], self._scales[begin // fmt.blocksize :]
        table = code_table(fmt.quant_type, self._device)
        quantize_blocks(values[:whole], fmt.blocksize, table, packed[: whole // 2], scales[: whole // fmt.blocksize])
        return begin + whole, values[whole:]

    def finish(self) -> QuantizedWeight:
        """Return the weight, after all pieces were added."""
        if not self._is_allocated:
            self._allocate()
        data, scales = self._data, self._scales
        del self._data, self._bytes, self._scales  # what becomes of the weight decides when its memory is free
        self._is_allocated = False
        parts = {"weight": data}
        if isinstance(self._format, Int8):
            parts["SCB"] = scales
        else:
            # Each weight has its own table: tensors that share memory cannot be saved as safetensors.
            parts["quant_map"] = code_table(self._format.quant_type, self._device).clone()
            parts |= quantize_scales(scales) if self._format.double_quant else {"absmax": scales}
        return QuantizedWeight.from_parts(self._format, self._shape, self._dtype, parts)


def quantize_scales(absmax: torch.Tensor) -> dict[str, torch.Tensor]:
    """Quantize the scales of a weight ("double quantization").

    Args:
        absmax: (blocks,), fp32, all scales of the weight.

    Returns:
        By part name: `absmax`, (blocks,), uint8; `nested_offset`, (), fp32, the mean, subtracted before; and
        `nested_absmax` and `nested_quant_map`, fp32, the scales and the code table of the quantized scales.

    Source: QLoRA, arXiv 2305.14314, section 3, "Double Quantization".
    """
    offset = absmax.mean()
    quantized, state = library().functional.quantize_blockwise(
        absmax - offset, code=code_table("dynamic", absmax.device), blocksize=NESTED_BLOCKSIZE
    )
    nested = {"nested_offset": offset, "nested_absmax": state.absmax, "nested_quant_map": state.code}
    return {"absmax": quantized, **nested}


def quantize(weight: torch.Tensor, fmt: FourBit | Int8) -> QuantizedWeight:
    """Quantize a weight on its device; on a GPU, in the default stream.

    Args:
        weight: (out_features, in_features), floating point; not changed.
        fmt: the format to quantize to.

    Source: LLM.int8(), arXiv 2208.07339; QLoRA, section 3, arXiv 2305.14314.
    """
    quantizer = Quantizer(tuple(weight.shape), fmt, weight.dtype, weight.device)
    if weight.numel():
        quantizer.add(weight.contiguous().view(-1), 0)
    return quantizer.finish()


def largest(tensors: list[torch.Tensor]) -> list[float]:
    """Return the largest absolute value of each tensor of one device, with few kernels and one wait; NaN if it has one.

    Args:
        tensors: at least one, none of them empty.
    """
    return torch.stack([norm.float() for norm in torch._foreach_norm(tensors, math.inf)]).tolist()


@functools.cache
def load_kernels(fmt: FourBit | Int8, dtype: torch.dtype, device: torch.device) -> None:
    """Quantize next to nothing, once: a GPU's driver takes 0.1 s to load the kernels, for which a load would wait.

    Args:
        fmt: what will be quantized to.
        dtype: of the values that will be quantized.
        device: where.
    """
    with nullcontext() if device.type == "cpu" else current_gpu(device):
        made = quantize(torch.ones(1, 2 * NESTED_BLOCKSIZE, dtype=dtype, device=device), fmt)
        largest(list(made.scales))


@functools.cache
def code_table(name: str, device: torch.device) -> torch.Tensor:
    """Return a code table, made once for each device: to copy it from a list, as bitsandbytes does, stalls a GPU."""
    kernels = library().functional
    with default_dtype(torch.float32):  # bitsandbytes makes its tables in the default dtype
        if name == "dynamic":
            return kernels.create_dynamic_map().to(device)  # type: ignore[no-any-return]
        return kernels.get_4bit_type(name, device=device)  # type: ignore[no-any-return]
