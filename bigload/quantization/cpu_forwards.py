"""Forwards and gradients of bitsandbytes' layers that are correct on the CPU.

For some shapes, bitsandbytes' CPU kernels fail or are silently wrong. Layers of these shapes get another forward, as an
attribute of the instance. Found in version 0.50.2, by comparing with a dequantization written by hand:

* 4-bit, in_features not a multiple of the blocksize: the AVX512-BF16 path raises; the other path is wrong by 20% and
  more if in_features is a multiple of 16 (it begins new blocks in each row, where quantization does not).
* 4-bit, AVX512-BF16: the first eval forward repacks the weight in place for a kernel that needs out_features to be a
  multiple of 32, has no backward, and crashes the process on an input without rows. An input that is not contiguous
  gives garbage. Packing rounds the scales for good.
* int8, one input feature: torch._int_mm returns noise.
* int8 main weights: there is no kernel in eval mode, and the backward fails on inputs of three dimensions.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional

from ..config import BnbQuantizationConfig
from .bnb import dequantize_4bit, library
from .own_forwards import (
    forward_4bit,
    forward_int8,
    forward_main_weights,
    on_matrix,
    own_forward,
    require_input,
    set_forward,
)
from .quantized_weight import row_scales

# bitsandbytes' packed CPU kernel computes this many rows of the weight at once.
_PACKED_ROWS = 32


def adapt_to_cpu(layer: Any, shape: tuple[int, ...], config: BnbQuantizationConfig) -> None:
    """Replace a layer's forward where bitsandbytes' own is wrong for its shape, or would pack its weight in place.

    Args:
        layer: of bitsandbytes, on the CPU.
        shape: of its weight, (out_features, in_features).
        config: how its weight was quantized.
    """
    out_features, in_features = shape
    if config.load_in_4bit:
        has_packed_kernel = getattr(layer, "support_avx512bf16_for_cpu", False)
        layer.support_avx512bf16_for_cpu = False  # otherwise bitsandbytes packs the weight in place
        if in_features % config.bnb_4bit_blocksize:
            set_forward(layer, _forward_4bit)
        elif has_packed_kernel and out_features % _PACKED_ROWS == 0:
            set_forward(layer, _forward_packed)
    elif config.llm_int8_has_fp16_weight:
        set_forward(layer, _forward_main_weights)
    elif in_features == 1:
        set_forward(layer, _forward_int8)


def _forward_4bit(layer: Any, input: torch.Tensor) -> torch.Tensor:
    if input.device.type != "cpu":
        return forward_4bit(layer, input)
    require_input(layer, input)
    dtype = layer.compute_dtype or input.dtype
    bias = _bias(layer, dtype)
    out: torch.Tensor = _DequantizedMatmul.apply(input.to(dtype), layer.weight)  # type: ignore[no-untyped-call]
    return (out if bias is None else out + bias).to(input.dtype)


def _bias(layer: Any, dtype: torch.dtype) -> torch.Tensor | None:
    return None if layer.bias is None else layer.bias.to(dtype)


class _DequantizedMatmul(torch.autograd.Function):
    """x @ weight.T for a frozen 4-bit weight, dequantized again in the backward instead of kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any) -> torch.Tensor:
        ctx.weight = weight
        return functional.linear(x, dequantize_4bit(weight.data, weight.quant_state, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        return grad @ dequantize_4bit(ctx.weight.data, ctx.weight.quant_state, grad.dtype), None


def _forward_int8(layer: Any, input: torch.Tensor) -> torch.Tensor:
    if input.device.type != "cpu":
        return forward_int8(layer, input)
    require_input(layer, input)
    weight = layer.weight.data * (row_scales(layer) / 127).unsqueeze(1)
    return functional.linear(input, weight.to(input.dtype), _bias(layer, input.dtype))


def _forward_main_weights(layer: Any, input: torch.Tensor) -> torch.Tensor:
    if input.device.type != "cpu":
        return forward_main_weights(layer, input)
    require_input(layer, input)
    layer.state.is_training = True  # bitsandbytes has no CPU kernel for eval mode
    layer.state.CB = None  # so that the weight is quantized as it is now
    bias = _bias(layer, input.dtype)
    return on_matrix(lambda rows: library().matmul(rows, layer.weight, bias=bias, state=layer.state), input)


def _forward_packed(layer: Any, input: torch.Tensor) -> torch.Tensor:
    """Use the packed kernel of AVX512-BF16 CPUs, which is 31 times faster for one token.

    It has no backward, and crashes on an input without rows: for these, bitsandbytes' other path is used.
    """
    needs_grad = torch.is_grad_enabled() and input.requires_grad
    if torch.compiler.is_compiling():
        return forward_4bit(layer, input)
    if input.device.type != "cpu" or layer.training or needs_grad or input.numel() == 0:
        return forward_4bit(layer, input)
    require_input(layer, input)
    dtype = layer.compute_dtype or input.dtype
    data, state = _packed(layer)
    # The kernel reads its input as if its rows lay one after the other: a transposed one gives garbage.
    out = library().matmul_4bit(input.to(dtype).contiguous(), data, bias=_bias(layer, dtype), quant_state=state)
    return out.to(input.dtype)  # type: ignore[no-any-return]


# A packed copy of each layer's weight, made when the layer first runs. bitsandbytes would replace the weight by it, but
# packing rounds the scales, and who reads the weight (PEFT's merge, a state_dict) must find what was loaded.
_packed_copies: WeakKeyDictionary[nn.Module, _PackedCopy] = WeakKeyDictionary()


class _PackedCopy(NamedTuple):
    """A packed weight, and what it was made from: it is made anew if that was exchanged or written to."""

    address: int
    versions: tuple[int, ...]
    scales: tuple[Any, ...]
    data: torch.Tensor
    state: Any


def _packed(layer: Any) -> tuple[torch.Tensor, Any]:
    data, scales = layer.weight.data, _scales_of(layer.weight.quant_state)
    versions = (_version(layer.weight), *(_version(each) for each in scales if isinstance(each, torch.Tensor)))
    made = _packed_copies.get(layer)
    is_same = made is not None and (made.address, made.versions) == (data.data_ptr(), versions)
    if made is None or not is_same or not all(map(operator.is_, made.scales, scales)):
        packed = library().functional._convert_weight_packed_for_cpu(data, copy.copy(scales[0]))
        made = _packed_copies[layer] = _PackedCopy(data.data_ptr(), versions, scales, *packed)
    return made.data, made.state


def _scales_of(state: Any) -> tuple[Any, ...]:
    """Return a quant_state, and the tensors in it that the values of its weight depend on."""
    nested = state.state2
    return state, state.absmax, state.offset, *((nested.absmax, nested.code) if nested is not None else ())


def _version(tensor: torch.Tensor) -> int:
    """Return torch's count of in-place writes to a tensor; inference tensors have none."""
    return 0 if tensor.is_inference() else tensor._version


def streamed_forward(layer: nn.Module) -> Callable[..., Any]:
    """Return the forward for a layer whose weight is streamed: one that keeps no packed copy of the weight.

    It replaces the forward of layers that use a packed copy by bitsandbytes' own, which is correct for their shapes.
    From then on, bitsandbytes does not pack the weight either.
    """
    own: Callable[..., Any] = layer.forward
    if hasattr(layer, "support_avx512bf16_for_cpu"):
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # it would pack the slot's memory
    if getattr(own, "func", None) is not _forward_packed:
        return own
    _packed_copies.pop(layer, None)
    return functools.partial(own_forward(layer), layer)


def input_gradient(layer: Any, own: Callable[..., Any], grad: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the gradient of a quantized layer's input, bit for bit as the backward of its own forward.

    Args:
        layer: of bitsandbytes, with its weight.
        own: its forward.
        grad: the gradient of the output, (..., out_features).
        dtype: of the input.

    Returns:
        (..., in_features), in `dtype`.
    """
    kernel = getattr(own, "func", None) if grad.device.type == "cpu" else None
    if hasattr(layer, "state"):
        rows, scales = layer.state.CB, layer.state.SCB.unsqueeze(1)
        if kernel is _forward_int8:
            weight = (rows * (scales / 127)).to(dtype)
        else:
            weight = rows.to(dtype, copy=True).mul_(scales.mul(1.0 / 127.0))
        rows_of_grad = grad.reshape(-1, grad.shape[-1]).to(dtype)  # its layout decides the last bits
        return torch.matmul(rows_of_grad, weight).view(*grad.shape[:-1], weight.shape[1])
    computed = layer.compute_dtype or dtype
    data, state = layer.weight.data, layer.weight.quant_state
    if kernel is _forward_4bit:
        weight = dequantize_4bit(data, state, computed)
    else:
        weight = library().functional.dequantize_4bit(data.view(-1, 1), state).to(computed)
    return torch.matmul(grad.to(computed), weight).to(dtype)
