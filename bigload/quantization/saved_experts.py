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
from .bnb import library
from .experts import has_quantized_experts, quantized_attributes
from .packed_experts import damage
from .quantized_weight import state_holders


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


def load_experts(
    module: Any,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Load what `save_experts` saved, as `load_state_dict` calls it; packed bytes mean nothing without their scales.

    Values are copied, with `assign=True` too: the parameter holds more than a tensor. Of a weight that is refused
    nothing is written.
    """
    read, states = set(), {}
    for name in module.quantized_experts.weights:
        full = prefix + name
        parts = {key[len(full) + 1 :]: key for key in state_dict if key.startswith(f"{full}.")}
        read |= set(parts.values())
        if full not in state_dict and not parts:
            continue
        try:
            states[name] = _state_of(
                module._parameters[name],
                state_dict.get(full),
                {part: state_dict[key] for part, key in parts.items()},
            )
        except ValueError as error:
            error_msgs.append(f"{full!r} holds experts in 4 bit, and {error}")
            state_dict.pop(full, None)
            read.add(full)
    copying = {**local_metadata, "assign_to_params_buffers": False}
    own = type(module)._load_from_state_dict  # calls the hooks before it copies
    absent: list[str] = []
    own(module, state_dict, prefix, copying, strict, absent, unexpected_keys, error_msgs)
    missing_keys += [key for key in absent if key not in read]
    unexpected_keys[:] = [key for key in unexpected_keys if key not in read]
    for name, state in states.items():
        parameter = module._parameters[name]
        holders = state_holders(parameter.quant_state)
        for part, holder in state_holders(state).items():
            getattr(*holders[part]).copy_(getattr(*holder))
        torch.autograd.graph.increment_version(parameter)  # by which streamed weights notice new scales


def _state_of(parameter: Any, weight: Any, parts: Mapping[str, torch.Tensor]) -> Any:
    """Return the QuantState of a packed weight and its parts in a state_dict.

    Raises:
        ValueError: with the reason why a parameter cannot take them.
    """
    state = parameter.quant_state
    if weight is None or not parts:
        lacking = "its packed bytes" if weight is None else "the scales of its packed bytes"
        raise ValueError(f"the state_dict lacks {lacking}: load all that the state_dict of such a model holds of it")
    try:
        new = library().functional.QuantState.from_dict(dict(parts), device=state.absmax.device)
    except Exception as error:
        raise ValueError(f"its quant_state in the state_dict cannot be read: {error}") from error
    kinds = [(tuple(one.shape), one.quant_type, one.blocksize, bool(one.nested)) for one in (state, new)]
    packed = [(tensor.dtype, tuple(tensor.shape)) for tensor in (parameter, weight)]
    if kinds[0] != kinds[1] or packed[0] != packed[1]:
        raise ValueError(
            f"the state_dict holds {kinds[1]} packed as {packed[1]} where {kinds[0]} packed as {packed[0]} is needed"
        )
    return new


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
    return tensor.detach().cpu().reshape(-1).view(torch.uint8)
