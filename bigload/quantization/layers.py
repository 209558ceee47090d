"""The layers of bitsandbytes around weights that are quantized already.

The layers are bitsandbytes' own classes, as PEFT and transformers expect. On the CPU some of its kernels fail or,
worse, are silently wrong for some shapes; those layers get a forward of ours, as an attribute of the instance, which
dequantizes and multiplies. What was found in version 0.50.2, by comparing with a dequantization written by hand:

* 4-bit, in_features no multiple of the blocksize: the AVX512-BF16 path raises, the other one is wrong by 20% and more
  when in_features is a multiple of 16 (scales are taken per row, where they run through the whole weight).
* 4-bit, AVX512-BF16: the first eval forward repacks the weight in place for its kernel, which needs out_features to
  be a multiple of 32, has no backward, crashes the process on no rows, and rounds the scales for good.
* int8, one input feature: torch._int_mm returns noise.
* int8 main weights: there is no kernel in eval mode, and backward fails on inputs of three dimensions.
"""

from __future__ import annotations

import copy
import functools
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional

from ..config import BnbQuantizationConfig
from ..errors import QuantizationError, listed
from ..model.tree import first_paths
from .bnb import dequantize_4bit, library
from .quantized_weight import QuantizedWeight

# Attributes of the layers that are made here, which mean nothing on others.
_OF_OUR_LAYERS = frozenset(
    ("forward", "state", "index", "quant_state", "quant_storage", "compute_dtype", "compute_type_is_set", "source_cls")
) | {"support_avx512bf16_for_cpu", "is_training"}
# Rows that bitsandbytes' packed CPU kernel takes at once.
_PACKED_ROWS = 32


def make_layer(
    layer: nn.Module,
    weight: QuantizedWeight | torch.Tensor,
    shape: tuple[int, ...],
    config: BnbQuantizationConfig,
    device: torch.device,
) -> nn.Module:
    """Make the bitsandbytes layer that takes the place of a plain one, around a weight without copying it.

    Its bias is on meta still, if it has one.

    Args:
        layer: the nn.Linear or Conv1D; its mode, hooks and extra attributes go over to the new one. Not changed.
        weight: quantized, or the 16-bit main weight of int8-training, (out_features, in_features).
        shape: (out_features, in_features).
        config: how it was quantized.
        device: that will compute with it.
    """
    make = _make_int8 if config.load_in_8bit else _make_4bit
    new = make(layer, weight, layer._parameters["bias"] is not None, shape, config)
    if device.type == "cpu":
        _adapt_to_cpu(new, shape, config)
    carry_over(new, layer)
    if type(layer) is not nn.Linear:
        new.source_cls = type(layer)  # type: ignore[assignment]  # as transformers calls it, to make such a layer again
    return new


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """List a model's layers of bitsandbytes, each by the first of its paths."""
    if "bitsandbytes" not in sys.modules:
        return {}
    kinds = (library().nn.Linear4bit, library().nn.Linear8bitLt)
    return {path: module for module, path in first_paths(model).items() if isinstance(module, kinds)}


def source_class(layer: nn.Module) -> type[nn.Module]:
    """Return the class of the plain layer that a layer, of bitsandbytes or not, stands for."""
    is_plain = not type(layer).__module__.startswith("bitsandbytes.")
    return type(layer) if is_plain else vars(layer).get("source_cls", nn.Linear)


def require_whole_layers(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Refuse a model whose quantized layers are not all there to be read as such.

    Raises:
        QuantizationError: layers that were never quantized, that hold adapters, or that bitsandbytes has packed.
    """
    adapted = [path for module, path in first_paths(model).items() if type(module).__module__.startswith("peft.")]
    if adapted:
        raise QuantizationError(
            f"{listed(adapted)}: of PEFT; save the adapter by its own save_pretrained, or call merge_and_unload() first"
        )
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
            "load the model anew (with bigload it may run before)"
        )
    if empty:
        raise QuantizationError(f"{listed(empty)}: not quantized yet; move the model to its device first")


def row_scales(layer: Any) -> Any:
    """Return an int8 layer's scales, which bitsandbytes moves from the weight to the state at the first forward."""
    return layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB


def config_of_layer(layer: Any) -> dict[str, Any]:
    """Return the fields of a config that say how a layer of bitsandbytes is quantized and how it computes."""
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


def _make_4bit(
    layer: nn.Module, weight: Any, has_bias: bool, shape: tuple[int, ...], config: BnbQuantizationConfig
) -> nn.Module:
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
    new.quant_state = weight.quant_state
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
        # CB must be given: without it the first forward would quantize the int8 rows again.
        new._parameters["weight"] = make(weight.data, requires_grad=False, CB=weight.data, SCB=weight.row_scales)
    return new


def _made(class_name: str, shape: tuple[int, ...], has_bias: bool, **options: Any) -> Any:
    """Make a layer without a weight, as its constructor would, but for the half a millisecond of that.

    The constructor runs once for layers that are alike; the others are copies of what it made, with containers and
    state of their own.
    """
    prototype = _prototype(class_name, shape, has_bias, **options)
    new = object.__new__(type(prototype))
    for key, value in vars(prototype).items():
        if isinstance(value, (dict, set)):
            value = value.copy()  # several times faster than copy.copy, and there are fifteen of them
        elif isinstance(value, library().MatmulLtState):
            value = copy.copy(value)
        new.__dict__[key] = value
    return new


@functools.lru_cache(maxsize=64)
def _prototype(class_name: str, shape: tuple[int, ...], has_bias: bool, **options: Any) -> nn.Module:
    made: nn.Module = getattr(library().nn, class_name)(shape[1], shape[0], has_bias, device="meta", **options)
    return made


def carry_over(new: nn.Module, old: nn.Module) -> None:
    """Carry over what is not the weight: train or eval mode, hooks, and attributes that the model set itself.

    What bitsandbytes, or bigload, gave one of its layers stays with that.
    """
    new.training = old.training
    own = _OF_OUR_LAYERS if type(old).__module__.startswith("bitsandbytes.") else frozenset()
    for name, value in old.__dict__.items():
        is_hooks = "_hook" in name and re.search("_hook(s|$)", name) and name in new.__dict__
        if name in own:
            continue
        if name == "_load_state_dict_pre_hooks":
            kept = {key: hook for key, hook in value.items() if hook.hook.__module__ != "bitsandbytes.nn.modules"}
            rewrapped = [(key, type(hook)(hook.hook, new if hook.with_module else None)) for key, hook in kept.items()]
            new.__dict__[name] = OrderedDict([*new.__dict__[name].items(), *rewrapped])
        elif is_hooks or name not in new.__dict__:
            # The very dict of hooks, so that the handles the caller holds still remove them.
            new.__dict__[name] = value


def _adapt_to_cpu(layer: Any, shape: tuple[int, ...], config: BnbQuantizationConfig) -> None:
    """Return a layer on the CPU a forward that is right for its shape, where bitsandbytes' own is not."""
    out_features, in_features = shape
    if config.load_in_4bit:
        has_packed_kernel = getattr(layer, "support_avx512bf16_for_cpu", False)
        layer.support_avx512bf16_for_cpu = False  # bitsandbytes would pack the weight itself, for good
        if in_features % config.bnb_4bit_blocksize:
            _set_forward(layer, _forward_4bit)
        elif has_packed_kernel and out_features % _PACKED_ROWS == 0:
            _set_forward(layer, _forward_packed)
    elif config.llm_int8_has_fp16_weight:
        _set_forward(layer, _forward_main_weights)
    elif in_features == 1:
        _set_forward(layer, _forward_int8)


def _set_forward(layer: Any, forward: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    # A partial of a module-level function: copies and pickles with the layer.
    layer.forward = functools.partial(forward, layer)


def _forward_4bit(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Multiply by the dequantized weight, which is right for every shape. x: (..., in_features)."""
    if x.device.type != "cpu":
        return type(layer).forward(layer, x)  # type: ignore[no-any-return]
    dtype = layer.compute_dtype or x.dtype
    bias = None if layer.bias is None else layer.bias.to(dtype)
    out: torch.Tensor = _DequantizedMatmul.apply(x.to(dtype), layer.weight)  # type: ignore[no-untyped-call]
    return (out if bias is None else out + bias).to(x.dtype)


class _DequantizedMatmul(torch.autograd.Function):
    """x @ weight.T for a frozen 4-bit weight, dequantized in each direction rather than kept between them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any) -> torch.Tensor:
        ctx.weight = weight
        return functional.linear(x, dequantize_4bit(weight.data, weight.quant_state, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        return grad @ dequantize_4bit(ctx.weight.data, ctx.weight.quant_state, grad.dtype), None


def _forward_int8(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Multiply by the dequantized rows. x: (..., in_features)."""
    if x.device.type != "cpu":
        return type(layer).forward(layer, x)  # type: ignore[no-any-return]
    scales = row_scales(layer)
    weight = layer.weight.data * (scales / 127).unsqueeze(1)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return functional.linear(x, weight.to(x.dtype), bias)


def _forward_main_weights(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Multiply a matrix in bitsandbytes' training mode, the one it has on the CPU. x: (..., in_features)."""
    if x.device.type != "cpu":
        return type(layer).forward(layer, x)  # type: ignore[no-any-return]
    layer.state.is_training = True
    layer.state.CB = None  # quantize the weight as it is now, whatever became of it since
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    out = library().matmul(x.reshape(-1, x.shape[-1]), layer.weight, bias=bias, state=layer.state)
    return out.view(*x.shape[:-1], out.shape[-1])  # type: ignore[no-any-return]


def _forward_packed(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Multiply with the packed kernel of AVX512-BF16 CPUs, 31 times faster for one token. x: (..., in_features).

    It has no backward and crashes on no rows: training and empty inputs take bitsandbytes' other path.
    """
    needs_grad = torch.is_grad_enabled() and x.requires_grad
    if torch.compiler.is_compiling():
        return type(layer).forward(layer, x)  # type: ignore[no-any-return]
    if x.device.type != "cpu" or layer.training or needs_grad or x.numel() == 0:
        return type(layer).forward(layer, x)  # type: ignore[no-any-return]
    dtype = layer.compute_dtype or x.dtype
    data, state = _packed(layer)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    out = library().matmul_4bit(x.to(dtype), data, bias=bias, quant_state=state)
    return out.to(x.dtype)  # type: ignore[no-any-return]


# The packed twin of each weight that ran, beside it and not, as bitsandbytes would, instead of it: packing rounds the
# scales, and whoever reads the weight (PEFT's merge, a state_dict) must find what was loaded.
_packed_twins: WeakKeyDictionary[nn.Module, tuple[tuple[int, int, int], Any, torch.Tensor, Any]] = WeakKeyDictionary()


def _packed(layer: Any) -> tuple[torch.Tensor, Any]:
    data, state = layer.weight.data, layer.weight.quant_state
    versions = (data.data_ptr(), _version(layer.weight), _version(state.absmax))
    twin = _packed_twins.get(layer)
    if twin is None or twin[0] != versions or twin[1] is not state:
        packed = library().functional._convert_weight_packed_for_cpu(data, copy.copy(state))
        twin = (versions, state, *packed)
        _packed_twins[layer] = twin
    return twin[2], twin[3]


def _version(tensor: torch.Tensor) -> int:
    """Count the writes to a tensor that torch knows of; inference tensors have no count."""
    return 0 if tensor.is_inference() else tensor._version


def streamed_forward(layer: nn.Module) -> Callable[..., Any]:
    """Return the forward that a layer shall have while its weight comes and goes: one that keeps no packed twin of it.

    For the layers that would use a twin it is bitsandbytes' own, which dequantizes and is right for their shapes.
    """
    own: Callable[..., Any] = layer.forward
    if hasattr(layer, "support_avx512bf16_for_cpu"):
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # it would pack what is in the slot
    if getattr(own, "func", None) is not _forward_packed:
        return own
    _packed_twins.pop(layer, None)
    return functools.partial(type(layer).forward, layer)


def input_gradient(layer: Any, own: Callable[..., Any], grad: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Multiply by a quantized layer's weight, bit for bit as the backward of its own forward does.

    Args:
        layer: of bitsandbytes, its weight in place.
        own: its forward.
        grad: of the output, (..., out_features).
        dtype: of the input.

    Returns:
        The gradient of the input, (..., in_features).
    """
    computed = dtype
    kernel = getattr(own, "func", None) if grad.device.type == "cpu" else None
    if hasattr(layer, "state"):
        rows, scales = layer.state.CB, layer.state.SCB.unsqueeze(1)
        if kernel is _forward_int8:
            weight = (rows * (scales / 127)).to(dtype)
        else:
            weight = rows.to(dtype, copy=True).mul_(scales.mul(1.0 / 127.0))
    else:
        computed = layer.compute_dtype or dtype
        data, state = layer.weight.data, layer.weight.quant_state
        if kernel is _forward_4bit:
            weight = dequantize_4bit(data, state, computed)
        else:
            weight = library().functional.dequantize_4bit(data.view(-1, 1), state).to(computed)
    return torch.matmul(grad.to(computed), weight).to(dtype)
