"""bitsandbytes' own forwards, for the inputs that they compute right; other inputs are refused or reshaped.

An input of integers is refused. Code that casts an input to the dtype of a quantized weight makes one: the result would
no longer depend on the input, and bitsandbytes would cast the layer's bias to integers for good.

int8 gets a contiguous matrix: its search for outliers fails on one dimension and on more than three, its CUDA kernel
reads memory in order, whatever the strides, which gives garbage, and on the CPU it computes three dimensions that are
not contiguous with other last bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..errors import QuantizationError


def set_forward(layer: Any, forward: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    """Give one layer another forward. As a partial of a module-level function it is copied and pickled with it."""
    layer.forward = functools.partial(forward, layer)


def own_forward(layer: Any) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Return bitsandbytes' forward for a layer, which may be computed as a function of streamed weights too."""
    return forward_int8 if hasattr(layer, "state") else forward_4bit


def forward_4bit(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute a 4-bit layer."""
    require_floating(layer, x)
    return type(layer).forward(layer, x)  # type: ignore[no-any-return]


def forward_int8(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute an int8 layer."""
    require_floating(layer, x)
    return on_matrix(functools.partial(type(layer).forward, layer), x)


def on_matrix(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Call an int8 forward with the rows of an input of any dimensions, (..., in_features), as one matrix."""
    if x.dim() == 2:
        return forward(x.contiguous())
    out = forward(x.reshape(-1, x.shape[-1]).contiguous())
    return out.view(*x.shape[:-1], out.shape[-1])


def require_floating(layer: Any, x: torch.Tensor) -> None:
    """Refuse an input that is not floating point, as nn.Linear does.

    Raises:
        QuantizationError: it holds integers, booleans or complex numbers.
    """
    if x.is_floating_point():
        return
    name = vars(layer).get("loaded_as") or "the model"
    raise QuantizationError(
        f"{name!r} is quantized and takes floating-point inputs, but got {x.dtype}: was the input cast to the dtype of "
        f"a quantized weight, as by x.to(layer.weight.dtype)? Then name {name!r} in skip_modules, or cast it to the "
        "model's dtype instead"
    )
