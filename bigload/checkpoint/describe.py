"""Describes a checkpoint in words, from its headers alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch

from ..errors import counted
from ..io.tensors import StoredTensor
from ..notation import show
from ..quantization.formats import FourBit, Int8
from .bitsandbytes import QuantizedTensor
from .checkpoint import Checkpoint, WeightsLocation, open_checkpoint
from .scaled.tensor import ScaledTensor
from .stored_config import config_of


def describe_checkpoint(weights_location: WeightsLocation) -> str:
    """Return a description: files, parameters and bytes, what is quantized and how, and what is not.

    Args:
        weights_location: as for `open_checkpoint`.

    Raises:
        CheckpointError: there is no checkpoint, or a file is damaged.
    """
    return "\n".join(_lines(open_checkpoint(weights_location)))


def _lines(checkpoint: Checkpoint) -> Iterator[str]:
    tensors = list(checkpoint.tensors.values())
    files = {tensor.file for tensor in tensors}
    kind = (
        "safetensors" if checkpoint.location.name.endswith((".safetensors", ".safetensors.index.json")) else "pickled"
    )
    yield str(checkpoint.location)
    yield f"  {counted(len(files), 'file')}, {kind}: {show(sum(t.nbytes for t in tensors))}"
    yield f"  {_numel(tensors):,} values in {counted(len(tensors), 'tensor')}"
    quantized = [tensor for tensor in tensors if isinstance(tensor, QuantizedTensor)]
    if quantized:
        config = config_of(checkpoint, None)
        yield f"  quantized: {_sizes(quantized)} as {_format(quantized[0].format)}"
        experts = [tensor for tensor in quantized if len(tensor.shape) == 3]
        if experts:
            yield f"  fused experts among them: {_sizes(experts)}"
        if isinstance(quantized[0].format, FourBit):
            computes = config.bnb_4bit_compute_dtype
            said = _name(computes) if isinstance(computes, torch.dtype) else "the dtype that it is loaded in"
            yield f"  computes in: {said}"
        else:
            yield f"  outliers computed in 16 bit: above {config.llm_int8_threshold:g}"
    scaled: defaultdict[str, list[StoredTensor]] = defaultdict(list)
    plain: defaultdict[torch.dtype, list[StoredTensor]] = defaultdict(list)
    for tensor in tensors:
        if isinstance(tensor, ScaledTensor):
            scaled[tensor.kind].append(tensor)
        elif not isinstance(tensor, QuantizedTensor):
            plain[tensor.dtype].append(tensor)
    yield from (f"  {kind}: {_sizes(alike)}" for kind, alike in scaled.items())
    for dtype, alike in sorted(plain.items(), key=lambda item: -sum(t.nbytes for t in item[1])):
        yield f"  {_name(dtype)}: {_sizes(alike)}"
    if checkpoint.record is not None:
        kept, ties = checkpoint.record.kept, checkpoint.record.ties
        yield f"  layers not quantized: {', '.join(kept) or 'none'}"
        yield from (f"  tied: {' = '.join(names)}" for names in ties)


def _numel(tensors: Iterable[StoredTensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


def _sizes(tensors: list[StoredTensor] | list[QuantizedTensor]) -> str:
    nbytes = sum(tensor.nbytes for tensor in tensors)
    return f"{counted(len(tensors), 'tensor')}, {_numel(tensors):,} values, {show(nbytes)}"


def _format(fmt: FourBit | Int8) -> str:
    if isinstance(fmt, Int8):
        return "int8, a scale for each row"
    scales = "their scales quantized again" if fmt.double_quant else "a float32 scale each"
    stored = "" if fmt.quant_storage == torch.uint8 else f", stored as {_name(fmt.quant_storage)}"
    return f"{fmt.quant_type}, blocks of {fmt.blocksize}, {scales}{stored}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
