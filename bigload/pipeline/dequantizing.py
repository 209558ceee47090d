"""`dequantize_model`: turns quantized layers back into plain ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, QuantizationError, listed
from ..hardware.devices import on_cpu_unless_named
from ..hardware.interrupts import check_interrupt, deferred_interrupts
from ..inspection.aliases import aliases
from ..model import transformers_facts
from ..model.experts import Experts
from ..model.tree import first_paths
from ..model.view import require_module
from ..offload.device_hooks import detach_from_layers
from ..offload.forwards import forward_override_of
from ..quantization.bnb import dequantize_4bit, library
from ..quantization.layers import carry_over, dtype_loaded_in, quantized_layers, require_whole_layers, source_class
from ..quantization.packed_experts import PackedExperts
from ..quantization.quantized_weight import row_scales
from ..quantization.saved_experts import quantization_attributes, quantized_experts, require_whole_experts
from .assembly import apply_edits
from .attributes import ABSENT, Edit, clear_attributes
from .exchange import exchanges

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@deferred_interrupts()
@on_cpu_unless_named()
def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Turn a model's bitsandbytes layers back into plain ones, with the values that they compute with.

    Fused experts become parameters in their module's own layout, and it gets its own forward back. Hooks, train or eval
    mode, ties and `requires_grad` are kept. The plain weights need memory beside the quantized ones until all are made;
    on failure the model is unchanged.

    Args:
        model: changed in place.
        dtype: of the dequantized weights and their biases. None means the dtype that a 4-bit weight was quantized from.
            int8 does not store it: None then means the `torch_dtype` that bigload loaded the layer in or, if another
            library quantized it, the dtype in the model's config, else the dominant dtype of its other weights.

    Returns:
        The same model. If the model itself is a quantized layer, the layer that replaces it.

    Raises:
        ConfigError: `dtype` is no floating dtype, or the model has no quantized layer.
        QuantizationError: a layer holds adapters, is offloaded, or was packed by bitsandbytes for the CPU.

    Examples:
        >>> import bigload, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> model = bigload.load_and_quantize_model(net, "nf4", device_map="cpu")
        >>> bigload.dequantize_model(model)[0]
        Linear(in_features=64, out_features=64, bias=True)
    """
    if dtype is not None and dtype not in _FLOATS:
        raise ConfigError(f"dtype is {dtype!r}; expected torch.float32, float16 or bfloat16, or None")
    require_module(model)
    layers, experts = quantized_layers(model), quantized_experts(model)
    if not layers and not experts:
        raise ConfigError(f"this {type(model).__name__} has no layer that bitsandbytes quantized")
    require_whole_layers(model, layers)
    require_whole_experts(experts)
    _require_own_forwards(layers | experts)
    own = dtype_loaded_in(model, layers.values()) or torch.float32
    plain = {layer: _plain(layer, dtype, own) for layer in layers.values()}
    modules = first_paths(model)
    edits: list[Edit] = [
        (module._modules, name, plain[child])
        for module in modules
        for name, child in module._modules.items()
        if child in plain
    ]
    held = aliases(modules, lambda value: getattr(value, "__self__", value) in plain)
    edits += exchanges(held, plain, {})
    for module in experts.values():
        edits += _edits_of_experts(module, dtype)
    root = plain.get(model, model)
    apply_edits(edits + clear_attributes(root))
    detach_from_layers(model)
    return root


def _require_own_forwards(layers: dict[str, Any]) -> None:
    dispatched = [path for path, layer in layers.items() if "_hf_hook" in vars(layer)]
    if dispatched:
        raise QuantizationError(
            f"{listed(dispatched)}: dispatched by accelerate; call remove_hook_from_submodules(model) first"
        )
    streamed = [path for path, layer in layers.items() if forward_override_of(layer)]
    if streamed:
        raise QuantizationError(
            f"{listed(streamed)}: offloaded; call model.offload.remove() first, or load the unquantized checkpoint"
        )


@torch.no_grad()
def _plain(layer: Any, dtype: torch.dtype | None, own: torch.dtype) -> nn.Module:
    check_interrupt()
    weight = layer.weight
    if isinstance(layer, library().nn.Linear4bit):
        values = dequantize_4bit(weight.data, weight.quant_state, dtype or weight.quant_state.dtype)
    elif layer.state.has_fp16_weights:
        values = weight.data.to(dtype or weight.dtype)
    else:
        # LLM.int8(), arXiv 2208.07339, section 2: the scale of each row is its largest absolute value over 127.
        values = (weight.data * (row_scales(layer) / 127).unsqueeze(1)).to(
            dtype or vars(layer).get("loaded_dtype", own)
        )
    kind = source_class(layer)
    new = _empty(kind, values.shape, layer.bias is not None)
    if transformers_facts.is_conv1d_class(kind):
        values = values.mT.contiguous()
    new._parameters["weight"] = nn.Parameter(values, requires_grad=weight.requires_grad)
    if layer.bias is not None:
        same = dtype is None or layer.bias.dtype == dtype
        bias = layer.bias if same else nn.Parameter(layer.bias.to(dtype), requires_grad=layer.bias.requires_grad)
        new._parameters["bias"] = bias
    carry_over(new, layer)
    return new


@torch.no_grad()
def _edits_of_experts(module: Any, dtype: torch.dtype | None) -> list[Edit]:
    """Return the assignments that make a module's experts plain, in its own layout."""
    experts: Experts = module.quantized_experts
    edits: list[Edit] = [(vars(module), name, ABSENT) for name in quantization_attributes(module)]
    for name in experts.weights:
        packed = PackedExperts.of(module._parameters[name])
        kept = dtype or packed.state.dtype
        values = torch.empty(experts.plain_shape(name), dtype=kept, device=packed.data.device)
        for expert in range(packed.shape[0]):
            one = packed.dequantize(expert, kept)
            values[expert] = one.mT if experts.is_transposed else one
        edits.append((module._parameters, name, nn.Parameter(values, requires_grad=False)))
    for name in experts.biases:
        bias = module._parameters[name]
        if dtype is not None and bias.dtype != dtype:
            cast = nn.Parameter(bias.to(dtype), requires_grad=bias.requires_grad)
            edits.append((module._parameters, name, cast))
    return edits


def _empty(kind: type[nn.Module], shape: torch.Size, has_bias: bool) -> nn.Module:
    with torch.device("meta"):
        if transformers_facts.is_conv1d_class(kind):
            return kind(*shape)
        layer = nn.Linear(shape[1], shape[0], bias=has_bias)
    # Not made by the constructor of `kind`, whose arguments are unknown; the attributes that it set are carried over.
    layer.__class__ = kind  # type: ignore[assignment]
    return layer
