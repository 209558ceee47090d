"""bitsandbytes' layers, made for weights that are quantized already, and what is read from such layers.

They are instances of bitsandbytes' own classes, as PEFT and transformers expect.
"""

from __future__ import annotations

import copy
import functools
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..config import BnbQuantizationConfig
from ..errors import QuantizationError, listed
from ..model.transformers_facts import config_dtype
from ..model.tree import first_paths
from .bnb import library
from .copied_layers import refuse_replicas, register_copies
from .cpu_forwards import adapt_to_cpu
from .formats import dominant_dtype
from .own_forwards import own_forward, set_forward
from .quantized_weight import QuantizedWeight, load_packed, load_rows, move_shared_scales, row_scales

# Attributes that bitsandbytes, or this package, sets on bitsandbytes' layers.
_LAYER_ATTRIBUTES = {
    "_apply",
    "_load_from_state_dict",
    "_replicate_for_data_parallel",
    "compute_dtype",
    "compute_type_is_set",
    "forward",
    "forward_when_loaded",
    "guards",
    "index",
    "is_training",
    "loaded_as",
    "loaded_dtype",
    "quant_state",
    "quant_storage",
    "source_cls",
    "state",
    "support_avx512bf16_for_cpu",
}


def make_layer(
    layer: nn.Module,
    weight: QuantizedWeight | torch.Tensor,
    shape: tuple[int, ...],
    config: BnbQuantizationConfig,
    device: torch.device,
    path: str = "",
) -> nn.Module:
    """Make the bitsandbytes layer that replaces a plain one; the weight is not copied, a bias is still on meta.

    Args:
        layer: an nn.Linear or Conv1D, whose mode, hooks and extra attributes the new layer gets. Not changed.
        weight: quantized, or the 16-bit main weight of int8-training, (out_features, in_features).
        shape: (out_features, in_features).
        config: how the weight was quantized.
        device: where the layer will compute.
        path: of the layer in its model, which errors name.
    """
    has_bias = layer._parameters["bias"] is not None
    if config.load_in_8bit:
        new = _make_int8(layer, weight, has_bias, shape, config)
    else:
        new = _make_4bit(weight, has_bias, shape, config)
    # For errors, and for dequantize_model: int8 does not store what it was quantized from.
    refuse = functools.partial(refuse_replicas, path)
    vars(new).update(loaded_as=path, loaded_dtype=config.load_dtype, _replicate_for_data_parallel=refuse)
    set_forward(new, own_forward(new))
    if config.load_in_8bit:
        new.__dict__["_apply"] = functools.partial(move_int8, new)
        if not config.llm_int8_has_fp16_weight:
            new.__dict__["_load_from_state_dict"] = functools.partial(load_rows, new)
    else:
        new.__dict__["_load_from_state_dict"] = functools.partial(load_4bit, new)
        if config.bnb_4bit_quant_storage.is_floating_point:  # type: ignore[union-attr]  # the config has checked it
            new.__dict__["_apply"] = functools.partial(move_packed, new)
    if device.type == "cpu":
        adapt_to_cpu(new, shape, config)
    carry_over(new, layer)
    if type(layer) is not nn.Linear:
        new.source_cls = type(layer)  # type: ignore[assignment]  # transformers' name for it
    return new


def load_4bit(layer: nn.Module, *given: Any) -> None:
    """Load what a 4-bit layer saves, as its `_load_from_state_dict`; bitsandbytes would copy the packed bytes alone."""
    weight: Any = layer._parameters.get("weight")
    if getattr(weight, "quant_state", None) is None and getattr(weight, "shape", ())[1:] == (1,):
        weight.quant_state = layer.quant_state  # as bitsandbytes' forward does: copies of a pickled layer have lost it
    load_packed(layer, ("weight",), *given)


def move_int8(layer: Any, move: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """Move an int8 layer with the rows and scales that its kernels are given, as its `_apply`.

    torch moves the weight's memory alone; bitsandbytes would go on computing with what lies on the device before.
    """
    type(layer)._apply(layer, move, recurse)
    weight, state = layer._parameters.get("weight"), layer.state  # one that is offloaded is no parameter
    for holder in (weight, state):
        rows = getattr(holder, "CB", None)
        if weight is None or rows is None or rows.device == weight.device:
            continue
        if state.has_fp16_weights:
            holder.CB = holder.SCB = None  # quantized again in the next forward
        else:
            holder.CB, holder.SCB = weight.data, holder.SCB.to(weight.device)
    move_shared_scales(weight)
    return layer  # type: ignore[no-any-return]


def move_packed(layer: Any, move: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """Move a layer whose packed bytes are stored as floats, as its `_apply`: a cast, as by `half()`, leaves them.

    torch would cast them as if they were values, after which they mean nothing.
    """
    weight = layer._parameters.get("weight")  # one that is offloaded is no parameter
    if getattr(weight, "quant_state", None) is None or not weight.dtype.is_floating_point:
        return type(layer)._apply(layer, move, recurse)  # type: ignore[no-any-return]
    stored = weight.dtype
    weight.data = weight.data.view(torch.uint8)
    try:
        return type(layer)._apply(layer, move, recurse)  # type: ignore[no-any-return]
    finally:
        moved = layer._parameters["weight"]
        moved.data = moved.data.view(stored)


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a layer of bitsandbytes; does not import bitsandbytes."""
    if "bitsandbytes" not in sys.modules:
        return False
    return isinstance(module, (library().nn.Linear4bit, library().nn.Linear8bitLt))


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """Return a model's layers of bitsandbytes, each by its first path."""
    return {path: module for module, path in first_paths(model).items() if is_quantized(module)}


def source_class(layer: nn.Module) -> type[nn.Module]:
    """Return the class of the plain layer that a layer of bitsandbytes replaced; for others, their own class."""
    is_plain = not type(layer).__module__.startswith("bitsandbytes.")
    return type(layer) if is_plain else vars(layer).get("source_cls", nn.Linear)


def modules_of_peft(model: nn.Module) -> list[str]:
    """Return the paths of modules that PEFT has put into a model, those that stand for a layer of it first."""
    found = {path: module for module, path in first_paths(model).items() if type(module).__module__.startswith("peft.")}
    return sorted(found, key=lambda path: "base_layer" not in found[path]._modules)


def require_whole_layers(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Check that all weights of quantized layers can be read.

    Args:
        model: checked for PEFT's adapters.
        layers: the model's quantized layers, by path.

    Raises:
        QuantizationError: a layer is divided among processes, is not quantized yet, was built empty and never loaded,
            has an adapter, or was packed for the CPU by bitsandbytes.
    """
    adapted = modules_of_peft(model)
    if adapted:
        raise QuantizationError(
            f"{listed(adapted, 3)}: of PEFT; save the adapter by its own save_pretrained, or call merge_and_unload() "
            "first"
        )
    divided = [path for path, layer in layers.items() if hasattr(layer._parameters.get("weight"), "_local_tensor")]
    if divided:
        raise QuantizationError(
            f"{listed(divided)}: divided among processes; load the model by one process, or with replicate=True"
        )
    unfilled = [path for path, layer in layers.items() if "forward_when_loaded" in vars(layer)]
    if unfilled:
        raise QuantizationError(f"{listed(unfilled)}: built empty, and never loaded; load a checkpoint that holds them")
    packed, empty = [], []
    for path, layer in layers.items():
        state = getattr(layer.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            packed.append(path)
        is_int8 = isinstance(layer, library().nn.Linear8bitLt)
        has_rows = (row_scales(layer) if is_int8 else state) is not None
        if not has_rows and not (is_int8 and layer.state.has_fp16_weights):
            empty.append(path)
    if packed:
        raise QuantizationError(
            f"{listed(packed)}: packed by bitsandbytes for this CPU when it ran, which rounds the scales for good; "
            "load the model again (one that bigload loaded may run before)"
        )
    if empty:
        raise QuantizationError(f"{listed(empty)}: not quantized yet; move the model to its device first")


def config_of_layer(layer: Any) -> dict[str, Any]:
    """Return the fields of a BnbQuantizationConfig that a layer of bitsandbytes was made with."""
    if isinstance(layer, library().nn.Linear8bitLt):
        return {
            "load_in_8bit": True,
            "llm_int8_threshold": float(layer.state.threshold),
            "llm_int8_has_fp16_weight": bool(layer.state.has_fp16_weights),
        }
    state = layer.weight.quant_state
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": state.quant_type,
        "bnb_4bit_blocksize": state.blocksize,
        "bnb_4bit_use_double_quant": bool(state.nested),
        "bnb_4bit_quant_storage": layer.weight.dtype,
        "bnb_4bit_compute_dtype": layer.compute_dtype or state.dtype,
    }


def dtype_loaded_in(model: nn.Module, layers: Iterable[Any]) -> torch.dtype | None:
    """Return the dtype that a model with quantized layers was loaded in, or None if nothing tells it.

    It is what most of the layers were quantized from; the dominant dtype of the other weights only if none of them has
    that (the model was cast since), or if the layers do not tell. Of the other weights, most bytes may be what a class
    keeps in float32, as T5 does.

    Args:
        model: its weights that are not quantized count.
        layers: its layers of bitsandbytes.
    """
    plain = [(p.dtype, p.nbytes) for p in model.parameters() if type(p) is nn.Parameter and p.is_floating_point()]
    told = [(dtype, layer.in_features * layer.out_features) for layer in layers if (dtype := _dtype_loaded_in(layer))]
    asked = dominant_dtype(told) if told else config_dtype(model)
    if asked is not None and (not plain or any(dtype == asked for dtype, _ in plain)):
        return asked
    return dominant_dtype(plain) if plain else None


def _dtype_loaded_in(layer: Any) -> torch.dtype | None:
    """Return what a layer was quantized from; bitsandbytes' int8 does not store it."""
    of_weight: torch.dtype | None = getattr(getattr(layer.weight, "quant_state", None), "dtype", None)
    return vars(layer).get("loaded_dtype", of_weight)  # type: ignore[no-any-return]


def _make_4bit(weight: Any, has_bias: bool, shape: tuple[int, ...], config: BnbQuantizationConfig) -> nn.Module:
    options = {
        "compress_statistics": config.bnb_4bit_use_double_quant,
        "quant_type": config.bnb_4bit_quant_type,
        "quant_storage": config.bnb_4bit_quant_storage,
    }
    new: nn.Module = _made("Linear4bit", shape, has_bias, compute_dtype=config.bnb_4bit_compute_dtype, **options)
    new._parameters["weight"] = library().nn.Params4bit(
        weight.data,
        requires_grad=False,
        quant_state=weight.quant_state,
        blocksize=config.bnb_4bit_blocksize,
        module=new,
        bnb_quantized=True,
        **options,
    )
    new.__dict__["quant_state"] = weight.quant_state  # as an assignment does, which looks for modules and tensors first
    return new


def _make_int8(
    layer: nn.Module, weight: Any, has_bias: bool, shape: tuple[int, ...], config: BnbQuantizationConfig
) -> nn.Module:
    trains = config.llm_int8_has_fp16_weight
    new: nn.Module = _made(
        "Linear8bitLt", shape, has_bias, has_fp16_weights=trains, threshold=float(config.llm_int8_threshold)
    )
    make = functools.partial(library().nn.Int8Params, has_fp16_weights=trains)
    if trains:
        new._parameters["weight"] = make(weight, requires_grad=layer.get_parameter("weight").requires_grad)
    else:
        # Without CB, the first forward would quantize the int8 rows again.
        new._parameters["weight"] = make(weight.data, requires_grad=False, CB=weight.data, SCB=weight.row_scales)
    return new


def _made(class_name: str, shape: tuple[int, ...], has_bias: bool, **options: Any) -> Any:
    """Make a layer without its weight.

    The constructor, which takes half a millisecond, runs once for equal arguments. Each layer is a copy of what it
    made, with its own containers and state.
    """
    prototype, containers = _prototype(class_name, shape, has_bias, **options)
    new = object.__new__(type(prototype))
    attributes = vars(new)
    attributes.update(vars(prototype))
    for key in containers:
        attributes[key] = attributes[key].copy()  # several times faster than copy.copy, for some fifteen attributes
    if "state" in attributes:
        attributes["state"] = copy.copy(attributes["state"])
    return new


@functools.lru_cache(maxsize=64)
def _prototype(
    class_name: str, shape: tuple[int, ...], has_bias: bool, **options: Any
) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a layer on meta, and the names of its attributes that are dicts and sets."""
    made: nn.Module = getattr(library().nn, class_name)(shape[1], shape[0], has_bias, device="meta", **options)
    register_copies(type(made))
    return made, tuple(key for key, value in vars(made).items() if isinstance(value, (dict, set)))


def carry_over(new: nn.Module, old: nn.Module) -> None:
    """Copy a layer's train or eval mode, hooks, and attributes that the model set to the layer that replaces it.

    Attributes that bitsandbytes or this package set on `old` are not copied.
    """
    new.__dict__["training"] = old.training
    own = _LAYER_ATTRIBUTES if type(old).__module__.startswith("bitsandbytes.") else set()
    attributes = new.__dict__
    for name, value in old.__dict__.items():
        is_known = name in attributes
        is_unset = value is None or (isinstance(value, dict) and not value)
        if name in own or (is_known and is_unset):
            continue
        is_hooks = is_known and _holds_hooks(name)
        if name == "_load_state_dict_pre_hooks":
            kept = {key: hook for key, hook in value.items() if hook.hook.__module__ != "bitsandbytes.nn.modules"}
            rewrapped = [(key, type(hook)(hook.hook, new if hook.with_module else None)) for key, hook in kept.items()]
            attributes[name] = OrderedDict([*attributes[name].items(), *rewrapped])
        elif is_hooks or not is_known:
            # The same dict of hooks, so that the caller's handles still remove them.
            attributes[name] = value


@functools.cache
def _holds_hooks(attribute: str) -> bool:
    return re.search("_hook(s|$)", attribute) is not None
