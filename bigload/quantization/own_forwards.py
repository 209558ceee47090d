"""bitsandbytes' own forwards, for the inputs that they compute right; other inputs are refused or reshaped.

An input of integers is refused. Code that casts an input to the dtype of a quantized weight makes one: the result would
no longer depend on the input, and bitsandbytes would cast the layer's bias to integers for good.

An input on another device than the weight, or with another number of features, is refused, as nn.Linear does.
bitsandbytes' kernels get pointers only: on a GPU they would read host memory, an illegal access after which the process
can use no GPU any more, and its packed kernel on the CPU reads past the end of rows that are too short.

int8 gets a contiguous matrix: its search for outliers fails on one dimension and on more than three, its CUDA kernel
reads memory in order, whatever the strides, which gives garbage, and on the CPU it computes three dimensions that are
not contiguous with other last bits.

A bias in another dtype than what it is added to is cast for the product. bitsandbytes casts the layer's own, for good:
a model in float32 would lose bits of it where autocast, or the compute dtype, is bfloat16.

The input's name is nn.Linear's, by which UNetMotionModel of diffusers gives it; that of bitsandbytes is another one.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from ..errors import QuantizationError
from .kernels.outliers import outlier_product, suits
from .quantized_weight import keep_row_scales


def set_forward(layer: Any, forward: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    """Give one layer another forward. As a partial of a module-level function it is copied and pickled with it."""
    vars(layer)["forward"] = functools.partial(forward, layer)


def own_forward(layer: Any) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Return bitsandbytes' forward for a layer, which may be computed as a function of streamed weights too."""
    if not hasattr(layer, "state"):
        return forward_4bit
    return forward_main_weights if layer.state.has_fp16_weights else forward_int8


def forward_4bit(layer: Any, input: torch.Tensor) -> torch.Tensor:
    """Compute a 4-bit layer."""
    require_input(layer, input)
    bias, dtype = layer._parameters.get("bias"), layer.compute_dtype
    if bias is None or bias.dtype == dtype or not layer.compute_type_is_set:
        return type(layer).forward(layer, input)  # type: ignore[no-any-return]
    bitsandbytes = _imported()
    bitsandbytes.nn.modules.fix_4bit_weight_quant_state_from_module(layer)
    weight = layer.weight
    out = bitsandbytes.matmul_4bit(input.to(dtype), weight, bias=bias.to(dtype), quant_state=weight.quant_state)
    return out.to(input.dtype)  # type: ignore[no-any-return]


def forward_int8(layer: Any, input: torch.Tensor) -> torch.Tensor:
    """Compute an int8 layer."""
    require_input(layer, input)
    keep_row_scales(layer)
    bias = layer._parameters.get("bias")
    is_usual = bias is None or bias.dtype == input.dtype
    own = (
        _without_host if suits(layer.state, input, layer.bias) else type(layer).forward if is_usual else _with_cast_bias
    )
    return on_matrix(functools.partial(own, layer), input)


def _state(layer: Any) -> Any:
    state = layer.state
    state.is_training = layer.training
    if layer.weight.CB is not None:
        layer.init_8bit_state()
    return state


def _without_host(layer: Any, rows: torch.Tensor) -> torch.Tensor:
    state, bias = _state(layer), layer._parameters.get("bias")
    if state.CB is None:
        return _with_cast_bias(layer, rows)  # which makes them
    bias = None if bias is None else bias.to(rows.dtype)
    return outlier_product(rows, state.CB, state.SCB, state.threshold, bias)


def _with_cast_bias(layer: Any, rows: torch.Tensor) -> torch.Tensor:
    state = _state(layer)
    bias = None if layer.bias is None else layer.bias.to(rows.dtype)
    return _imported().matmul(rows, layer.weight, bias=bias, state=state)  # type: ignore[no-any-return]


def _imported() -> Any:
    return sys.modules["bitsandbytes"]  # torch.compile would trace what imports it


def forward_main_weights(layer: Any, input: torch.Tensor) -> torch.Tensor:
    """Compute a layer of int8 training with its main weights as they are now.

    bitsandbytes keeps the int8 rows that it has made of them, in eval mode and while the weight has a gradient: after a
    step of an optimizer it would compute with the weights before it, and for ever where `zero_grad` leaves zeros.
    """
    layer.state.CB = None
    return forward_int8(layer, input)


def on_matrix(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Call an int8 forward with the rows of an input of any dimensions, (..., in_features), as one matrix."""
    if x.dim() == 2:
        return forward(x.contiguous())
    out = forward(x.reshape(-1, x.shape[-1]).contiguous())
    return out.view(*x.shape[:-1], out.shape[-1])


def require_input(layer: Any, x: torch.Tensor, weight: torch.Tensor | None = None, width: int | None = None) -> None:
    """Refuse an input that is not floating point, on another device, or of another width, as nn.Linear does.

    Args:
        layer: of bitsandbytes, or fused experts.
        x: its input, (..., width).
        weight: what it computes with, or lies beside it; None for the layer's own.
        width: None for the layer's in_features.

    Raises:
        QuantizationError: the input holds integers, booleans or complex numbers, lies on another device, or has another
            last dimension.
    """
    width = layer.in_features if width is None else width
    if weight is None:
        weight = layer._parameters.get("weight", x)  # several times faster than an attribute of a module
        state = getattr(weight, "quant_state", None)
        if state is not None:
            weight = state.absmax  # bitsandbytes answers what a 4-bit weight is asked in Python, 2 us for its device
    if x.is_floating_point() and x.device == weight.device and x.shape[-1:] == (width,):
        return
    name = vars(layer).get("loaded_as") or "the model"
    if x.is_floating_point() and x.device == weight.device:
        raise QuantizationError(
            f"{name!r} is quantized and takes inputs of shape (..., {width}), but got {tuple(x.shape)}"
        )
    if x.is_floating_point():
        raise QuantizationError(
            f"{name!r} is quantized and on {weight.device}, but its input is on {x.device}: move the input, as by "
            f"x.to('{weight.device}')"
        )
    raise QuantizationError(
        f"{name!r} is quantized and takes floating-point inputs, but got {x.dtype}: was the input cast to the dtype of "
        f"a quantized weight, as by x.to(layer.weight.dtype)? Then name {name!r} in skip_modules, or cast it to the "
        "model's dtype instead"
    )
