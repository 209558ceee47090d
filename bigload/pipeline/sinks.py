"""Sinks: what takes the values of a tensor's sources and makes the tensor."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.bitsandbytes import QuantizedTensor
from ..checkpoint.scaled.tensor import ScaledTensor, follows_scaled, joined_scaled
from ..hardware.allocation import allocate
from ..io.program import ReadTask
from ..io.ring import slot_bytes
from ..io.tensors import LazyTensor, StoredTensor, follows, joined
from ..planning.planned_tensors import PlannedTensor, run_of
from ..planning.sources import Source
from ..quantization.formats import FourBit, Int8
from ..quantization.quantized_weight import QuantizedWeight
from ..quantization.quantizer import Quantizer, quantize


class Sink(ABC):
    """Makes one tensor. The values of each source come in order; the sources may come in any order."""

    @abstractmethod
    def tasks(self) -> list[ReadTask]:
        """Return the reads, one for each source."""

    @abstractmethod
    def finish(self) -> Any:
        """Return the tensor; called once, when all values have arrived."""


class CopySink(Sink):
    """Copies the values into a tensor."""

    def __init__(self, planned: PlannedTensor, values: torch.Tensor) -> None:
        """Fill `values`, which has the planned tensor's shape and its final dtype."""
        self._planned, self._values = planned, values

    def tasks(self) -> list[ReadTask]:
        return [copy_into(self._values, source) for source in self._planned.sources]

    def finish(self) -> torch.Tensor:
        return self._values


class StoredPartsSink(Sink):
    """Copies the parts of a weight that is stored quantized."""

    def __init__(self, stored: QuantizedTensor, parts: Mapping[str, torch.Tensor]) -> None:
        """Fill `parts`, which are named as in the format."""
        self._stored, self._parts = stored, parts

    def tasks(self) -> list[ReadTask]:
        return [copy_into(self._parts[name], Source(part)) for name, part in self._stored.parts.items()]

    def finish(self) -> QuantizedWeight:
        return stored_weight(self._stored, self._parts)


def stored_weight(stored: QuantizedTensor, parts: Mapping[str, torch.Tensor]) -> QuantizedWeight:
    """Return a weight that is stored quantized, from its parts in memory, which are named as in its format."""
    if "nested_absmax" in parts:  # double quantization, whose offset is stored as a number in JSON
        device = parts["weight"].device
        parts = {**parts, "nested_offset": torch.tensor(stored.nested_offset, dtype=torch.float32, device=device)}
    return QuantizedWeight.from_parts(stored.format, stored.shape, stored.dtype, parts)


class PieceSink(Sink):
    """Uses values piece by piece as they come.

    Each source must be a contiguous run of the flattened tensor; else `gathered_if_needed` gathers them first.

    Attributes:
        planned: the tensor.
        dtype: the dtype that pieces are cast to first.
        begins: where each source begins in the flattened tensor; None if a source is no run of it, or if the values of
            one scale do not fit into a slot of the ring.
    """

    def __init__(self, planned: PlannedTensor, dtype: torch.dtype, values_per_scale: int = 1) -> None:
        """Create it.

        Args:
            planned: the tensor.
            dtype: the dtype that pieces are cast to first.
            values_per_scale: pieces begin and end at multiples of this.
        """
        self.planned, self.dtype, self._values_per_scale = planned, dtype, values_per_scale
        self.begins = self._begins()

    @abstractmethod
    def take(self, values: torch.Tensor, begin: int) -> None:
        """Use a piece.

        Args:
            values: (n,), contiguous, on the tensor's device; their memory is reused afterwards.
            begin: the index of the first value in the flattened tensor.
        """

    def take_whole(self, values: torch.Tensor) -> Any:
        """Use all values at once, and return what `finish` returns."""
        self.take(values.view(-1), 0)
        return self.finish()

    def _begins(self) -> list[int] | None:
        shape, multiple, room = self.planned.shape, self._values_per_scale, slot_bytes()
        begins = [_begin_of_run(source, shape, multiple) for source in self.planned.sources]
        fits = all(multiple * source.tensor.dtype.itemsize <= room for source in self.planned.sources)
        return [begin for begin in begins if begin is not None] if fits and None not in begins else None

    def tasks(self) -> list[ReadTask]:
        stored = (stored_form(source.tensor, self.dtype) for source in self.planned.sources)
        runs = zip(self.begins or (), stored, strict=True)
        return [self._task(tensor, base) for base, tensor in _joined(list(runs))]

    def _task(self, tensor: StoredTensor, base: int) -> ReadTask:
        def take(piece: torch.Tensor, begin: int) -> None:
            # Even where it does nothing, `to` lets go of the interpreter's lock, which the thread that reads wants too.
            self.take(piece if piece.dtype == self.dtype else piece.to(self.dtype), base + begin)

        return ReadTask(tensor, self.planned.device, take, values_per_scale=self._values_per_scale)


class QuantizeSink(PieceSink):
    """Quantizes values as they come, into memory of the final size."""

    def __init__(self, planned: PlannedTensor, fmt: FourBit | Int8, dtype: torch.dtype) -> None:
        super().__init__(planned, dtype, fmt.values_per_scale(planned.shape))
        self._format, self._quantizer = fmt, Quantizer(planned.shape, fmt, dtype, planned.device)

    def take(self, values: torch.Tensor, begin: int) -> None:
        self._quantizer.add(values, begin)

    def take_whole(self, values: torch.Tensor) -> QuantizedWeight:
        return quantize(values, self._format)

    def finish(self) -> QuantizedWeight:
        return self._quantizer.finish()


class GatherSink(Sink):
    """Gathers all values of a tensor before another sink takes them; of experts, those of one expert after the other.

    Memory is allocated with the first piece and freed after use, so there is one such tensor, or expert, at a time
    where the file holds them in their order.
    """

    def __init__(self, sink: PieceSink) -> None:
        self._sink = sink
        planned = sink.planned
        self._is_by_expert = len(planned.shape) == 3 and all(
            source.region and isinstance(source.region[0], int) for source in planned.sources
        )
        self._shape = planned.shape[1:] if self._is_by_expert else planned.shape
        self._gathered: dict[int, torch.Tensor] = {}
        self._missing: dict[int, int] = {}

    def tasks(self) -> list[ReadTask]:
        tasks = []
        for source in self._sink.planned.sources:
            expert = 0
            if self._is_by_expert:
                expert, *region = source.region  # type: ignore[assignment]
                source = replace(source, region=tuple(region))
            self._missing[expert] = self._missing.get(expert, 0) + numel(source.tensor)
            tasks.append(self._task(expert, source))
        return tasks

    def _task(self, expert: int, source: Source) -> ReadTask:
        planned, copying = self._sink.planned, list[ReadTask]()

        def take(piece: torch.Tensor, begin: int) -> None:
            if expert not in self._gathered:
                self._gathered[expert] = allocate(self._shape, self._sink.dtype, planned.device)
            if not copying:
                copying.append(copy_into(self._gathered[expert], source))
            copying[0].take(piece, begin)
            if begin + len(piece) == numel(source.tensor):
                copying.clear()
            self._missing[expert] -= len(piece)
            if self._is_by_expert and not self._missing[expert]:
                values = self._gathered.pop(expert).view(-1)
                self._sink.take(values, expert * len(values))

        return ReadTask(stored_form(source.tensor, self._sink.dtype), planned.device, take)

    def finish(self) -> Any:
        return self._sink.finish() if self._is_by_expert else self._sink.take_whole(self._gathered.pop(0))


def gathered_if_needed(sink: PieceSink) -> Sink:
    """Return the sink itself if it can use the sources piece by piece, else one that gathers the tensor for it."""
    return sink if sink.begins is not None else GatherSink(sink)


def _begin_of_run(source: Source, shape: tuple[int, ...], multiple: int) -> int | None:
    """Return where a source begins in the flattened tensor, if its values are contiguous there and split no scale."""
    run = run_of(source, shape)
    if run is None or run.start % multiple:
        return None
    return run.start if len(run) % multiple == 0 or run.stop == math.prod(shape) else None


def _joined(runs: list[tuple[int, StoredTensor]]) -> list[tuple[int, StoredTensor]]:
    """Join runs that follow each other both in the tensor and in their file, as gate and up of an expert do."""
    if len(runs) == 1:  # almost always
        return runs
    groups: list[tuple[int, list[StoredTensor]]] = []
    end = -1
    for begin, tensor in sorted(runs, key=itemgetter(0)):
        if begin == end and _follows(groups[-1][1][-1], tensor):
            groups[-1][1].append(tensor)
        else:
            groups.append((begin, [tensor]))
        end = begin + numel(tensor)
    return [(begin, _as_one(parts)) for begin, parts in groups]


def _follows(last: StoredTensor, other: StoredTensor) -> bool:
    if isinstance(last, ScaledTensor) and isinstance(other, ScaledTensor):
        return follows_scaled(last, other)
    return follows(last, other)


def _as_one(parts: list[StoredTensor]) -> StoredTensor:
    if len(parts) == 1:
        return parts[0]
    scaled = [part for part in parts if isinstance(part, ScaledTensor)]
    return joined_scaled(scaled) if scaled else joined(parts)


def copy_into(values: torch.Tensor, source: Source) -> ReadTask:
    """Make the task that fills a source's region of a tensor."""
    target = values[source.region] if source.region else values
    target = target.mT if source.transposed else target
    if target.is_contiguous():
        flat = target.view(-1)

        def copy(piece: torch.Tensor, begin: int) -> None:
            (flat if piece.shape == flat.shape else flat[begin : begin + len(piece)]).copy_(piece)

        destination = flat if source.tensor.dtype == flat.dtype else None
        return ReadTask(stored_form(source.tensor, values.dtype), values.device, copy, destination)
    if target.dim() == 2:  # columns, or a transpose: row by row, so that no second copy of it is held
        fill = functools.partial(_fill_rows, target)
        return ReadTask(stored_form(source.tensor, values.dtype), values.device, fill)
    gathered: list[torch.Tensor] = []

    def gather(piece: torch.Tensor, begin: int) -> None:
        # Gathered in contiguous memory, then copied at once.
        if not gathered:
            gathered.append(torch.empty(target.shape, dtype=piece.dtype, device=piece.device))
        whole = gathered[0].view(-1)
        whole[begin : begin + len(piece)].copy_(piece)
        if begin + len(piece) == len(whole):
            target.copy_(gathered.pop())

    return ReadTask(stored_form(source.tensor, values.dtype), values.device, gather)


def _fill_rows(target: torch.Tensor, piece: torch.Tensor, begin: int) -> None:
    """Copy values into a matrix, beginning at an index of it as if it were flat: whole rows at once."""
    columns = target.shape[1]
    while len(piece):
        row, column = divmod(begin, columns)
        count = len(piece) // columns
        if column or not count:
            part = piece[: columns - column]
            target[row, column : column + len(part)].copy_(part)
        else:
            part = piece[: count * columns]
            target[row : row + count].copy_(part.view(count, columns))
        piece, begin = piece[len(part) :], begin + len(part)


def numel(tensor: StoredTensor | torch.Tensor) -> int:
    """Return the number of values of a source."""
    if isinstance(tensor, ScaledTensor):
        return math.prod(tensor.shape)
    return tensor.nbytes // tensor.dtype.itemsize


def stored_form(tensor: StoredTensor | torch.Tensor, dtype: torch.dtype) -> StoredTensor:
    """Describe a source as a stored tensor; a tensor in memory becomes a LazyTensor.

    Args:
        tensor: the source.
        dtype: the one that its values will be cast to: a weight with scales is computed in it.
    """
    if isinstance(tensor, ScaledTensor):
        return tensor.in_dtype(dtype)
    if isinstance(tensor, StoredTensor):
        return tensor
    return LazyTensor("", Path(), tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes, lambda: tensor)
