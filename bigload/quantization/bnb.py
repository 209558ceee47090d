"""bitsandbytes, imported when it is first needed, and its kernels, with results written to given memory."""

from __future__ import annotations

import ctypes
import functools
import logging
import re
from collections.abc import Callable
from typing import Any

import torch

from ..errors import import_optional
from ..hardware.devices import current_gpu


@functools.cache
def library() -> Any:
    """Return the module bitsandbytes; its first import takes seconds and initializes the GPU.

    Raises:
        MissingDependencyError: it is not installed, or its native library cannot be loaded.
    """
    cpu_log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = cpu_log.level
    cpu_log.setLevel(logging.ERROR)  # it warns that an optional kernel of the hub is missing
    try:
        return import_optional("bitsandbytes", "pip install bitsandbytes")
    finally:
        cpu_log.setLevel(level)


def quantize_4bit_into(
    values: torch.Tensor, blocksize: int, quant_type: str, packed: torch.Tensor, absmax: torch.Tensor
) -> None:
    """Quantize to 4 bit, into `packed` and `absmax`.

    Args:
        values: (n,), floating point, contiguous; n < 2**31.
        blocksize: number of values that share a scale.
        quant_type: "nf4" or "fp4".
        packed: ((n + 1) // 2,), uint8; overwritten.
        absmax: (ceil(n / blocksize),), fp32; overwritten.
    """
    kernel = _own_kernel("cquantize_blockwise_{}_" + quant_type, values, _FOUR_BIT_ARGUMENTS)
    if kernel is not None:
        with current_gpu(values.device):  # the function gets pointers only, and runs on the current GPU
            kernel(None, values.data_ptr(), absmax.data_ptr(), packed.data_ptr(), blocksize, len(values))
        return
    quantized, scales = torch.ops.bitsandbytes.quantize_4bit.default(values, blocksize, quant_type, torch.uint8)
    packed.copy_(quantized.view(-1))
    absmax.copy_(scales)


def quantize_int8_into(rows: torch.Tensor, data: torch.Tensor, scales: torch.Tensor) -> None:
    """Quantize rows to int8, into `data` and `scales`.

    Args:
        rows: (n, in_features), floating point, contiguous.
        data: (n, in_features), int8; overwritten.
        scales: (n,), fp32; overwritten.
    """
    rows = rows.to(torch.float16)
    kernel = _own_kernel("cint8_vector_quant", rows, _INT8_ARGUMENTS)
    if kernel is not None:
        stream = torch.cuda.current_stream(rows.device).cuda_stream
        with current_gpu(rows.device):  # as above
            kernel(rows.data_ptr(), data.data_ptr(), scales.data_ptr(), 0.0, *rows.shape, stream)
        return
    quantized, row_scales, _ = library().functional.int8_vectorwise_quant(rows)
    data.copy_(quantized)
    scales.copy_(row_scales)


# (code, values, absmax, packed, blocksize, n); runs on the default stream.
_FOUR_BIT_ARGUMENTS = (*[ctypes.c_void_p] * 4, ctypes.c_int32, ctypes.c_int32)
# (rows, data, scales, threshold, n, in_features, stream).
_INT8_ARGUMENTS = (*[ctypes.c_void_p] * 3, ctypes.c_float, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p)
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _own_kernel(name: str, values: torch.Tensor, arguments: tuple[Any, ...]) -> Callable[..., None] | None:
    """Return the function of bitsandbytes' native library that its operator calls on a GPU; None for other values.

    The operator allocates its result, which must then be copied. While another thread reads and copies, each of these
    steps waits for the interpreter's lock: 0.9 ms for a piece of 48 MiB, which takes the GPU 0.3 ms.
    """
    if values.device.type != "cuda" or values.dtype not in _NAMES:
        return None
    return _exported(name.format(_NAMES[values.dtype]), arguments)


@functools.cache
def _exported(name: str, arguments: tuple[Any, ...]) -> Callable[..., None] | None:
    """Return a function of bitsandbytes' native library; None in versions whose signatures were not checked."""
    if not re.match(r"0\.50\.", library().__version__) or torch.version.hip:
        return None
    native = library().cextension.lib
    # PYFUNCTYPE keeps the interpreter's lock: to launch a kernel takes less time than to release it.
    has_kernels = getattr(native, "compiled_with_cuda", False) is True
    return ctypes.PYFUNCTYPE(None, *arguments)((name, native._lib)) if has_kernels else None


def dequantize_4bit(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """Dequantize a 4-bit weight of any shape.

    As a single row, because bitsandbytes' CPU kernel begins new blocks in each row, where quantization does not. An odd
    number of elements is padded to a whole byte, which is in the last block.

    Args:
        packed: the packed bytes, of any dtype and shape, contiguous.
        state: a `bitsandbytes.functional.QuantState`.
        dtype: of the result.

    Returns:
        A tensor of shape `state.shape`.
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
