"""What has landed goes into the model in one step: all of it, or on any failure none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from . import interop
from .empty import like_parameter
from .interop import Edit
from .layers import make_layer
from .modules import ModelTensor
from .pipeline import Landed
from .placement import Plan

_ABSENT = object()


def commit(model: nn.Module, plan: Plan, landed: Mapping[str, Landed]) -> nn.Module:
    """Put the weights into the model and its quantized layers into their places.

    Args:
        model: unchanged until all of its new parts are made, restored if the exchange is interrupted.
        plan: the plan that was executed.
        landed: from `pipeline.execute`.

    Returns:
        The model; where the model itself is the one layer to quantize, the layer that replaces it.
    """
    values = {p.tensor.name: _value(p.tensor, p.device, landed.get(p.tensor.name)) for p in plan.tensors}
    by_any_name = {name: values[p.tensor.name] for p in plan.tensors for name in p.tensor.names}
    new_layers = _make_layers(plan, landed, by_any_name)
    edits: list[Edit] = []
    for planned in plan.tensors:
        for name in planned.tensor.names:
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            if owner not in new_layers:
                slots = owner._parameters if planned.tensor.is_parameter else owner._buffers
                edits.append((slots, leaf, values[planned.tensor.name]))
    for module in model.modules():
        edits += [(module._modules, key, new_layers[child]) for key, child in _children(module) if child in new_layers]
        edits += _without_fused_path(module, new_layers)
    root = new_layers.get(model, model)
    _apply(edits + interop.attributes(root, plan))
    return root


def _value(tensor: ModelTensor, device: torch.device, value: Landed | None) -> torch.Tensor | None:
    """The parameter or buffer to set; None for a weight that is quantized, which goes in with its layer."""
    if value is None:
        return tensor.value.to(device)
    if not isinstance(value, torch.Tensor):
        return None
    old = tensor.value
    if not tensor.is_parameter:
        return value
    unchanged = value.data_ptr() == old.data_ptr() and value.dtype == old.dtype and not old.is_meta
    return old if unchanged else like_parameter(old, value)  # type: ignore[arg-type]


def _without_fused_path(module: nn.Module, new_layers: Mapping[nn.Module, nn.Module]) -> list[Edit]:
    """Turn off the fused path of torch's own encoder layer, which reads its Linears' weights past their forward."""
    if not isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
        return []
    if not any(inner in new_layers for inner in module.modules()):
        return []
    if isinstance(module, nn.TransformerEncoder):
        return [(module.__dict__, "use_nested_tensor", False)]  # which only the fused path takes
    return [(module.__dict__, "activation_relu_or_gelu", 0)]  # what it sets itself for any other activation


def _make_layers(
    plan: Plan, landed: Mapping[str, Landed], values: Mapping[str, torch.Tensor | None]
) -> dict[nn.Module, nn.Module]:
    planned = {name: p for p in plan.tensors for name in p.tensor.names}
    trains = plan.config.llm_int8_has_fp16_weight
    layers = {}
    for path, layer in plan.layers.items():
        prefix = f"{path}." if path else ""
        weight = planned[f"{prefix}weight"]
        bias: Any = values.get(f"{prefix}bias")
        if bias is not None and not trains and not _is_shared(planned[f"{prefix}bias"].tensor):
            bias = nn.Parameter(bias.data, requires_grad=False)  # frozen with its weight, as the peers have it
        layers[layer] = make_layer(layer, landed[weight.tensor.name], bias, weight.shape, plan.config)
    return layers


def _is_shared(tensor: ModelTensor) -> bool:
    return len(tensor.names) > 1


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(key, child) for key, child in module._modules.items() if child is not None]


def _apply(edits: list[Edit]) -> None:
    before: list[Edit] = []
    try:
        for slots, key, value in edits:
            before.append((slots, key, slots.get(key, _ABSENT)))
            slots[key] = value
    except BaseException:  # Ctrl-C too: half a model is worse than none
        for slots, key, value in reversed(before):
            if value is _ABSENT:
                slots.pop(key, None)
            else:
                slots[key] = value
        raise
