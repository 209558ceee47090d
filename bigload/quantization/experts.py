"""The forward of fused experts whose weights are 4-bit parameters of bitsandbytes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._compile import _disable_dynamo

from ..config import BnbQuantizationConfig
from ..errors import QuantizationError, listed
from ..model.experts import Experts
from . import expert_launches as launches
from .bnb import library
from .copied_layers import refuse_replicas, register_copies
from .expert_linears import Routing, expert_limits, grouped_linear
from .own_forwards import require_input
from .packed_experts import PackedExperts, damage
from .quantized_weight import QuantizedWeight


def experts_parameter(weight: QuantizedWeight, config: BnbQuantizationConfig) -> nn.Parameter:
    """Return the `Params4bit` of one weight of fused experts; nothing is copied.

    Args:
        weight: its quant_state has the shape `Experts.packed_shape`, (E, out_features, in_features).
        config: how it was quantized.
    """
    made: nn.Parameter = library().nn.Params4bit(
        weight.data,
        requires_grad=False,
        quant_state=weight.quant_state,
        blocksize=config.bnb_4bit_blocksize,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        quant_storage=config.bnb_4bit_quant_storage,
        bnb_quantized=True,
    )
    return made


def quantized_attributes(module: nn.Module, experts: Experts, compute_dtype: torch.dtype, path: str) -> dict[str, Any]:
    """Return what is set on a module, beside its parameters, when its experts are quantized.

    Args:
        module: the experts.
        experts: what is known of it.
        compute_dtype: that inputs are cast to.
        path: of the module in its model, which errors name.

    Returns:
        Attributes by name. `forward` is a partial of a module-level function, copied and pickled with the module.
    """
    register_copies(type(module))
    return {
        "quantized_experts": experts,
        "compute_dtype": compute_dtype,
        "loaded_as": path,
        "forward": functools.partial(experts_forward, module),
        "_replicate_for_data_parallel": functools.partial(refuse_replicas, path),
    }


def has_quantized_experts(module: nn.Module) -> bool:
    """Whether a module's experts are computed in 4 bit."""
    return "quantized_experts" in module.__dict__


def experts_forward(module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Compute fused experts of which both weights are quantized.

    Gradients reach the tokens and the weights of the routing, not the experts.

    Args:
        module: has the attributes of `quantized_attributes`.
        args, kwargs: as its own forward takes them: hidden_states, (T, H); top_k_index, (T, k), where numbers beyond
            the last expert add nothing; top_k_weights, (T, k). For Llama-4 hidden_states alone, (E * T, H).

    Returns:
        (T, H), or for Llama-4 (E * T, H), in the dtype of hidden_states.

    Raises:
        QuantizationError: hidden_states holds no floating-point numbers, has another width, or lies on another device;
            what it is given does not fit together; a packed weight was replaced or cast.
    """
    compute = _uncompiled if torch.compiler.is_compiling() else _forward
    return compute(module, args, kwargs)


def arguments_of(module: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return what the forward of quantized experts was given, in the order of its own arguments.

    Raises:
        TypeError: an argument is missing, or is none of the module's own, as Python would raise.
    """
    names = module.quantized_experts.arguments
    if len(args) + len(kwargs) != len(names) or not kwargs.keys() <= set(names[len(args) :]):
        raise TypeError(
            f"the experts of {module.loaded_as or 'the model'!r} take ({', '.join(names)}), but got {len(args)} by "
            f"position and {listed(kwargs) if kwargs else 'none'} by name"
        )
    return [*args, *(kwargs[name] for name in names[len(args) :])]


def _forward(module: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    experts: Experts = module.quantized_experts
    given = arguments_of(module, args, kwargs)
    for name in experts.weights:
        if reason := damage(module._parameters.get(name)):
            raise QuantizationError(f"{name!r} of {module.loaded_as or 'the model'!r}: {reason}")
    weights = [PackedExperts.of(module._parameters[name]) for name in experts.weights]
    return compute_experts(module, routed(module, given, weights[0].scales), weights)


class Routed(NamedTuple):
    """What the forward of experts is given: tokens, (T, H); their experts, (T, k); the weights of these; None for 1."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor | None


def routed(module: Any, given: Sequence[Any], beside: torch.Tensor) -> Routed:
    """Check what the forward of quantized experts is given.

    Args:
        module: the experts.
        given: from `arguments_of`.
        beside: a tensor on the device that computes.

    Raises:
        QuantizationError: as `experts_forward`.
    """
    experts: Experts = module.quantized_experts
    require_input(module, given[0], beside, experts.hidden_size)
    if experts.kind == "sorted":
        return Routed(given[0], _llama4_routing(experts, given[0]), None)
    x, ids, weights = given
    if ids.dim() != 2 or x.shape[:-1] != ids.shape[:1] or weights.shape != ids.shape:  # kernels would read past them
        names, shapes = listed(experts.arguments), ", ".join(str(tuple(tensor.shape)) for tensor in given)
        raise QuantizationError(
            f"{module.loaded_as or 'the model'!r} holds experts in 4 bit and takes {names} of shapes "
            f"(T, {experts.hidden_size}), (T, k), (T, k), but got {shapes}"
        )
    return Routed(x, ids, weights)


# Always to call it so would import torch._dynamo, which takes more than a second, and some microseconds each time.
_uncompiled = _disable_dynamo(_forward)


def _llama4_routing(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    """Return the expert of each row, (E * T, 1); beyond the last for rows of zeros, of which all experts make zeros.

    Llama-4 multiplies all tokens by their score for every expert, which is 0 unless they were routed to it.
    """
    number = experts.num_experts
    owner = torch.arange(number, device=x.device).repeat_interleave(len(x) // number)
    return owner.where((x != 0).any(-1), number).unsqueeze(-1)


def compute_experts(module: Any, given: Routed, packed: Sequence[PackedExperts]) -> torch.Tensor:
    """Choose the way and compute.

    Args:
        module: the experts.
        given: from `routed`.
        packed: its two weights; of experts that no token is routed to they may lack the values.

    Returns:
        As `experts_forward`. Has gradients only if they are enabled and wanted.
    """
    experts: Experts = module.quantized_experts
    hidden_states, ids, weights = given
    x = hidden_states.to(module.compute_dtype)
    layers = [
        # By getattr: a bias may be parametrized.
        _Layer(weight, getattr(module, f"{name}_bias") if experts.has_bias else None)
        for name, weight in zip(experts.weights, packed, strict=True)
    ]
    tokens = len(x) // experts.num_experts if experts.kind == "sorted" else len(x)
    by_kernels = tokens > 0 and all(launches.suits_kernels(layer.weight, x.dtype) for layer in layers)
    if not by_kernels:
        return _many(module, experts, x, Routing.of(ids, experts.num_experts, False), weights, layers).to(
            hidden_states.dtype
        )
    wants_gradients = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, weights, *(layer.bias for layer in layers))
    )
    with torch.cuda.device(x.device):  # Triton launches on the current one
        if tokens <= expert_limits.grouped_tokens and not wants_gradients:
            few = _one_by_one if tokens <= expert_limits.gemv_tokens else _grouped
            out = few(module, experts, x.contiguous(), ids.contiguous(), weights, layers)
        else:
            out = _many(module, experts, x, Routing.of(ids, experts.num_experts, True), weights, layers)
    return out.to(hidden_states.dtype)


class _Layer(NamedTuple):
    weight: PackedExperts
    bias: torch.Tensor | None


def _one_by_one(
    module: Any,
    experts: Experts,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    layers: Sequence[_Layer],
) -> torch.Tensor:
    """Compute each pair by itself, in as few launches as there can be: the CPU that launches is what takes the time."""
    up, down = layers
    gated = experts.is_swiglu(module)
    h = launches.gemv(x, up.weight, ids, ids.shape[1], up.bias, gated=gated)
    if not gated:
        h = experts.activate(module, h).contiguous()
    if weights is not None and not experts.has_norm(module):
        return launches.gemv_combined(h, down.weight, ids, down.bias, weights.contiguous())
    y = launches.gemv(h, down.weight, ids, 1, down.bias)
    return _combine(module, experts, y, ids, weights)


def _grouped(
    module: Any,
    experts: Experts,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    layers: Sequence[_Layer],
) -> torch.Tensor:
    """Compute the pairs of each expert together, its weights dequantized on the way."""
    if ids.numel() <= launches.MAX_ROUTED:
        order, ends = launches.route(ids, experts.num_experts)
    else:
        routing = Routing.of(ids, experts.num_experts, True)
        order, ends = routing.order, routing.ends
    up, down = layers
    h = launches.grouped(x, up.weight, order, ends, ids.shape[1], up.bias)
    h = experts.activate(module, h).contiguous()
    y = launches.grouped(h, down.weight, order, ends, 1, down.bias)
    return _combine(module, experts, y, ids, weights)


def _combine(
    module: Any, experts: Experts, y: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    y = experts.normalize(module, y).contiguous()
    return launches.combine(y, ids, None if weights is None else weights.contiguous(), experts.num_experts)


def _many(
    module: Any,
    experts: Experts,
    x: torch.Tensor,
    routing: Routing,
    weights: torch.Tensor | None,
    layers: Sequence[_Layer],
) -> torch.Tensor:
    """Compute the pairs in the order of their experts, with gradients."""
    up, down = layers
    h = grouped_linear(routing.gather(x), up.weight, routing, up.bias)
    y = grouped_linear(experts.activate(module, h), down.weight, routing, down.bias)
    return routing.combine(experts.normalize(module, y), weights)
