"""The only room that knows bitsandbytes, and imports it when first needed: quantize a weight, make its layer.

The layers are bitsandbytes' own classes, as PEFT and transformers expect. On the CPU some of its kernels fail or,
worse, are silently wrong for some shapes; those layers get a forward of ours, as an attribute of the instance, which
dequantizes and multiplies. What was found in version 0.50.2, by comparing with a dequantization written by hand:

* 4-bit, in_features no multiple of the blocksize: the AVX512-BF16 path raises, the other one is wrong by 20% and more
  when in_features is a multiple of 16 (scales are taken per row, where they run through the whole weight).
* 4-bit, AVX512-BF16: the first eval forward repacks the weight in place for its kernel, which needs out_features to
  be a multiple of 32, has no backward, and rounds the scales for good.
* int8, one input feature: torch._int_mm returns noise.
* int8 main weights: there is no kernel in eval mode, and backward fails on inputs of three dimensions.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .config import BnbQuantizationConfig
from .errors import MissingDependencyError
from .formats import FourBit, Int8

# Rows that bitsandbytes' packed CPU kernel takes at once.
_PACKED_ROWS = 32


@functools.cache
def library() -> Any:
    """Import bitsandbytes, which takes seconds and initializes the GPU.

    Raises:
        MissingDependencyError: it is not installed, or its native library does not load.
    """
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise MissingDependencyError(f"bitsandbytes cannot be imported: {error}; pip install bitsandbytes") from error


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight as bitsandbytes holds it.

    Attributes:
        data: the packed 4-bit bytes in quant_storage, (n, 1), or the int8 rows, (out_features, in_features).
        quant_state: of a 4-bit weight, a `bitsandbytes.functional.QuantState`.
        row_scales: of an int8 weight, its SCB: fp32, (out_features,).
    """

    data: torch.Tensor
    quant_state: Any = None
    row_scales: torch.Tensor | None = None

    @property
    def scales(self) -> torch.Tensor:
        """The scales that are not finite if any weight was not: SCB, absmax, or the mean of double-quantized ones."""
        if self.row_scales is not None:
            return self.row_scales
        return self.quant_state.offset if self.quant_state.nested else self.quant_state.absmax  # type: ignore[no-any-return]


def quantize(weight: torch.Tensor, fmt: FourBit | Int8) -> QuantizedWeight:
    """Quantize one weight where it lies, on the default stream of its device.

    Args:
        weight: (out_features, in_features), floating point; read, not kept.
        fmt: the format to quantize to.

    Source: LLM.int8(), arXiv 2208.07339; QLoRA, section 3, arXiv 2305.14314.
    """
    kernels = library().functional
    if isinstance(fmt, Int8):
        # Contiguous: a transposed weight would be misread without a word.
        rows, row_scales, _ = kernels.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        return QuantizedWeight(rows, row_scales=row_scales)
    data, state = kernels.quantize_4bit(
        weight.contiguous(),
        blocksize=fmt.blocksize,
        compress_statistics=fmt.double_quant,
        quant_type=fmt.quant_type,
        quant_storage=fmt.quant_storage,
    )
    # One code table for all weights of a device, where bitsandbytes makes one for each.
    state.code = _code_tables.setdefault((fmt.quant_type, weight.device), state.code)
    if state.nested:
        state.state2.code = _code_tables.setdefault(("nested", weight.device), state.state2.code)
    return QuantizedWeight(data, quant_state=state)


_code_tables: dict[tuple[str, torch.device], torch.Tensor] = {}


def make_layer(
    layer: nn.Module,
    weight: QuantizedWeight | torch.Tensor,
    bias: nn.Parameter | None,
    shape: tuple[int, ...],
    config: BnbQuantizationConfig,
) -> nn.Module:
    """Make the bitsandbytes layer that takes the place of a plain one, around a weight without copying it.

    Args:
        layer: the nn.Linear or Conv1D; its mode, hooks and extra attributes go over to the new one. Not changed.
        weight: quantized, or the 16-bit main weight of int8-training, (out_features, in_features).
        bias: (out_features,), or None.
        shape: (out_features, in_features).
        config: how it was quantized.
    """
    make = _make_int8 if config.load_in_8bit else _make_4bit
    new = make(layer, weight, bias is not None, shape, config)
    new._parameters["bias"] = bias
    if weight.data.device.type == "cpu":
        _adapt_to_cpu(new, shape, config)
    _inherit(new, layer)
    return new


def _make_4bit(
    layer: nn.Module, weight: Any, has_bias: bool, shape: tuple[int, ...], config: BnbQuantizationConfig
) -> nn.Module:
    classes = library().nn
    options = {
        "compress_statistics": config.bnb_4bit_use_double_quant,
        "quant_type": config.bnb_4bit_quant_type,
        "quant_storage": config.bnb_4bit_quant_storage,
    }
    compute_dtype = config.bnb_4bit_compute_dtype
    new: nn.Module = classes.Linear4bit(shape[1], shape[0], has_bias, compute_dtype, device="meta", **options)
    new.weight = classes.Params4bit(
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
    classes = library().nn
    trains = config.llm_int8_has_fp16_weight
    new: nn.Module = classes.Linear8bitLt(
        shape[1],
        shape[0],
        has_bias,
        has_fp16_weights=trains,
        threshold=float(config.llm_int8_threshold),
        device="meta",
    )
    if trains:
        requires_grad = layer.get_parameter("weight").requires_grad
        new.weight = classes.Int8Params(weight, requires_grad=requires_grad, has_fp16_weights=True)
    else:
        # CB must be given: without it the first forward would quantize the int8 rows again.
        new.weight = classes.Int8Params(
            weight.data, requires_grad=False, has_fp16_weights=False, CB=weight.data, SCB=weight.row_scales
        )
    return new


def _inherit(new: nn.Module, old: nn.Module) -> None:
    """Carry over what is not the weight: train or eval mode, hooks, and attributes that the model set itself."""
    new.train(old.training)
    for name, value in old.__dict__.items():
        is_hooks = re.search("_hook(s|$)", name) and name in new.__dict__
        if is_hooks and new.__dict__[name]:
            new.__dict__[name] = OrderedDict([*new.__dict__[name].items(), *value.items()])
        elif is_hooks or name not in new.__dict__:
            # The very dict of hooks, so that the handles the caller holds still remove them.
            new.__dict__[name] = value


def _adapt_to_cpu(layer: Any, shape: tuple[int, ...], config: BnbQuantizationConfig) -> None:
    """Give a layer on the CPU a forward that is right for its shape, where bitsandbytes' own is not."""
    out_features, in_features = shape
    if config.load_in_4bit:
        whole_blocks = in_features % config.bnb_4bit_blocksize == 0
        if not whole_blocks or out_features % _PACKED_ROWS:
            layer.support_avx512bf16_for_cpu = False
        if not whole_blocks:
            _set_forward(layer, _forward_4bit)
        elif getattr(layer, "support_avx512bf16_for_cpu", False):
            _set_forward(layer, _forward_packed)
            layer.register_state_dict_pre_hook(_unpack_before_saving)
            layer._apply = functools.partial(_apply_unpacked, layer)
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
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state, dtype)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return functional.linear(x.to(dtype), weight, bias).to(x.dtype)


def dequantize_4bit(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """Dequantize a 4-bit weight of any shape.

    As one row of all its elements: then bitsandbytes' CPU kernel counts the blocks as they were quantized. An odd
    number of elements is padded to the whole byte it lies in, which stays within the last block.
    """
    absmax = state.absmax
    if state.nested:
        absmax = library().functional.dequantize_blockwise(absmax, state.state2) + state.offset
    packed = packed.view(torch.uint8).view(-1, 1)
    flat = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed, absmax, state.blocksize, state.quant_type, [1, 2 * packed.numel()], dtype
    )
    return flat.view(-1)[: state.shape.numel()].view(state.shape)  # type: ignore[no-any-return]


def _forward_int8(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Multiply by the dequantized rows. x: (..., in_features)."""
    if x.device.type != "cpu":
        return type(layer).forward(layer, x)  # type: ignore[no-any-return]
    scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
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
    """Let bitsandbytes pack the weight for its CPU kernel, so that the packing can be undone to the bit."""
    if layer.training or (torch.is_grad_enabled() and x.requires_grad):
        unpack_(layer)  # the packed kernel has no backward
    else:
        _remember_scales(layer.weight.quant_state)
    return type(layer).forward(layer, x)  # type: ignore[no-any-return]


_SCALES = ("absmax", "offset", "state2", "nested", "dtype")


def _remember_scales(state: Any) -> None:
    """Keep what packing rounds to bfloat16: 11% of the weight's bytes, 3% when double quantized."""
    if not getattr(state, "packing_format_for_cpu", False):
        state.unpacked = {name: getattr(state, name) for name in _SCALES}


def unpack_(layer: Any) -> None:
    """Undo the packing of a 4-bit layer that ran on the CPU, to the bit. A layer that is not packed stays as it is."""
    state = layer.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        scales = state.unpacked
        layer.weight.data, _ = library().functional._convert_weight_packed_for_cpu_inverse(layer.weight.data, state)
        for name, value in scales.items():
            setattr(state, name, value)


def _unpack_before_saving(layer: nn.Module, prefix: str, keep_vars: bool) -> None:
    unpack_(layer)


def _apply_unpacked(layer: Any, fn: Any, recurse: bool = True) -> Any:
    """Unpack before a move or a cast, which bitsandbytes' own would do with rounded scales or not at all."""
    unpack_(layer)
    return type(layer)._apply(layer, fn, recurse)
