"""What layers compute, as functions of weights that are not theirs: those that lie in a slot.

A layer's own forward finds its weight in the layer, where it must be put and taken back, which costs Python as much as
the forward itself. The layers that most models are made of need not be touched.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..quantization.bnb import library
from ..quantization.formats import part_name
from ..quantization.quantized_weight import state_around, state_holders
from .leaves import Leaf, is_quantized

Forward = Callable[[torch.Tensor], torch.Tensor]
# What is streamed of a layer, where it lies now, by the names of its cells.
Tensors = Mapping[str, torch.Tensor]


def forward_maker(leaf: Leaf, own: Callable[..., Any]) -> Callable[[Tensors], Forward] | None:
    """Give what makes a layer's forward, but for its gradients, around weights that lie elsewhere.

    Args:
        leaf: the layer, and what of it is streamed.
        own: its own forward.

    Returns:
        None for a layer that must be given its weights: of another kind, or with a forward that is not its class's.
    """
    forward = getattr(own, "__func__", None) or getattr(own, "func", None)
    if leaf.parameters != ("weight",) or forward is not type(leaf.module).forward:
        return None
    make = _makers(with_bitsandbytes=is_quantized(leaf.module)).get(forward)
    if make is _linear_4bit and not (leaf.module.compute_type_is_set and leaf.module.compute_dtype):
        return None  # its first forward decides in what it computes
    name = f"{leaf.path}.weight" if leaf.path else "weight"
    return None if make is None else functools.partial(make, leaf.module, name)


def _makers(*, with_bitsandbytes: bool) -> dict[Any, Callable[[Any, str, Tensors], Forward]]:
    if not with_bitsandbytes:
        return {nn.Linear.forward: _linear}
    layers = library().nn
    return {layers.Linear4bit.forward: _linear_4bit, layers.Linear8bitLt.forward: _linear_8bit}


def _linear(layer: nn.Linear, name: str, tensors: Tensors) -> Forward:
    weight = tensors[name]
    return lambda x: functional.linear(x, weight, layer.bias)


def _linear_4bit(layer: Any, name: str, tensors: Tensors) -> Forward:
    state = layer.weight.quant_state
    parts = {part: tensors[part_name(name, part)] for part in state_holders(state)}
    weight, state = tensors[name], state_around(state, parts)
    matmul = library().matmul_4bit

    def forward(x: torch.Tensor) -> torch.Tensor:
        dtype, bias = layer.compute_dtype, layer.bias
        out = matmul(x.to(dtype), weight, bias=None if bias is None else bias.to(dtype), quant_state=state)
        return out.to(x.dtype)  # type: ignore[no-any-return]

    return forward


def _linear_8bit(layer: Any, name: str, tensors: Tensors) -> Forward:
    weight, state = tensors[name], copy.copy(layer.state)
    state.CB, state.SCB = weight, tensors[part_name(name, "SCB")]
    matmul = library().matmul

    def forward(x: torch.Tensor) -> torch.Tensor:
        bias, state.is_training, state.threshold = layer.bias, layer.training, layer.state.threshold
        bias = None if bias is None else bias.to(x.dtype)
        return matmul(x, weight, bias=bias, state=state)  # type: ignore[no-any-return]

    return forward
