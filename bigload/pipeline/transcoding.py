"""Weights that are stored with scales: the reads that they need, and their values, computed as the numbers arrive."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint.scaled.tensor import CPU_VALUES, GPU_VALUES, ScaledTensor, not_finite
from ..checkpoint.scaled.values import RowValues, largest_scale
from ..errors import QuantizationError
from ..hardware.interrupts import interruptible
from ..io.program import ReadTask
from ..io.ring import slot_bytes
from ..io.tensors import StoredTensor

# Scales that are smaller than this part of their weight are read before all weights of its file, in few reads.
_FEW = 1 / 64
# Pieces are multiples of rows of blocks if a slot of the ring has room for as many: else it would be left half empty.
_SOME = 4


@dataclass(eq=False, slots=True)
class _ScalesTask(ReadTask):
    """Scales to read.

    Attributes:
        weight: their weight, which is read after them.
    """

    weight: ScaledTensor | None = None


def in_file_order(tasks: Sequence[ReadTask]) -> list[ReadTask]:
    """Sort reads by files and offsets, but scales before the weight that needs them."""
    rank: dict[Path, int] = {
        file: rank for rank, file in enumerate(sorted({_leader(task).file for task in interruptible(tasks)}))
    }

    def place(task: ReadTask) -> tuple[int, int, int, int]:
        leader = _leader(task)
        if not isinstance(leader, ScaledTensor):
            return rank[leader.file], leader.offset, 1, 0
        are_few = leader.scales.nbytes <= leader.numbers.nbytes * _FEW
        return rank[leader.file], -1 if are_few else leader.rank, 0, task.tensor.offset

    return sorted(tasks, key=place)


def _leader(task: ReadTask) -> StoredTensor:
    return task.weight if isinstance(task, _ScalesTask) and task.weight is not None else task.tensor


class Transcoder:
    """Turns the numbers of weights into their values, and remembers the scales' magnitudes to check them at the end."""

    def __init__(self) -> None:
        self._largest: defaultdict[torch.device, list[tuple[str, torch.Tensor]]] = defaultdict(list)

    def reads(self, tasks: Sequence[ReadTask]) -> list[ReadTask]:
        """Return tasks with each weight that is stored with scales as two reads, of the scales and of the numbers.

        One whose rows do not fit into a slot of the ring stays as it is: its values are computed at once.
        """
        found = list[ReadTask]()
        for task in interruptible(tasks):
            weight = task.tensor
            landing = _Landing(task, weight, self) if isinstance(weight, ScaledTensor) else None
            found += [task] if landing is None or not landing.fits else landing.reads()
        return found

    def add(self, name: str, scales: torch.Tensor) -> None:
        """Take a weight's scales, as they are stored.

        Raises:
            CheckpointError: on the CPU, if one of them is not finite.
        """
        if not scales.numel():
            return
        largest = largest_scale(scales)
        if scales.device.type != "cpu":
            self._largest[scales.device].append((name, largest))
        elif not math.isfinite(largest):
            raise not_finite([name])

    @contextmanager
    def finite(self) -> Iterator[None]:
        """Refuse scales that are not finite when the `with` block has ended, or has failed on values made of them.

        Raises:
            CheckpointError: there are some.
        """
        try:
            yield
        except QuantizationError:
            self._require_finite()
            raise
        self._require_finite()

    def _require_finite(self) -> None:
        """Look at the scales, with one sync for each GPU."""
        for pairs in self._largest.values():
            values = torch.stack([largest for _, largest in pairs]).tolist()
            bad = [name for (name, _), value in zip(pairs, values, strict=True) if not math.isfinite(value)]
            if bad:
                raise not_finite(list(dict.fromkeys(bad)))


class _Landing:
    """One weight on its way: takes its scales, then its numbers, and hands its values on."""

    def __init__(self, task: ReadTask, weight: ScaledTensor, transcoder: Transcoder) -> None:
        self._task, self._weight, self._transcoder = task, weight, transcoder
        self._columns, self._per_item = weight.shape[-1], 2 if weight.is_packed else 1
        # Pieces are whole rows, and whole blocks or rows of the format that they are quantized to.
        self._values = math.lcm(max(1, self._columns), task.values_per_scale)
        # On a GPU they are, where a slot holds some, whole rows of blocks too: multiplied by one kernel.
        of_blocks = math.lcm(max(1, self._columns) * weight.block[0], task.values_per_scale)
        if task.device.type == "cuda" and of_blocks * _SOME <= slot_bytes():
            self._values = of_blocks
        self._missing = math.prod(weight.shape)
        self._stored: torch.Tensor | None = None
        self._rows: RowValues | None = None
        self._early: list[tuple[torch.Tensor, int]] = []

    @property
    def fits(self) -> bool:
        """Whether the smallest piece fits into a slot of the ring."""
        items = self._values // self._per_item
        return items * self._weight.numbers.dtype.itemsize <= slot_bytes() and math.prod(self._weight.shape) > 0

    def reads(self) -> list[ReadTask]:
        """Return the reads of the scales and of the numbers."""
        device, weight = self._task.device, self._weight
        return [
            _ScalesTask(weight.scales, device, self._take_scales, weight=weight),
            ReadTask(weight.numbers, device, self._take, values_per_scale=self._values // self._per_item),
        ]

    def _take_scales(self, piece: torch.Tensor, begin: int) -> None:
        scales = self._weight.scales
        count = scales.nbytes // scales.dtype.itemsize
        if len(piece) == count:  # almost always
            self._stored = piece.clone()
        else:
            if self._stored is None:
                self._stored = torch.empty(count, dtype=scales.dtype, device=piece.device)
            self._stored[begin : begin + len(piece)].copy_(piece)
            if begin + len(piece) < count:
                return
        self._rows = RowValues(self._stored, self._weight.shape, self._weight.block)
        self._transcoder.add(self._weight.name, self._stored)
        self._stored = None
        early, self._early = self._early, []
        for numbers, at in early:
            self._take(numbers, at)

    def _take(self, piece: torch.Tensor, begin: int) -> None:
        if self._rows is None:  # it came before the scales
            self._early.append((piece.clone(), begin))
            return
        per_item = self._per_item
        room = CPU_VALUES if piece.device.type == "cpu" else GPU_VALUES
        step = max(1, room // self._values) * self._values // per_item
        for numbers in (piece,) if len(piece) <= step else torch.split(piece, step):
            at, count = begin * per_item, len(numbers) * per_item
            values = self._rows.of(numbers, at // self._columns, self._weight.dtype)
            self._task.take(values.view(-1), at)
            del values  # before the next ones are computed
            self._task.arrived(count)
            begin += len(numbers)
            self._missing -= count
        if not self._missing:
            self._rows = None
