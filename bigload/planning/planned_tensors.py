"""Chooses the format of each tensor of a model. Pure; touches no device."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from ..checkpoint.bitsandbytes import QuantizedTensor
from ..checkpoint.merged import MergedTensor
from ..checkpoint.scaled.tensor import ScaledTensor
from ..config import BnbQuantizationConfig
from ..errors import CheckpointError, ConfigError
from ..hardware.devices import CPU, Place
from ..hardware.interrupts import check_interrupt
from ..hardware.layout import TensorSpec
from ..io.tensors import LazyTensor, StoredTensor
from ..model import transformers_facts
from ..model.experts import Experts
from ..model.fp32_modules import fp32_rule
from ..model.quantizable import one_of
from ..model.quantizable_experts import weights_of
from ..model.tensors import ModelTensor
from ..model.view import ModelView, view_of
from ..quantization import formats
from ..quantization.expert_linears import most_scratch_bytes
from ..quantization.formats import Format, FourBit, Int8, Plain
from .sources import Source


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a tensor that one of several processes holds: a run of its flattened values.

    Attributes:
        rank: of the process.
        ranks: how many processes hold the tensor together.
        whole: the shape of the tensor in its format.
        padded: the shape of the largest share, which all are padded to: (rows, ...), or of a 4-bit weight (values,).
        begin: the first of its values in the whole.
        end: where they end; equal to `begin` if nothing is left for it.
        read_bytes: bytes of the checkpoint that the process reads for it.
    """

    rank: int
    ranks: int
    whole: tuple[int, ...]
    padded: tuple[int, ...]
    begin: int
    end: int
    read_bytes: int


@dataclass(frozen=True, eq=False, slots=True)
class PlannedTensor:
    """One tensor of the model: its sources, format and place.

    Attributes:
        tensor: the model's tensor.
        shape: the shape in the format; of a quantized Conv1D weight (out_features, in_features), of quantized experts
            (E, out_features, in_features).
        sources: the pieces that fill it; none for a real buffer that stays as it is.
        format: how it is stored in memory.
        device: the device that computes with it.
        home: where it is stored if it is offloaded, else None.
        is_transposed: whether the last two dimensions of `shape` are swapped in the model's tensor.
        share: which part of the tensor this is, where several processes load it together; `shape` and `sources` are
            those of the part. None for all of it.
    """

    tensor: ModelTensor
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    format: Format
    device: torch.device = CPU
    home: Place | None = None
    is_transposed: bool = False
    share: Share | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in its format, not rounded."""
        return self.rounded_bytes(1)

    @property
    def read_bytes(self) -> int:
        """Bytes that are read for it; for a share more than its sources have if it cannot be read alone."""
        if self.share is not None:
            return self.share.read_bytes
        return sum(source.tensor.nbytes for source in self.sources)

    def rounded_bytes(self, multiple: int) -> int:
        """Return its bytes with each part rounded up to a multiple."""
        if self.share is None:
            return formats.nbytes(self.format, self.shape, multiple)
        return sum(-(-part.nbytes // multiple) * multiple for part in self.parts.values())

    @property
    def parts(self) -> Mapping[str, TensorSpec]:
        """The tensors that it consists of in memory, by name."""
        if self.share is None:
            return self.format.parts(self.shape)
        held = self.format.parts(self.share.padded)
        # The scales of scales are few, and their blocks know no shares: each process has all of them.
        whole = self.format.parts(self.share.whole)
        return {name: whole[name] if name == "nested_absmax" else spec for name, spec in held.items()}

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor in its format, whatever part of it this is."""
        return self.shape if self.share is None else self.share.whole

    @property
    def stored_as_is(self) -> StoredTensor | None:
        """The checkpoint's tensor if it has exactly the bytes that this one needs, else None."""
        if len(self.sources) != 1 or not isinstance(self.format, Plain):
            return None
        (source,) = self.sources
        tensor = source.tensor
        if isinstance(tensor, (torch.Tensor, LazyTensor, QuantizedTensor)) or source.region or source.transposed:
            return None
        is_the_same = (tensor.dtype, tuple(tensor.shape)) == tuple(self.format.parts(self.shape)["weight"])
        return tensor if is_the_same else None

    def without_values(self) -> PlannedTensor:
        """Return it with the shapes and dtypes of tensors in memory, here and in its sources, but not the tensors."""
        sources = tuple(replace(source, tensor=_without_values(source.tensor)) for source in self.sources)
        value = _on_meta(self.tensor.value)
        return replace(self, tensor=replace(self.tensor, value=value), sources=sources)

    def on_cpu(self) -> PlannedTensor:
        """Return the tensor as the CPU computes with it: in float32, not quantized."""
        is_floating = not isinstance(self.format, Plain) or self.format.dtype.is_floating_point
        fmt = Plain(torch.float32) if is_floating else self.format
        sources = tuple(source.transpose() for source in self.sources) if self.is_transposed else self.sources
        return PlannedTensor(self.tensor, self.tensor.shape, sources, fmt, CPU)


def run_of(source: Source, shape: tuple[int, ...]) -> range | None:
    """Return which values of a flattened tensor of this shape a source has; None if they are no contiguous run."""
    if source.transposed:
        return None
    if not source.region:  # almost always
        return range(math.prod(shape))
    part = torch.empty(shape, device="meta")[source.region]
    begin = int(part.storage_offset())
    return range(begin, begin + part.numel()) if part.is_contiguous() else None


def _without_values(tensor: StoredTensor | torch.Tensor) -> StoredTensor | torch.Tensor:
    if isinstance(tensor, MergedTensor):
        parts = {name: _stored_without_values(part) for name, part in tensor.parts.items()}
        return replace(tensor, parts=parts, pieces=())
    if isinstance(tensor, QuantizedTensor):
        return replace(tensor, parts={name: _stored_without_values(part) for name, part in tensor.parts.items()})
    return _stored_without_values(tensor) if isinstance(tensor, StoredTensor) else _on_meta(tensor)


def _stored_without_values(tensor: StoredTensor) -> StoredTensor:
    if isinstance(tensor, LazyTensor):  # what loads it may hold it
        return replace(tensor, load=partial(torch.empty, tensor.shape, dtype=tensor.dtype, device="meta"))
    return tensor


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def formatted_tensors(
    model: nn.Module | ModelView,
    config: BnbQuantizationConfig,
    tensors: Sequence[ModelTensor],
    layers: Mapping[str, nn.Module],
    sources: Mapping[str, tuple[Source, ...]],
    class_dtypes: Mapping[str, torch.dtype] | None = None,
    device: torch.device = CPU,
    experts: Mapping[str, Experts] | None = None,
) -> list[PlannedTensor]:
    """Return every tensor of the model with its format.

    Args:
        model: its classes may require float32 for some modules.
        config: with every "auto" resolved.
        tensors: of the model.
        layers: the layers to quantize, by path.
        sources: by each tensor's first name.
        class_dtypes: the dtype in which the model's class builds each tensor, where known.
        device: the device of all tensors, until units are placed.
        experts: the fused experts to quantize, by the path of their module.

    Raises:
        CheckpointError: a weight that is stored quantized has another shape than the layer's.
        ConfigError: a weight cannot be stored in the format asked for.
    """
    asked = one_of(config.keep_in_fp32_modules).search if config.keep_in_fp32_modules else None
    by_class = fp32_rule(view_of(model).modules, config.load_dtype)
    weights = {f"{path}.weight".lstrip("."): layer for path, layer in layers.items()}
    of_experts = weights_of(experts or {})
    planned, plain = [], functools.cache(Plain)  # there may be tens of thousands, in few dtypes
    for tensor in tensors:
        check_interrupt()
        pieces = sources.get(tensor.name, ())
        layer = next((weights[name] for name in tensor.names if name in weights), None) if weights else None
        if tensor.name in of_experts:
            path, name = of_experts[tensor.name]
            planned.append(_of_experts(tensor, (experts or {})[path], name, pieces, config, device))
        elif layer is None:
            usual = (class_dtypes or {}).get(tensor.name, config.load_dtype)
            in_fp32 = any(map(by_class, tensor.names)) or (asked is not None and any(map(asked, tensor.names)))
            fmt = plain(_kept_dtype(tensor, pieces, torch.float32 if in_fp32 else usual))
            planned.append(PlannedTensor(tensor, tensor.shape, _turned_one_by_one(pieces), fmt, device))
        else:
            planned.append(_of_layer(tensor, layer, pieces, config, device))
    return planned


def _of_layer(
    tensor: ModelTensor,
    layer: nn.Module,
    pieces: tuple[Source, ...],
    config: BnbQuantizationConfig,
    device: torch.device,
) -> PlannedTensor:
    is_transposed = transformers_facts.is_conv1d(layer)
    shape = tensor.shape[::-1] if is_transposed else tensor.shape
    return _quantized(tensor, shape, pieces, config, device, is_transposed=is_transposed)


def _of_experts(
    tensor: ModelTensor,
    experts: Experts,
    name: str,
    pieces: tuple[Source, ...],
    config: BnbQuantizationConfig,
    device: torch.device,
) -> PlannedTensor:
    shape = experts.packed_shape(name)
    return _quantized(tensor, shape, pieces, config, device, is_transposed=experts.is_transposed)


def _quantized(
    tensor: ModelTensor,
    shape: tuple[int, ...],
    pieces: tuple[Source, ...],
    config: BnbQuantizationConfig,
    device: torch.device,
    *,
    is_transposed: bool,
) -> PlannedTensor:
    """Plan a weight that is quantized, or stored so.

    Args:
        shape: of the weight when it is quantized.
        is_transposed: whether the weight is the tensor's transpose: each part of it is turned by itself.
    """
    stored = pieces[0].tensor
    if isinstance(stored, QuantizedTensor):
        _require_shape(stored, shape)
        return PlannedTensor(tensor, shape, pieces, stored.format, device)
    fmt = quantized_format(config)
    _require_divisible(fmt, shape, tensor.name)
    if is_transposed:  # what is stored turned needs no more
        parts = (part for source in pieces for part in ([source] if source.transposed else _by_expert(source)))
        pieces = tuple(part.transpose() for part in parts)
    return PlannedTensor(tensor, shape, _turned_one_by_one(pieces), fmt, device, is_transposed=is_transposed)


def _turned_one_by_one(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    """Divide weights with scales that are turned, so that nothing larger than an expert is turned at once."""
    if not any(source.transposed and isinstance(source.tensor, ScaledTensor) for source in sources):
        return sources
    return tuple(part for source in sources for part in (_by_expert(source) if source.transposed else [source]))


def _by_expert(source: Source) -> list[Source]:
    """Return a source for each expert of a whole 3-D tensor, so that they can be turned one by one.

    What is computed when it is read stays one source, and what fills a part of the parameter.
    """
    tensor = source.tensor
    is_whole = isinstance(tensor, (LazyTensor, QuantizedTensor)) and not isinstance(tensor, ScaledTensor)
    if source.region or is_whole or len(tensor.shape) < 3 or not tensor.shape[0]:
        return [source]
    rows, columns = tensor.shape[:0:-1] if source.transposed else tensor.shape[1:]
    region = (slice(0, rows), slice(0, columns))
    if isinstance(tensor, torch.Tensor):
        pieces: list[StoredTensor | torch.Tensor] = list(tensor.detach())
    elif isinstance(tensor, ScaledTensor):
        pieces = list(tensor.experts())
    else:
        nbytes = tensor.nbytes // tensor.shape[0]
        pieces = [
            replace(tensor, shape=tuple(tensor.shape[1:]), offset=tensor.offset + expert * nbytes, nbytes=nbytes)
            for expert in range(tensor.shape[0])
        ]
    return [Source(piece, (expert, *region), source.transposed) for expert, piece in enumerate(pieces)]


def _kept_dtype(tensor: ModelTensor, sources: Sequence[Source], usual: torch.dtype) -> torch.dtype:
    if not tensor.persistent and sources:
        return sources[0].tensor.dtype  # rebuilt by its class, in the dtype of its choice
    if not tensor.value.is_floating_point() or not sources:
        return tensor.value.dtype  # integers, and buffers that the checkpoint does not hold
    return usual


def quantized_format(config: BnbQuantizationConfig) -> Format:
    """Return the format of a layer's weight under a resolved config."""
    if config.mode == "int8-training":
        return Plain(config.load_dtype if config.load_dtype.itemsize == 2 else torch.float16)
    if config.load_in_8bit:
        return Int8()
    assert isinstance(config.bnb_4bit_quant_storage, torch.dtype)
    return FourBit(
        config.bnb_4bit_quant_type,
        config.bnb_4bit_blocksize,
        config.bnb_4bit_use_double_quant,
        config.bnb_4bit_quant_storage,
    )


def _require_shape(stored: QuantizedTensor, shape: tuple[int, ...]) -> None:
    if stored.shape != shape:
        raise CheckpointError(
            f"'{stored.name}' has shape {stored.shape} in '{stored.file.name}', the model expects {shape}: build the "
            "model from this checkpoint's config",
            mismatched_shapes={stored.name: (stored.shape, shape)},
        )


def _require_divisible(fmt: Format, shape: tuple[int, ...], name: str) -> None:
    try:
        fmt.parts(shape)
    except ValueError as error:
        raise ConfigError(
            f"'{name}' of shape {shape} cannot be stored as asked: {error}; use bnb_4bit_quant_storage='uint8' or add "
            f"'{name.removesuffix('.weight')}' to skip_modules"
        ) from error


def dequantized_bytes(tensors: Sequence[PlannedTensor], config: BnbQuantizationConfig) -> int:
    """Return the bytes of what is dequantized at once at most: a 4-bit layer, or some of a module's experts."""
    shapes = [planned.shape for planned in tensors if isinstance(planned.format, FourBit)]
    dtype = compute_dtype_of(config)
    layers = max((math.prod(shape) for shape in shapes if len(shape) != 3), default=0)
    experts = [shape for shape in shapes if len(shape) == 3]
    return max(layers * dtype.itemsize, most_scratch_bytes(experts, dtype))


# A number that is computed on a GPU takes as much of torch's allocator.
_LEAST_BYTES = 512


def scratch_bytes(tensors: Sequence[PlannedTensor], config: BnbQuantizationConfig) -> int:
    """Return the memory that a GPU needs at most, during the load, to compute values from scales."""
    pairs = [(p, s.tensor) for p in tensors for s in p.sources if isinstance(s.tensor, ScaledTensor)]
    # All scales may come before their weights, and of each weight's the largest is kept to the end.
    scales = sum(stored.scales.nbytes + _LEAST_BYTES for _, stored in pairs)
    return scales + max((_scratch_bytes(planned, stored, config) for planned, stored in pairs), default=0)


def _scratch_bytes(planned: PlannedTensor, stored: ScaledTensor, config: BnbQuantizationConfig) -> int:
    dtype = planned.format.dtype if isinstance(planned.format, Plain) else config.load_dtype
    # int8 is made of values in float16.
    cast = torch.float16.itemsize if isinstance(planned.format, Int8) and dtype != torch.float16 else 0
    # What is quantized reads all its experts like one, where they follow each other.
    of = stored.shape if isinstance(planned.format, Plain) else planned.shape
    return stored.scratch_bytes(dtype.itemsize + cast, math.prod(of))


def compute_dtype_of(config: BnbQuantizationConfig) -> torch.dtype:
    """Return the dtype that 4-bit layers and experts compute in."""
    computed = config.bnb_4bit_compute_dtype
    return computed if isinstance(computed, torch.dtype) else config.load_dtype
