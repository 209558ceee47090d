"""Where the values of a tensor's sources go, and what is made of them there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.bitsandbytes import QuantizedTensor
from ..hardware.allocation import allocate
from ..io.extents import ReadTask
from ..io.ring import slot_bytes
from ..io.tensors import LazyTensor, StoredTensor
from ..planning.planned_tensors import PlannedTensor
from ..planning.sources import Source
from ..quantization.formats import FourBit, Int8
from ..quantization.quantized_weight import QuantizedWeight
from ..quantization.quantizer import Quantizer, quantize


class Sink(ABC):
    """Takes what one tensor is made of: the values of each source in order, several sources in any."""

    @abstractmethod
    def tasks(self) -> list[ReadTask]:
        """List what is to be read: one delivery for each source."""

    @abstractmethod
    def finish(self) -> Any:
        """Return what was made, when all values have arrived; called once."""


class CopySink(Sink):
    """Fills a tensor's memory with its values as they are."""

    def __init__(self, planned: PlannedTensor, values: torch.Tensor) -> None:
        """Fill `values`, of the planned tensor's shape, in the dtype that it shall have."""
        self._planned, self._values = planned, values

    def tasks(self) -> list[ReadTask]:
        return [copy_into(self._values, source) for source in self._planned.sources]

    def finish(self) -> torch.Tensor:
        return self._values


class StoredPartsSink(Sink):
    """Fills the parts of a weight that is stored quantized."""

    def __init__(self, stored: QuantizedTensor, parts: Mapping[str, torch.Tensor]) -> None:
        """Fill `parts`, by their names in the format."""
        self._stored, self._parts = stored, dict(parts)

    def tasks(self) -> list[ReadTask]:
        return [copy_into(self._parts[name], Source(part)) for name, part in self._stored.parts.items()]

    def finish(self) -> QuantizedWeight:
        stored = self._stored
        if "nested_absmax" in self._parts:  # of which one part is a number in the description of the others
            device = self._parts["weight"].device
            self._parts["nested_offset"] = torch.tensor(stored.nested_offset, dtype=torch.float32, device=device)
        return QuantizedWeight.from_parts(stored.format, stored.shape, stored.dtype, self._parts)


class PieceSink(Sink):
    """Uses values piece by piece as they come: for sources that are runs of the flattened tensor.

    Others must be gathered first, see `gathered_if_needed`.
    """

    def __init__(self, planned: PlannedTensor, dtype: torch.dtype, values_per_scale: int = 1) -> None:
        """Describe the tensor.

        Args:
            planned: the tensor.
            dtype: what pieces are cast to first.
            values_per_scale: values that must stay together in one piece.
        """
        self.planned, self.dtype, self._values_per_scale = planned, dtype, values_per_scale

    @abstractmethod
    def take(self, values: torch.Tensor, begin: int) -> None:
        """Use a piece.

        Args:
            values: (n,), contiguous, on the tensor's device; not kept.
            begin: the index of the first of them in the flattened tensor.
        """

    def take_whole(self, values: torch.Tensor) -> Any:
        """Use all values at once, and give what `finish` gives."""
        self.take(values.view(-1), 0)
        return self.finish()

    def begins(self) -> list[int] | None:
        """Return where each source begins in the flattened tensor; None if one is no run, or a piece is too long."""
        shape, together = self.planned.shape, self._values_per_scale
        begins = [_begin_of_run(source, shape, together) for source in self.planned.sources]
        fits = all(together * source.tensor.dtype.itemsize <= slot_bytes() for source in self.planned.sources)
        return [begin for begin in begins if begin is not None] if fits and None not in begins else None

    def tasks(self) -> list[ReadTask]:
        return [
            self._task(source, base) for source, base in zip(self.planned.sources, self.begins() or (), strict=True)
        ]

    def _task(self, source: Source, base: int) -> ReadTask:
        def take(piece: torch.Tensor, begin: int) -> None:
            self.take(piece.to(self.dtype), base + begin)

        return ReadTask(stored_form(source.tensor), self.planned.device, take, values_per_scale=self._values_per_scale)


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
    """Puts a tensor together before another sink takes it, since its sources are not runs of it, or too long.

    Memory for it is taken when the first piece is there and let go of when it was used: one such tensor at a time.
    """

    def __init__(self, sink: PieceSink) -> None:
        self._sink = sink
        self._whole: list[torch.Tensor] = []

    def tasks(self) -> list[ReadTask]:
        return [self._task(source) for source in self._sink.planned.sources]

    def _task(self, source: Source) -> ReadTask:
        planned, filling = self._sink.planned, list[ReadTask]()

        def take(piece: torch.Tensor, begin: int) -> None:
            if not self._whole:
                self._whole.append(allocate(planned.shape, self._sink.dtype, planned.device))
            if not filling:
                filling.append(copy_into(self._whole[0], source))
            filling[0].take(piece, begin)
            if begin + len(piece) == numel(source.tensor):
                filling.clear()

        return ReadTask(stored_form(source.tensor), planned.device, take)

    def finish(self) -> Any:
        return self._sink.take_whole(self._whole.pop())


def gathered_if_needed(sink: PieceSink) -> Sink:
    """Return the sink itself where its sources come as runs of the tensor, else one that gathers the tensor for it."""
    return sink if sink.begins() is not None else GatherSink(sink)


def _begin_of_run(source: Source, shape: tuple[int, ...], together: int) -> int | None:
    """Return the index in the flattened tensor where a source's values begin, if they follow each other from there."""
    if source.transposed:
        return None
    whole = torch.empty(shape, device="meta")
    part = whole[source.region] if source.region else whole
    begin = int(part.storage_offset())
    # Values that stay together may not be shared with the next source.
    is_run = part.is_contiguous() and begin % together == 0
    is_last = begin + part.numel() == whole.numel()
    return begin if is_run and (is_last or part.numel() % together == 0) else None


def copy_into(values: torch.Tensor, source: Source) -> ReadTask:
    """Fill a source's region of a tensor."""
    target = values[source.region] if source.region else values
    target = target.mT if source.transposed else target
    if target.is_contiguous():
        flat = target.view(-1)

        def copy(piece: torch.Tensor, begin: int) -> None:
            flat[begin : begin + len(piece)].copy_(piece)

        home = flat.view(torch.uint8) if source.tensor.dtype == flat.dtype else None
        return ReadTask(stored_form(source.tensor), values.device, copy, home)
    gathered: list[torch.Tensor] = []

    def gather(piece: torch.Tensor, begin: int) -> None:
        # Columns or a transpose: from a copy that is whole and contiguous, which lives until then.
        if not gathered:
            gathered.append(torch.empty(target.shape, dtype=piece.dtype, device=piece.device))
        whole = gathered[0].view(-1)
        whole[begin : begin + len(piece)].copy_(piece)
        if begin + len(piece) == len(whole):
            target.copy_(gathered.pop())

    return ReadTask(stored_form(source.tensor), values.device, gather)


def numel(tensor: StoredTensor | torch.Tensor) -> int:
    """Count the values of a source."""
    return tensor.nbytes // tensor.dtype.itemsize


def stored_form(tensor: StoredTensor | torch.Tensor) -> StoredTensor:
    """Return where a source's values are, the model's own as such that need no reading."""
    if isinstance(tensor, StoredTensor):
        return tensor
    return LazyTensor("", Path(), tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes, lambda: tensor)
