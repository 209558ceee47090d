"""`ScaledTensor`: a weight stored as small numbers and the scales to multiply them with."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...errors import CheckpointError, listed
from ...io.tensors import LazyTensor, StoredTensor, follows, joined, joined_name, read_whole
from .values import RowValues, largest_scale

# Values that are computed at once: on the CPU so that they stay in the cache, on a GPU so that they need little memory.
CPU_VALUES, GPU_VALUES = 2**18, 2**25


@dataclass(frozen=True)
class ScaledTensor(LazyTensor):
    """A weight whose values are numbers of 4 or 8 bits times scales.

    Its shape is that of the values, its dtype the one that they are asked for in (see `in_dtype`), its file and offset
    those of the numbers, and its nbytes those of numbers and scales.

    Attributes:
        kind: how it is stored, in words.
        numbers: as they are stored; of two in a byte, the lower bits are the first.
        scales: as they are stored: one for each block, in the order of the blocks.
        block: rows and columns of values that share a scale; blocks at the ends may be smaller.
        rank: where the whole weight begins in its file, of which this may be an expert.
        is_turned: whether the model's parameter is its transpose.
    """

    kind: str
    numbers: StoredTensor
    scales: StoredTensor
    block: tuple[int, int]
    rank: int
    is_turned: bool = False

    @property
    def is_packed(self) -> bool:
        """Whether two numbers share a byte."""
        return self.numbers.dtype == torch.uint8

    def scratch_bytes(self, per_value: int, count: int) -> int:
        """Return the memory that a GPU needs beside the numbers while the values are computed.

        Args:
            per_value: bytes of one.
            count: values of all weights that are read like one with this.
        """
        values, columns = max(min(count, GPU_VALUES), self.shape[-1]), max(1, self.shape[-1])
        # By torch alone: the place of a byte in a table, in 4 bytes; and the scales of each row, and which they are.
        scales = -(-values // min(self.block[1], columns)) * 8 + values // columns * 32
        return values * (per_value + 2 * self.is_packed) + scales

    def in_dtype(self, dtype: torch.dtype) -> ScaledTensor:
        """Return the same, with values in another dtype."""
        made = object.__new__(ScaledTensor)  # `replace` takes ten times as long, for tens of thousands
        vars(made).update(vars(self), dtype=dtype)
        return made

    def experts(self) -> list[ScaledTensor]:
        """Return each matrix of a weight with three dimensions, (E, rows, columns)."""
        count, *shape = self.shape
        pairs = zip(_divided(self.numbers, count), _divided(self.scales, count), strict=True)
        whole = self.name, self.kind
        return [scaled_tensor(*whole, n, s, tuple(shape), self.block, rank=self.rank) for n, s in pairs]


def scaled_tensor(
    name: str,
    kind: str,
    numbers: StoredTensor,
    scales: StoredTensor,
    shape: tuple[int, ...],
    block: tuple[int, int],
    *,
    rank: int | None = None,
    is_turned: bool = False,
    dtype: torch.dtype = torch.float32,
) -> ScaledTensor:
    """Return a weight of its stored numbers and scales, which fit together; see `ScaledTensor`.

    By default its rank is the offset of its numbers.
    """
    return ScaledTensor(
        name,
        numbers.file,
        dtype,
        shape,
        numbers.offset,
        numbers.nbytes + scales.nbytes,
        functools.partial(_values, name, numbers, scales, shape, block),
        kind,
        numbers,
        scales,
        block,
        numbers.offset if rank is None else rank,
        is_turned,
    )


def joined_scaled(parts: Sequence[ScaledTensor]) -> ScaledTensor:
    """Return matrices that follow each other (see `follows_scaled`) as one weight, (E, rows, columns)."""
    first, last = parts[0], parts[-1]
    numbers, scales = joined([part.numbers for part in parts]), joined([part.scales for part in parts])
    name, shape = joined_name(first.name, last.name), (len(parts), *first.shape)
    return scaled_tensor(name, first.kind, numbers, scales, shape, first.block, rank=first.rank, dtype=first.dtype)


def follows_scaled(last: ScaledTensor, other: ScaledTensor) -> bool:
    """Whether a matrix has its numbers and scales in the file right after those of another one of the same kind."""
    return (
        len(last.shape) == 2
        and (last.kind, last.shape, last.block, last.dtype) == (other.kind, other.shape, other.block, other.dtype)
        and follows(last.numbers, other.numbers)
        and follows(last.scales, other.scales)
    )


def _divided(tensor: StoredTensor, count: int) -> list[StoredTensor]:
    """Return the equal parts of a stored tensor."""
    nbytes = tensor.nbytes // max(1, count)
    shape = (nbytes // tensor.dtype.itemsize,)
    own = tensor.name, tensor.file, tensor.dtype, shape
    if isinstance(tensor, LazyTensor):
        loads = (functools.partial(_part, tensor, index, shape[0]) for index in range(count))
        return [LazyTensor(*own, tensor.offset, nbytes, load) for load in loads]
    return [StoredTensor(*own, tensor.offset + index * nbytes, nbytes) for index in range(count)]


def _part(tensor: LazyTensor, index: int, numel: int) -> torch.Tensor:
    return tensor.load().contiguous().view(-1)[index * numel : (index + 1) * numel]


def _values(
    name: str, numbers: StoredTensor, scales: StoredTensor, shape: tuple[int, ...], block: tuple[int, int]
) -> torch.Tensor:
    """Read all values of a weight, in float32."""
    if not math.prod(shape):
        return torch.empty(shape)
    read = read_whole(scales).view(-1)
    if not math.isfinite(largest_scale(read)):
        raise not_finite([name])
    return RowValues(read, shape, block).of(read_whole(numbers).view(-1), 0, torch.float32).view(shape)


def not_finite(names: Sequence[str]) -> CheckpointError:
    """Return the error for weights with scales that are infinite or not a number."""
    return CheckpointError(
        f"{listed(names, 5)}: stored with scales that are not finite: the file is damaged; download it again"
    )
