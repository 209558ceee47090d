"""Modules with fused experts in 4 bit: found in a model, described, saved, and given the values of a `state_dict`.

In a `state_dict` their weights have the names that bitsandbytes gives its parametrized parameters
(`bitsandbytes.nn.parametrize`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import QuantizationError, listed
from ..model.tree import first_paths
from .experts import has_quantized_experts, quantized_attributes
from .packed_experts import damage
from .quantized_weight import load_packed


def quantized_experts(model: nn.Module) -> dict[str, Any]:
    """Return a model's modules with quantized experts, each by its first path."""
    return {path: module for module, path in first_paths(model).items() if has_quantized_experts(module)}


def saving_attributes(module: nn.Module) -> dict[str, Any]:
    """Return what is set on a module with quantized experts, so that a `state_dict` holds their quant_states too."""
    return {
        "_save_to_state_dict": functools.partial(save_experts, module),
        "_load_from_state_dict": functools.partial(load_experts, module),
    }


def quantization_attributes(module: Any) -> list[str]:
    """Return the names of all that was set on a module when its experts were quantized."""
    own = quantized_attributes(module, module.quantized_experts, module.compute_dtype, "") | saving_attributes(module)
    return [name for name in own if name in vars(module)]


def save_experts(module: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
    """Save a module's tensors, and the parts of its 4-bit weights: "gate_up_proj", "gate_up_proj.absmax" and so on."""
    type(module)._save_to_state_dict(module, destination, prefix, keep_vars)
    for name in module.quantized_experts.weights:
        for part, tensor in module._parameters[name].quant_state.as_dict(packed=True).items():
            destination[f"{prefix}{name}.{part}"] = tensor if keep_vars else tensor.detach()


def load_experts(module: Any, *given: Any) -> None:
    """Load what `save_experts` saved, as a module's `_load_from_state_dict`."""
    load_packed(module, module.quantized_experts.weights, *given)


def configs_of_experts(module: Any) -> list[dict[str, Any]]:
    """Return, for each of a module's quantized weights, the fields of a BnbQuantizationConfig that it was made with."""
    made = []
    for name in module.quantized_experts.weights:
        weight = module._parameters[name]
        state = weight.quant_state
        made.append(
            {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": state.quant_type,
                "bnb_4bit_blocksize": state.blocksize,
                "bnb_4bit_use_double_quant": bool(state.nested),
                "bnb_4bit_quant_storage": weight.dtype,
                "bnb_4bit_compute_dtype": module.compute_dtype,
            }
        )
    return made


def require_whole_experts(experts: Mapping[str, Any]) -> None:
    """Check that the quantized weights of experts are still there.

    Args:
        experts: modules with quantized experts, by path.

    Raises:
        QuantizationError: a weight was replaced, parametrized, or cast.
    """
    lost: dict[str, list[str]] = {}
    for path, module in experts.items():
        for name in module.quantized_experts.weights:
            lost.setdefault(damage(module._parameters.get(name)), []).append(f"{path}.{name}".lstrip("."))
    for reason, names in lost.items():
        if reason:
            raise QuantizationError(f"{listed(names)}: {reason}")


def require_experts_as_held(experts: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> None:
    """Check that a `state_dict` holds the quantized weights of experts under their own names, with all parts.

    Args:
        experts: modules with quantized experts, by path.
        state: of the model.

    Raises:
        QuantizationError: a hook has changed or renamed them.
    """
    changed = []
    for path, module in experts.items():
        own: dict[str, Any] = {}
        save_experts(module, own, f"{path}." if path else "", False)
        packed = [f"{path}.{name}".lstrip(".") for name in module.quantized_experts.weights]
        for name in packed:
            parts = [key for key in own if key == name or key.startswith(f"{name}.")]
            if any(key not in state or not torch.equal(_bytes(state[key]), _bytes(own[key])) for key in parts):
                changed.append(name)
    if changed:
        raise QuantizationError(
            f"{listed(changed)}: experts in 4 bit, but hooks have changed their weights in the state_dict, or their "
            "names: remove these hooks for the save"
        )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
