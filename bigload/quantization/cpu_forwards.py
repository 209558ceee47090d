"""Forwards and gradients of bitsandbytes' layers that are right on the CPU.

Some of bitsandbytes' CPU kernels fail for some shapes or, worse, are silently wrong. Layers of those shapes get a
forward of ours, as an attribute of the instance. Found in version 0.50.2, against a dequantization written by hand:

* 4-bit, in_features no multiple of the blocksize: the AVX512-BF16 path raises, the other one is wrong by 20% and more
  when in_features is a multiple of 16 (it counts scales per row, but they run through the whole weight).
* 4-bit, AVX512-BF16: the first eval forward repacks the weight in place for its kernel, which needs out_features to
  be a multiple of 32, has no backward, crashes the process on no rows, and rounds the scales for good.
* int8, one input feature: torch._int_mm returns noise.
* int8 main weights: there is no kernel in eval mode, and backward fails on inputs of three dimensions.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional

from ..config import BnbQuantizationConfig
from .bnb import dequantize_4bit, library
from .quantized_weight import row_scales

# Rows that bitsandbytes' packed CPU kernel takes at once.
_PACKED_ROWS = 32


def adapt_to_cpu(layer: Any, shape: tuple[int, ...], config: BnbQuantizationConfig) -> None:
    """Return a layer on the CPU a forward that is right for its shape, where bitsandbytes' own is not."""
    out_features, in_features = shape
    if config.load_in_4bit:
        has_packed_kernel = getattr(layer, "support_avx512bf16_for_cpu", False)
        layer.support_avx512bf16_for_cpu = False  # bitsandbytes would pack the weight itself, for good
        if in_features % config.bnb_4bit_blocksize:
            _set_forward(layer, _forward_4bit)
        elif has_packed_kernel and out_features % _PACKED_ROWS == 0:
            _set_forward(layer, _forward_packed)
    elif config.llm_int8_has_fp16_weight:
        _set_forward(layer, _forward_main_weights)
    elif in_features == 1:
        _set_forward(layer, _forward_int8)


def _set_forward(layer: Any, forward: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    # A partial of a module-level function: copies and pickles with the layer.
    layer.forward = functools.partial(forward, layer)


def _forward_4bit(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Multiply by the dequantized weight, which is right for every shape. x: (..., in_features)."""
    if x.device.type != "cpu":
        return type(layer).forward(layer, x)  # type: ignore[no-any-return]
    dtype = layer.compute_dtype or x.dtype
    bias = None if layer.bias is None else layer.bias.to(dtype)
    out: torch.Tensor = _DequantizedMatmul.apply(x.to(dtype), layer.weight)  # type: ignore[no-untyped-call]
    return (out if bias is None else out + bias).to(x.dtype)


class _DequantizedMatmul(torch.autograd.Function):
    """x @ weight.T for a frozen 4-bit weight, dequantized in each direction rather than kept between them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any) -> torch.Tensor:
        ctx.weight = weight
        return functional.linear(x, dequantize_4bit(weight.data, weight.quant_state, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        return grad @ dequantize_4bit(ctx.weight.data, ctx.weight.quant_state, grad.dtype), None


def _forward_int8(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Multiply by the dequantized rows. x: (..., in_features)."""
    if x.device.type != "cpu":
        return type(layer).forward(layer, x)  # type: ignore[no-any-return]
    scales = row_scales(layer)
    weight = layer.weight.data * (scales / 127).unsqueeze(1)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return functional.linear(x, weight.to(x.dtype), bias)


def _forward_main_weights(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Multiply a matrix in bitsandbytes' training mode, the one it has on the CPU. x: (..., in_features)."""
    if x.device.type != "cpu":
        return type(layer).forward(layer, x)  # type: ignore[no-any-return]
    layer.state.is_training = True
    layer.state.CB = None  # quantize the weight as it is now, whatever became of it since
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    out = library().matmul(x.reshape(-1, x.shape[-1]), layer.weight, bias=bias, state=layer.state)
    return out.view(*x.shape[:-1], out.shape[-1])  # type: ignore[no-any-return]


def _forward_packed(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Multiply with the packed kernel of AVX512-BF16 CPUs, 31 times faster for one token. x: (..., in_features).

    It has no backward and crashes on no rows: training and empty inputs take bitsandbytes' other path.
    """
    needs_grad = torch.is_grad_enabled() and x.requires_grad
    if torch.compiler.is_compiling():
        return type(layer).forward(layer, x)  # type: ignore[no-any-return]
    if x.device.type != "cpu" or layer.training or needs_grad or x.numel() == 0:
        return type(layer).forward(layer, x)  # type: ignore[no-any-return]
    dtype = layer.compute_dtype or x.dtype
    data, state = _packed(layer)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    out = library().matmul_4bit(x.to(dtype), data, bias=bias, quant_state=state)
    return out.to(x.dtype)  # type: ignore[no-any-return]


# The packed twin of each weight that ran, beside it and not, as bitsandbytes would, instead of it: packing rounds the
# scales, and whoever reads the weight (PEFT's merge, a state_dict) must find what was loaded.
_packed_twins: WeakKeyDictionary[nn.Module, tuple[tuple[int, int, int], Any, torch.Tensor, Any]] = WeakKeyDictionary()


def _packed(layer: Any) -> tuple[torch.Tensor, Any]:
    data, state = layer.weight.data, layer.weight.quant_state
    versions = (data.data_ptr(), _version(layer.weight), _version(state.absmax))
    twin = _packed_twins.get(layer)
    if twin is None or twin[0] != versions or twin[1] is not state:
        packed = library().functional._convert_weight_packed_for_cpu(data, copy.copy(state))
        twin = (versions, state, *packed)
        _packed_twins[layer] = twin
    return twin[2], twin[3]


def _version(tensor: torch.Tensor) -> int:
    """Count the writes to a tensor that torch knows of; inference tensors have no count."""
    return 0 if tensor.is_inference() else tensor._version


def streamed_forward(layer: nn.Module) -> Callable[..., Any]:
    """Return the forward that a layer shall have while its weight comes and goes: one that keeps no packed twin of it.

    For the layers that would use a twin it is bitsandbytes' own, which dequantizes and is right for their shapes.
    """
    own: Callable[..., Any] = layer.forward
    if hasattr(layer, "support_avx512bf16_for_cpu"):
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # it would pack what is in the slot
    if getattr(own, "func", None) is not _forward_packed:
        return own
    _packed_twins.pop(layer, None)
    return functools.partial(type(layer).forward, layer)


def input_gradient(layer: Any, own: Callable[..., Any], grad: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Multiply by a quantized layer's weight, bit for bit as the backward of its own forward does.

    Args:
        layer: of bitsandbytes, its weight in place.
        own: its forward.
        grad: of the output, (..., out_features).
        dtype: of the input.

    Returns:
        The gradient of the input, (..., in_features).
    """
    computed = dtype
    kernel = getattr(own, "func", None) if grad.device.type == "cpu" else None
    if hasattr(layer, "state"):
        rows, scales = layer.state.CB, layer.state.SCB.unsqueeze(1)
        if kernel is _forward_int8:
            weight = (rows * (scales / 127)).to(dtype)
        else:
            weight = rows.to(dtype, copy=True).mul_(scales.mul(1.0 / 127.0))
    else:
        computed = layer.compute_dtype or dtype
        data, state = layer.weight.data, layer.weight.quant_state
        if kernel is _forward_4bit:
            weight = dequantize_4bit(data, state, computed)
        else:
            weight = library().functional.dequantize_4bit(data.view(-1, 1), state).to(computed)
    return torch.matmul(grad.to(computed), weight).to(dtype)
