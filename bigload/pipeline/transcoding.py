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
        return rank[leader.file], -1 if _has_few_scales(leader) else leader.rank, 0, task.tensor.offset

    return sorted(tasks, key=place)


def _leader(task: ReadTask) -> StoredTensor:
    return task.weight if isinstance(task, _ScalesTask) and task.weight is not None else task.tensor


def _has_few_scales(weight: ScaledTensor) -> bool:
    return weight.scales.nbytes <= weight.numbers.nbytes * _FEW


class Transcoder:
    """Turns the numbers of weights into their values, and remembers the scales' magnitudes to check them at the end."""

    def __init__(self) -> None:
        self._largest: defaultdict[torch.device, list[tuple[str, torch.Tensor]]] = defaultdict(list)
        self._few: list[tuple[torch.Tensor, list[tuple[str, torch.Tensor]]]] = []

    def reads(self, tasks: Sequence[ReadTask]) -> list[ReadTask]:
        """Return tasks with each weight that is stored with scales as two reads, of the scales, then of the numbers.

        One whose rows do not fit into a slot of the ring stays as it is: its values are computed at once.
        """
        found, room = list[ReadTask](), slot_bytes()
        few: defaultdict[tuple[torch.device, torch.dtype], list[_Landing]] = defaultdict(list)
        for task in interruptible(tasks):
            weight = task.tensor
            landing = _Landing(task, weight, self, room) if isinstance(weight, ScaledTensor) else None
            if landing is None or not landing.fits:
                found.append(task)
                continue
            if _has_few_scales(landing.weight):
                few[task.device, landing.weight.scales.dtype].append(landing)
            else:
                found.append(landing.scales_task())
            found.append(landing.numbers_task())
        return [task for key, landings in few.items() for task in self._read_few(landings, *key)] + found

    def _read_few(self, landings: list[_Landing], device: torch.device, dtype: torch.dtype) -> list[ReadTask]:
        """Read the scales of weights into one tensor: there may be tens of thousands, of a few bytes each."""
        counts = [landing.weight.scales.nbytes // dtype.itemsize for landing in landings]
        # Zeros: what a load that fails has not read yet is finite, too.
        scales = torch.zeros(sum(counts) * dtype.itemsize, dtype=torch.uint8, device=device).view(dtype)
        own = torch.split(scales, counts)
        self._few.append((scales, list(zip((landing.weight.name for landing in landings), own, strict=True))))
        return [landing.scales_task(home) for landing, home in zip(landings, own, strict=True)]

    def add(self, name: str, scales: torch.Tensor) -> None:
        """Take a weight's scales, as they are stored."""
        self._largest[scales.device].append((name, largest_scale(scales)))

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
        """Look at the scales, with few syncs for each GPU."""
        for scales, each in self._few:
            if not math.isfinite(largest_scale(scales)):
                for name, own in each:
                    self.add(name, own)
        for pairs in self._largest.values():
            values = torch.stack([largest for _, largest in pairs]).tolist()
            bad = [name for (name, _), value in zip(pairs, values, strict=True) if not math.isfinite(value)]
            if bad:
                raise not_finite(list(dict.fromkeys(bad)))


class _Landing:
    """One weight on its way: takes its scales, then its numbers, and hands its values on.

    Attributes:
        weight: the weight.
        fits: whether the smallest piece of its numbers fits into a slot of the ring.
    """

    def __init__(self, task: ReadTask, weight: ScaledTensor, transcoder: Transcoder, slot: int) -> None:
        """Begin with nothing there, and slots of `slot` bytes in the ring."""
        self._task, self.weight, self._transcoder = task, weight, transcoder
        self._columns, self._per_item = max(1, weight.shape[-1]), 2 if weight.is_packed else 1
        # Pieces are whole rows, and whole blocks or rows of the format that they are quantized to.
        self._values = math.lcm(self._columns, task.values_per_scale)
        # On a GPU they are, where a slot holds some, whole rows of blocks too: multiplied by one kernel.
        of_blocks = math.lcm(self._columns * weight.block[0], task.values_per_scale)
        if task.device.type == "cuda" and of_blocks * _SOME <= slot:
            self._values = of_blocks
        room = CPU_VALUES if task.device.type == "cpu" else GPU_VALUES
        self._step = max(1, room // self._values) * self._values // self._per_item
        self._missing = math.prod(weight.shape)
        self.fits = self._values // self._per_item * weight.numbers.dtype.itemsize <= slot and self._missing > 0
        self._scales: torch.Tensor | None = None
        self._rows: RowValues | None = None
        self._early: list[tuple[torch.Tensor, int]] = []

    def scales_task(self, home: torch.Tensor | None = None) -> ReadTask:
        """Return the read of the scales: into a home, flat, that the transcoder looks at, or into their own memory."""
        scales, device, self._scales = self.weight.scales, self._task.device, home
        self._missing_scales = scales.nbytes // scales.dtype.itemsize
        return _ScalesTask(scales, device, self._take_scales, home, 1, self._scales_arrived, self.weight)

    def numbers_task(self) -> ReadTask:
        """Return the read of the numbers."""
        multiple = self._values // self._per_item
        return ReadTask(self.weight.numbers, self._task.device, self._take, values_per_scale=multiple)

    def _take_scales(self, piece: torch.Tensor, begin: int) -> None:
        if self._scales is None and len(piece) == self._missing_scales:  # almost always
            self._scales = piece.clone()
            return
        if self._scales is None:
            self._scales = torch.empty(self._missing_scales, dtype=piece.dtype, device=piece.device)
        self._scales[begin : begin + len(piece)].copy_(piece)

    def _scales_arrived(self, count: int) -> None:
        self._missing_scales -= count
        if self._missing_scales or self._scales is None:
            return
        self._rows = RowValues(self._scales, self.weight.shape, self.weight.block)
        if not _has_few_scales(self.weight):
            self._transcoder.add(self.weight.name, self._scales)
        self._scales = None
        early, self._early = self._early, []
        for numbers, at in early:
            self._take(numbers, at)

    def _take(self, piece: torch.Tensor, begin: int) -> None:
        if self._rows is None:  # it came before the scales
            self._early.append((piece.clone(), begin))
            return
        for numbers in (piece,) if piece.numel() <= self._step else torch.split(piece, self._step):
            at, count = begin * self._per_item, numbers.numel() * self._per_item
            values = self._rows.of(numbers, at // self._columns, self.weight.dtype)
            self._task.take(values.view(-1), at)
            del values  # before the next ones are computed
            self._task.arrived(count)
            begin += numbers.numel()
            self._missing -= count
        if not self._missing:
            self._rows = None
