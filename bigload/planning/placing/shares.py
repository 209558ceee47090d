"""Divides the tensors of a model among several processes: each reads, quantizes and holds its share of each tensor.

FSDP2 cuts a parameter into equal runs of rows, the last ones shorter. So are the shares of what is not quantized and of
int8 weights. A 4-bit weight is cut between its blocks, which may begin anywhere in a row: whatever its shape, each
process quantizes whole blocks, to the same bits as the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from ...checkpoint.bitsandbytes import QuantizedTensor
from ...checkpoint.merged import MergedTensor
from ...checkpoint.scaled.tensor import ScaledTensor, scaled_tensor
from ...hardware.layout import Shape
from ...io.tensors import LazyTensor, StoredTensor, read_whole
from ...quantization.formats import FourBit
from ..planned_tensors import PlannedTensor, Share, run_of
from ..sources import Source

_T = TypeVar("_T", bound=StoredTensor | torch.Tensor)


def shared_among(tensors: Sequence[PlannedTensor], rank: int, ranks: int) -> list[PlannedTensor]:
    """Return the tensors as one of several processes loads them: its share of each.

    Buffers, and parameters without dimensions, are not divided.

    Args:
        tensors: whole ones.
        rank: of the process, from 0.
        ranks: how many there are.
    """
    return [_share(planned, rank, ranks) for planned in tensors]


def _share(planned: PlannedTensor, rank: int, ranks: int) -> PlannedTensor:
    whole = planned.shape
    if not planned.tensor.is_parameter or not whole or not planned.sources:
        return planned
    numel = math.prod(whole)
    if isinstance(planned.format, FourBit):
        each, unit = -(-numel // planned.format.blocksize), planned.format.blocksize
    else:
        each, unit = whole[0], numel // max(1, whole[0])
    each = -(-each // ranks) * unit  # values of the largest share
    begin, end = min(rank * each, numel), min((rank + 1) * each, numel)
    count = end - begin

    def shaped(values: int) -> tuple[int, ...]:
        return (values,) if isinstance(planned.format, FourBit) else (values // max(1, unit), *whole[1:])

    is_stored_so = isinstance(planned.sources[0].tensor, QuantizedTensor)  # with scales of scales, that all need
    sources, read = _cut(planned, begin, end, shaped(count)) if count or is_stored_so else ((), 0)
    share = Share(rank, ranks, whole, shaped(each), begin, end, read)
    # What is stored as floats, for other tools, is cut between bytes: a share is held as bytes.
    fmt = replace(planned.format, quant_storage=torch.uint8) if isinstance(planned.format, FourBit) else planned.format
    return replace(planned, shape=shaped(count), sources=sources, format=fmt, is_transposed=False, share=share)


def _cut(planned: PlannedTensor, begin: int, end: int, shape: tuple[int, ...]) -> tuple[tuple[Source, ...], int]:
    """Return the sources of a run of a tensor's values, and the bytes that are read for it."""
    first = planned.sources[0].tensor
    if isinstance(first, QuantizedTensor):
        cut = _quantized_run(first, begin, end, shape)
        return (Source(cut),), first.nbytes if isinstance(first, MergedTensor) else cut.nbytes
    found, read = [], 0
    for source in planned.sources:
        places = run_of(source, planned.shape)
        if places is None or (isinstance(source.tensor, ScaledTensor) and not _has_rows(source.tensor)):
            return _assembled(planned, begin, end, shape)
        run = places.start
        low, high = max(begin, run), min(end, places.stop)
        if low >= high:
            continue
        row = math.prod(shape[1:])
        if (low - begin) % row or (high - low) % row:
            return _assembled(planned, begin, end, shape)
        region = (slice((low - begin) // row, (high - begin) // row),) if (low, high) != (begin, end) else ()
        own = ((high - low) // row, *shape[1:])
        tensor = source.tensor
        if isinstance(tensor, ScaledTensor):
            rows, at = _rows_around(tensor, low - run, high - run)
            made: StoredTensor | torch.Tensor = _run(_values_of(rows), low - run - at, high - run - at, own)
            read += rows.nbytes
        else:
            made = _run(tensor, low - run, high - run, own)
            read += made.nbytes
        found.append(Source(made, region))
    return tuple(found), read


def _run(tensor: _T, begin: int, end: int, shape: Shape) -> _T:
    """Return some of a tensor's values, in the order in which they are stored."""
    if isinstance(tensor, torch.Tensor):
        return _values_of_run(tensor.detach, begin, end, shape)  # type: ignore[return-value]
    nbytes, offset = (end - begin) * tensor.dtype.itemsize, tensor.offset
    if isinstance(tensor, LazyTensor):  # its offset is its rank in the file
        return replace(tensor, shape=shape, nbytes=nbytes, load=partial(_values_of_run, tensor.load, begin, end, shape))
    return replace(tensor, shape=shape, nbytes=nbytes, offset=offset + begin * tensor.dtype.itemsize)


def _has_rows(tensor: ScaledTensor) -> bool:
    """Whether some rows of a weight with scales can be read alone."""
    return (len(tensor.shape) == 2 or tensor.block[0] == 1) and all(
        type(part) is StoredTensor for part in (tensor.numbers, tensor.scales)
    )


def _rows_around(tensor: ScaledTensor, begin: int, end: int) -> tuple[ScaledTensor, int]:
    """Return the rows of a weight that a run of its values is in, whole blocks of them, and where the first begins."""
    *outer, columns = tensor.shape
    count, height = math.prod(outer), tensor.block[0]
    first, last = begin // columns, -(-end // columns)
    scales = tensor.scales
    if height >= count:  # all rows have the same scales
        height = last - first
    else:
        first, last = first // height * height, min(-(-last // height) * height, count)
        scales = _part(scales, first // height, -(-last // height), -(-count // height))
    numbers = _part(tensor.numbers, first, last, count)
    shape, block = (last - first, columns), (height, tensor.block[1])
    return scaled_tensor(tensor.name, tensor.kind, numbers, scales, shape, block, rank=tensor.rank), first * columns


def _part(tensor: StoredTensor, begin: int, end: int, count: int) -> StoredTensor:
    """Return some of a stored tensor's `count` equal parts."""
    each = tensor.nbytes // count
    nbytes = (end - begin) * each
    return replace(tensor, shape=(nbytes // tensor.dtype.itemsize,), offset=tensor.offset + begin * each, nbytes=nbytes)


def _values_of(tensor: ScaledTensor) -> LazyTensor:
    """Return a weight with scales as a tensor of its values in float32."""
    nbytes = math.prod(tensor.shape) * 4
    return LazyTensor(tensor.name, tensor.file, torch.float32, tensor.shape, tensor.offset, nbytes, tensor.load)


def _values_of_run(load: Callable[[], torch.Tensor], begin: int, end: int, shape: Shape) -> torch.Tensor:
    return load().reshape(-1)[begin:end].view(shape)


def _assembled(planned: PlannedTensor, begin: int, end: int, shape: Shape) -> tuple[tuple[Source, ...], int]:
    """Return a source that puts the whole tensor together in host memory, or the experts that it needs, and cuts it.

    So come weights that are stored transposed or cut into columns.
    """
    whole, sources = planned.shape, planned.sources
    if len(whole) == 3 and all(source.region and isinstance(source.region[0], int) for source in sources):
        each = math.prod(whole[1:])
        first, last = begin // each, -(-end // each)
        sources = tuple(
            replace(source, region=(source.region[0] - first, *source.region[1:]))  # type: ignore[operator]
            for source in sources
            if first <= source.region[0] < last  # type: ignore[operator]
        )
        whole, begin, end = (last - first, *whole[1:]), begin - first * each, end - first * each
    dtype = torch.float32 if isinstance(sources[0].tensor, ScaledTensor) else sources[0].tensor.dtype

    def load() -> torch.Tensor:
        values = torch.empty(whole, dtype=dtype)
        for source in sources:
            target = values[source.region] if source.region else values
            target = target.mT if source.transposed else target
            read = source.tensor.detach() if isinstance(source.tensor, torch.Tensor) else read_whole(source.tensor)
            target.copy_(read.view(target.shape))
        return values.reshape(-1)[begin:end].view(shape)

    stored = sources[0].tensor
    name, file = (stored.name, stored.file) if isinstance(stored, StoredTensor) else (planned.tensor.name, Path())
    offset = stored.offset if isinstance(stored, StoredTensor) else 0
    tensor = LazyTensor(name, file, dtype, shape, offset, (end - begin) * dtype.itemsize, load)
    return (Source(tensor),), sum(source.tensor.nbytes for source in sources)


def _quantized_run(stored: QuantizedTensor, begin: int, end: int, shape: Shape) -> QuantizedTensor:
    """Return the parts of a run of a weight that is stored quantized."""
    parts, fmt = dict(stored.parts), stored.format
    if isinstance(fmt, FourBit):
        fmt = replace(fmt, quant_storage=torch.uint8)
        specs = fmt.parts(shape)
        parts["weight"] = _run(_as_bytes(parts["weight"]), begin // 2, (end + 1) // 2, specs["weight"].shape)
        blocks = begin // fmt.blocksize, -(-end // fmt.blocksize)
        parts["absmax"] = _run(parts["absmax"], *blocks, specs["absmax"].shape)
    else:
        parts["weight"] = _run(parts["weight"], begin, end, shape)
        parts["SCB"] = _run(parts["SCB"], begin // shape[1], end // shape[1], shape[:1])
    nbytes = sum(part.nbytes for part in parts.values())
    return QuantizedTensor(
        stored.name, stored.file, stored.dtype, shape, stored.offset, nbytes, fmt, parts, stored.nested_offset
    )


def _as_bytes(tensor: StoredTensor) -> StoredTensor:
    if tensor.dtype == torch.uint8:
        return tensor
    if isinstance(tensor, LazyTensor):
        load = partial(_bytes_of, tensor.load)
        return replace(tensor, dtype=torch.uint8, shape=(tensor.nbytes,), load=load)
    return replace(tensor, dtype=torch.uint8, shape=(tensor.nbytes,))


def _bytes_of(load: Callable[[], torch.Tensor]) -> torch.Tensor:
    return load().contiguous().view(-1).view(torch.uint8)
