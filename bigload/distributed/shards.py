"""Quantized weights under FSDP2, by its own hooks for tensors: what a process holds, and what a forward computes with.

fully_shard cuts the first dimension of a parameter into one chunk for each process. A quantized weight is several
tensors, packed values and scales. `QuantizedShard` is the chunk of both: it claims to be one row of bytes of a matrix
with a row for each process, so that all are of one size. `fsdp_pre_all_gather` gives FSDP the two tensors; it gathers
both as bytes, beside the other weights of the block, and `fsdp_post_all_gather` makes of them the parameter that
bitsandbytes computes with. That lies in FSDP's own memory, which is freed after the forward and filled again.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..errors import QuantizationError
from ..quantization.bnb import library
from ..quantization.formats import FourBit, Int8

_A = torch.ops.aten
# What a shard claims that its bytes are, for fully_shard. Until torch 2.12 that makes a parameter first and forbids its
# gradients afterwards, which needs a floating dtype.
_CLAIMED = torch.uint8 if torch.__version__ >= "2.12" else torch.float8_e4m3fn  # compared as versions
# They leave what a shard holds as it is, whatever row of bytes it claims to be afterwards.
_ALIASES = {_A.detach.default, _A.alias.default, _A.view.default, _A.slice.Tensor, _A.as_strided.default}
# They make the same of both tensors: copies on this device or another one.
_COPIES = {_A.clone.default, _A._to_copy.default, _A._pin_memory.default}


@dataclass(frozen=True, eq=False)
class Whole:
    """What is known of a quantized weight beside its packed values and the scales of its blocks.

    Attributes:
        name: of the weight in the model.
        fmt: its format.
        shape: of the weight, (out_features, in_features), or of fused experts (E, out_features, in_features).
        quant_state: of a 4-bit weight, its QuantState, whose absmax is on meta.
        storage: the dtype that the gathered packed bytes of a 4-bit weight are shown as.
    """

    name: str
    fmt: FourBit | Int8
    shape: tuple[int, ...]
    quant_state: Any = None
    storage: torch.dtype = torch.uint8

    def parameter(self, packed: torch.Tensor, scales: torch.Tensor) -> Any:
        """Return the parameter that bitsandbytes computes with; it shares memory with what it is made of.

        Args:
            packed: the packed values of all processes, flat.
            scales: of all processes, flat.
        """
        numel = math.prod(self.shape)
        if isinstance(self.fmt, Int8):
            rows = packed[:numel].view(self.shape)
            return _classes()[1](rows, requires_grad=False, CB=rows, SCB=scales[: self.shape[0]])
        state = copy.copy(self.quant_state)
        state.absmax = scales[: -(-numel // self.fmt.blocksize)]
        options = {
            "quant_state": state,
            "blocksize": self.fmt.blocksize,
            "compress_statistics": self.fmt.double_quant,
            "quant_type": self.fmt.quant_type,
            "quant_storage": self.storage,
            "bnb_quantized": True,
        }
        bytes_ = packed[: (numel + 1) // 2]
        return _classes()[0](bytes_.view(self.storage).view(-1, 1), requires_grad=False, **options)


class QuantizedShard(torch.Tensor):
    """The packed values and scales of a quantized weight that one process holds, padded to the size of the others'.

    A wrapper: DTensor runs operators below __torch_function__, where a plain subclass would lose its type.

    Attributes:
        packed: flat; uint8, or int8 rows.
        scales: flat, of its blocks or rows.
        whole: what is known of the weight.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    whole: Whole

    @staticmethod
    def __new__(
        cls, packed: torch.Tensor, scales: torch.Tensor, whole: Whole, shape: Sequence[int] | None = None
    ) -> QuantizedShard:
        """Put the two tensors together; neither is copied. `shape` is what it claims, by default one row of bytes."""
        claimed = (1, packed.nbytes + scales.nbytes) if shape is None else tuple(shape)
        made: QuantizedShard = torch.Tensor._make_wrapper_subclass(
            cls, claimed, dtype=_CLAIMED, device=packed.device, requires_grad=False
        )
        made.packed, made.scales, made.whole = packed, scales, whole
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing more: torch.Tensor's own takes no such arguments."""

    def __repr__(self) -> str:  # type: ignore[override]
        return f"QuantizedShard({self.whole.name}: {self.packed.nbytes + self.scales.nbytes} bytes on {self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        me, kwargs = args[0], kwargs or {}
        if func in _ALIASES and isinstance(me, cls):
            claimed = torch.empty(me.shape, dtype=_CLAIMED, device="meta")
            return cls(me.packed, me.scales, me.whole, func(claimed, *args[1:], **kwargs).shape)
        if func in _COPIES and isinstance(me, cls) and kwargs.get("dtype") in (None, _CLAIMED):
            kwargs = {name: value for name, value in kwargs.items() if name != "dtype"}
            return cls(func(me.packed, **kwargs), func(me.scales, **kwargs), me.whole, me.shape)
        if func is _A.is_pinned.default:
            return me.packed.is_pinned() and me.scales.is_pinned()
        if func is _A.copy_.default and isinstance(me, cls) and isinstance(args[1], cls):
            if me.packed is not args[1].packed:
                me.packed.copy_(args[1].packed)
                me.scales.copy_(args[1].scales)
            return me
        found = next(each for each in tree_leaves((args, kwargs)) if isinstance(each, cls))
        raise QuantizationError(
            f"'{found.whole.name}' is quantized, and this process holds a part of it, of which {func} means nothing: "
            "leave it to forwards; save the model by save_quantized_model, and adapters by get_model_state_dict with "
            "StateDictOptions(full_state_dict=True, ignore_frozen_params=True)"
        )

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: tuple[int, ...], module: nn.Module, mp_policy: Any
    ) -> tuple[tuple[torch.Tensor, ...], Any]:
        """Give FSDP what it gathers, and what `fsdp_post_all_gather` gets."""
        if mesh.size() > 1:
            return (self.packed, self.scales), (self.whole, 0)
        # Of a process by itself FSDP takes the first tensor alone.
        scales, packed = self.scales.view(torch.uint8), self.packed.view(torch.uint8)
        first = _aligned(scales.numel())
        both = packed.new_zeros(first + packed.numel())
        both[: scales.numel()] = scales
        both[first:] = packed
        return (both,), (self.whole, first)

    def fsdp_post_all_gather(
        self,
        outputs: tuple[torch.Tensor, ...],
        metadata: tuple[Whole, int],
        param_dtype: torch.dtype,
        *,
        out: torch.Tensor | None = None,
    ) -> Any:
        """Make the parameter of what FSDP has gathered; later it gathers into the same memory, and nothing is left."""
        whole, first = metadata
        if out is None:
            if len(outputs) == 1:
                both = outputs[0].view(-1)
                packed = both[first:].view(self.packed.dtype)
                scales = both[: self.scales.nbytes].view(self.scales.dtype)
                return whole.parameter(packed, scales), ()
            packed, scales = outputs
            return whole.parameter(packed.view(-1), scales.view(-1)), ()
        if out.untyped_storage().data_ptr() != outputs[0].untyped_storage().data_ptr():
            raise QuantizationError(
                f"'{whole.name}': this version of torch gathers into other memory each time, which bigload does not "
                "know of: use another one"
            )
        return None


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 16) * 16


class Part(torch.Tensor):
    """A parameter of which only this process's share is here: it claims the whole's shape, for fully_shard alone.

    fully_shard takes its chunk from it and drops it. So the whole never exists.

    Attributes:
        own: the share, padded to the largest: rows of a weight that is not quantized, or a `QuantizedShard`.
        rows: how many of its rows are its own.
        rank: whose share it is.
    """

    own: torch.Tensor
    rows: int
    rank: int

    @staticmethod
    def __new__(
        cls, own: torch.Tensor, shape: Sequence[int], rank: int, rows: int, dtype: torch.dtype | None = None
    ) -> Part:
        """Claim a shape, and by default the dtype of the share, or bytes; nothing is copied."""
        dtype = dtype or (torch.uint8 if isinstance(own, QuantizedShard) else own.dtype)
        made: Part = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=own.device, requires_grad=False
        )
        made.own, made.rank, made.rows = own, rank, rows
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing more: torch.Tensor's own takes no such arguments."""

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Part({self.rows} of {tuple(self.shape)}, on {self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        me = args[0]
        if func in (_A.detach.default, _A.alias.default):
            return cls(me.own, me.shape, me.rank, me.rows, me.dtype)
        if func is _A.split.Tensor:  # fully_shard's chunks: of the others only the shape is asked
            size, total = args[1], me.shape[0]
            sizes = [min(size, total - begin) for begin in range(0, total, size)]
            return [
                me.own[: me.rows]
                if number == me.rank
                else me.own.new_empty((rows, *me.shape[1:]), device="meta")
                if type(me.own) is torch.Tensor
                else torch.empty((rows, *me.shape[1:]), dtype=me.dtype, device="meta")
                for number, rows in enumerate(sizes)
            ]
        if func is _A.new_zeros.default and tuple(args[1]) == tuple(me.own.shape):
            return me.own  # fully_shard copies the chunk there, where it is already
        if func is _A.copy_.default and type(me.own) is torch.Tensor and args[1].shape == me.shape:
            first = min(me.rank * len(me.own), me.shape[0])  # as a state_dict is loaded
            me.own[: me.rows].copy_(args[1][first : first + me.rows])
            return me
        raise QuantizationError(
            f"{func} of a weight of which this process holds {me.rows} of {me.shape[0]} rows: adapters can be added to "
            "such a model, but not by what reads or casts its weights (DoRA, PiSSA, LoftQ, "
            "prepare_model_for_kbit_training): pass torch_dtype and keep_in_fp32_modules in the config instead"
        )

    def as_claimed(self) -> Any:
        """Return the parameter that fully_shard is given: adapters must not take over what bytes claim to be there."""
        return nn.Parameter(Part(self.own, self.shape, self.rank, self.rows, self.own.dtype), requires_grad=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return a parameter like this one with a copy of the share, as for PEFT's `modules_to_save`."""
        return nn.Parameter(Part(self.own.clone(), self.shape, self.rank, self.rows), requires_grad=self.requires_grad)


class NotHere:
    """Stands for the scales of a quantized weight, for those who would dequantize it."""

    def __init__(self, name: str) -> None:
        """Stand for those of the weight of this name."""
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):
            raise AttributeError(attribute)
        raise not_merged(self._name)


def not_merged(name: str) -> QuantizationError:
    """Return the error for a weight of this name that something would dequantize or exchange."""
    return QuantizationError(
        f"'{name}' is quantized and divided among processes, and whole in forwards alone: adapters cannot be merged "
        "into it; load the model and its adapter by one process for that, or with replicate=True"
    )


def is_divided(parameter: Any) -> bool:
    """Whether a parameter is a quantized weight that processes hold in parts, or has been gathered of them."""
    return isinstance(shard_of(parameter), QuantizedShard) or isinstance(parameter, _classes())


def _share_memory_with_fsdp(base: Any) -> Callable[..., Any]:
    """Return a __torch_function__ that keeps what the base class holds beside its values through FSDP's handling."""

    def handled(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.as_strided, torch.Tensor.as_strided):
            return args[0]  # FSDP asks for the shape that a shard claims
        own = getattr(base.__torch_function__, "__func__", None)  # Int8Params has none of its own
        given = (func, types, args, kwargs or {})
        made = own(cls, *given) if own else base.__torch_function__(*given)
        if func is torch.Tensor.detach:  # nn.Parameter asks for the same class
            made = torch.Tensor._make_subclass(cls, made, False)
            vars(made).update(vars(args[0]))
        return made

    return classmethod(handled)  # type: ignore[return-value]


@functools.cache
def _classes() -> tuple[Any, Any]:
    """Return subclasses of bitsandbytes' parameters, which others know by their names."""
    found = []
    for name in ("Params4bit", "Int8Params"):
        base = getattr(library().nn, name)
        body = {"__torch_function__": _share_memory_with_fsdp(base), "__module__": base.__module__}
        found.append(type(name, (base,), body))
    return found[0], found[1]


def shard_of(parameter: Any) -> torch.Tensor | None:
    """Return what this process holds of a parameter that FSDP2 manages, or will; None for any other."""
    return parameter.own if isinstance(parameter, Part) else getattr(parameter, "_local_tensor", None)


def held_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of memory behind a tensor, or behind what a process holds of it."""
    own = shard_of(tensor)
    own = tensor if own is None else own
    if isinstance(own, QuantizedShard):
        return own.packed.untyped_storage().nbytes() + own.scales.untyped_storage().nbytes()
    return own.untyped_storage().nbytes()
