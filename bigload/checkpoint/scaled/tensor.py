"""`ScaledTensor`: a weight stored as small numbers and the scales to multiply them with, and the values that it has.

The values are computed in float32 and rounded once, to the dtype asked for, as transformers' `dequantize=True` does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ...errors import CheckpointError
from ...io.tensors import LazyTensor, StoredTensor, read_whole

# Values that are computed at once: on the CPU so that they stay in the cache, on a GPU so that they need little memory.
CPU_VALUES, GPU_VALUES = 2**18, 2**24
# The values of E2M1 by their 4 bits: OCP Microscaling Formats (MX) Specification 1.0, section 5.3.3.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# The bits of 2 ** -127 in float32: what an exponent of 0 means.
_SMALLEST = 0x00400000


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

    def scratch_bytes(self, per_value: int) -> int:
        """Return the memory that a GPU needs beside the numbers while the values are computed, of some bytes each."""
        values = max(min(math.prod(self.shape), GPU_VALUES), self.shape[-1])
        across = -(-self.shape[-1] // max(1, self.block[1]))
        scales = math.prod(self.shape[:-1]) * across * torch.float32.itemsize
        # Of two numbers in a byte there is their place in the table too, in 4 bytes.
        return values * (per_value + 2 * self.is_packed) + scales

    def in_dtype(self, dtype: torch.dtype) -> ScaledTensor:
        """Return the same, with values in another dtype."""
        return replace(self, dtype=dtype)

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
) -> ScaledTensor:
    """Return a weight of its stored numbers and scales, which fit together; see `ScaledTensor`.

    By default its rank is the offset of its numbers.
    """
    return ScaledTensor(
        name,
        numbers.file,
        torch.float32,
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


def _divided(tensor: StoredTensor, count: int) -> list[StoredTensor]:
    """Return the equal parts of a stored tensor."""
    nbytes = tensor.nbytes // max(1, count)
    shape = (nbytes // tensor.dtype.itemsize,)
    return [replace(tensor, shape=shape, offset=tensor.offset + i * nbytes, nbytes=nbytes) for i in range(count)]


def _values(
    name: str, numbers: StoredTensor, scales: StoredTensor, shape: tuple[int, ...], block: tuple[int, int]
) -> torch.Tensor:
    """Read all values of a weight, in float32."""
    blocks = scales_of_blocks(read_whole(scales).view(-1), shape, block)
    if not bool(blocks.isfinite().all()):
        raise not_finite([name])
    by_row = scales_of_rows(blocks, shape[-2], block[0])
    return values_of_rows(read_whole(numbers).view(-1), by_row, shape[-1], block[1], torch.float32).view(shape)


def not_finite(names: Sequence[str]) -> CheckpointError:
    """Return the error for weights with scales that are infinite or not a number."""
    shown = ", ".join(f"'{name}'" for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return CheckpointError(f"{shown}: stored with scales that are not finite: the file is damaged; download it again")


def scales_of_blocks(stored: torch.Tensor, shape: Sequence[int], block: tuple[int, int]) -> torch.Tensor:
    """Return the scales of a weight's blocks.

    Args:
        stored: all of them, flat; bytes are exponents of two, with a bias of 127 (E8M0 of the MX specification).
        shape: of the values, (..., rows, columns).
        block: rows and columns that share a scale.

    Returns:
        (matrices, blocks in a column, blocks in a row), float32.
    """
    *outer, rows, columns = shape
    if stored.dtype == torch.uint8:
        # The bits of 2 ** (s - 127) in float32: exact, also where a power function is not.
        stored = (stored.to(torch.int32) << 23).clamp_(min=_SMALLEST).view(torch.float32)
    return stored.to(torch.float32).view(math.prod(outer), -(-rows // block[0]), -(-columns // block[1]))


def scales_of_rows(blocks: torch.Tensor, rows: int, height: int) -> torch.Tensor:
    """Return the scales of each row of a weight, (all rows, blocks in a row).

    Args:
        blocks: their scales, (matrices, blocks in a column, blocks in a row).
        rows: of each matrix.
        height: rows that share a scale.
    """
    if height > 1:
        blocks = blocks[:, :, None].expand(-1, -1, min(height, rows), -1).flatten(1, 2)[:, :rows]
    return blocks.reshape(-1, blocks.shape[-1])


def values_of_rows(
    numbers: torch.Tensor, scales: torch.Tensor, columns: int, width: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return the values of some rows of a weight.

    Args:
        numbers: theirs, flat, as they are stored.
        scales: theirs, (rows, blocks in a row), float32.
        columns: values in a row.
        width: values in a row that share a scale.
        dtype: of the result. It holds every number exactly; the product is computed in float32 and rounded to it once.

    Returns:
        (rows, columns).
    """
    if numbers.dtype == torch.uint8:
        # Two numbers at once: looked up as one element of twice the size.
        flat = _pairs(dtype, numbers.device).index_select(0, numbers.to(torch.int32)).view(dtype)
    elif numbers.device.type == "cpu" and numbers.is_floating_point():
        # Looked up: the CPU has no instruction for fp8, and torch takes eight times as long.
        flat = _each(numbers.dtype, dtype).index_select(0, numbers.view(torch.uint8).to(torch.int32))
    else:
        flat = numbers.to(dtype)
    values = flat.view(-1, columns)
    whole = columns // width
    if whole:
        values[:, : whole * width].view(len(values), whole, width).mul_(scales[:, :whole, None])
    if whole * width < columns:
        values[:, whole * width :].mul_(scales[:, whole:])
    return values


@functools.cache
def _pairs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the two numbers of each byte, (256,), in elements as large as two of `dtype`."""
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=dtype)
    both = torch.stack([table.repeat(16), table.repeat_interleave(16)], dim=1)
    return both.view({2: torch.int32, 4: torch.int64}[dtype.itemsize]).view(-1).to(device)


@functools.cache
def _each(stored: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    """Return the number of each byte, (256,), as torch converts it."""
    return torch.arange(256, dtype=torch.uint8).view(stored).to(dtype)
