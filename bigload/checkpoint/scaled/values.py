"""The values of weights that are stored as small numbers with scales.

They are computed in float32 and rounded once, to the dtype asked for, as transformers' `dequantize=True` does: by torch
or, where two numbers share a byte, on GPUs by a kernel of Triton. torch would need three passes over them there, and
four times their memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from types import ModuleType
from typing import TypeVar

import torch

from ...hardware.triton_support import asks_again, runs_on

# The values of E2M1 by their 4 bits: OCP Microscaling Formats (MX) Specification 1.0, section 5.3.3.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# The bits of 2 ** -127 in float32: what an exponent of 0 means.
_SMALLEST = 0x00400000
# Values that a program of the kernel computes.
_PER_PROGRAM = 1024
_Rows = TypeVar("_Rows", int, torch.Tensor)


class RowValues:
    """Computes the values of some rows of a weight, from their numbers."""

    def __init__(self, scales: torch.Tensor, shape: Sequence[int], block: tuple[int, int]) -> None:
        """Keep a weight's scales.

        Args:
            scales: all of them, flat, as they are stored: one for each block, in the order of the blocks. Bytes are
                exponents of two, with a bias of 127 (E8M0 of the MX specification).
            shape: of the values, (..., rows, columns).
            block: rows and columns that share a scale; blocks at the ends may be smaller.
        """
        *_, self._rows, self._columns = shape
        self._height, self._width = block[0], min(block[1], self._columns)
        self._down, across = -(-self._rows // self._height), -(-self._columns // self._width)
        flat = scales.view(torch.uint8) if scales.dtype == torch.float8_e8m0fnu else scales
        self._scales = flat.view(-1, across)

    def of(self, numbers: torch.Tensor, first: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the values of whole rows.

        Args:
            numbers: theirs, flat, as they are stored.
            first: the first row, counted through all matrices.
            dtype: of the result. It holds every number exactly.

        Returns:
            (rows, columns), on the device of the numbers and scales.
        """
        are_packed = numbers.dtype == torch.uint8
        count = numbers.numel() * (2 if are_packed else 1) // self._columns
        if are_packed and numbers.device.type == "cuda" and runs_kernel(numbers.device):
            return self._by_kernel(numbers, first, count, dtype)
        # On the CPU, too, in float32: torch multiplies no other dtype as fast, and these fit in the cache.
        computed = torch.float32 if numbers.device.type == "cpu" else dtype
        return _multiplied(numbers, self._of_rows(first, count), self._columns, self._width, computed).to(dtype)

    def _of_rows(self, first: int, count: int) -> torch.Tensor:
        """Return the scales of some rows, (lines, blocks in a row), float32: of as many rows each, in their order."""
        lines, last = self._scales, first + count - 1
        begin, end = self._line(first), self._line(last)
        some = as_factors(lines if end - begin + 1 == lines.shape[0] else lines[begin : end + 1])
        if begin == end or self._rows % self._height == first % self._height == count % self._height == 0:
            return some
        line = self._line(torch.arange(first, last + 1, device=lines.device))
        return torch.index_select(some, 0, line - begin)

    def _line(self, row: _Rows) -> _Rows:
        return row // self._rows * self._down + row % self._rows // self._height

    def _by_kernel(self, numbers: torch.Tensor, first: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(count, self._columns, dtype=dtype, device=numbers.device)
        are_exponents = self._scales.dtype == torch.uint8
        _kernels().multiply[(count, -(-self._columns // _PER_PROGRAM))](
            numbers,
            self._scales,
            _e2m1(numbers.device),
            _exponents(numbers.device),
            out,
            first,
            self._rows,
            self._columns,
            self._height,
            self._width,
            self._down,
            self._scales.shape[1],
            are_exponents,
            _PER_PROGRAM,
        )
        return out


def as_factors(scales: torch.Tensor) -> torch.Tensor:
    """Return stored scales as float32, of the same shape."""
    if scales.dtype == torch.uint8:
        # The bits of 2 ** (s - 127) in float32: exact, also where a power function is not.
        scales = (scales.to(torch.int32) << 23).clamp_(min=_SMALLEST).view(torch.float32)
    return scales.to(torch.float32)


def largest_scale(scales: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude of some stored scales, at least one, as a tensor; NaN if there is one."""
    if scales.dtype == torch.uint8:
        return as_factors(scales.max())
    largest: torch.Tensor = torch.linalg.vector_norm(as_factors(scales), math.inf)
    return largest


def _multiplied(
    numbers: torch.Tensor, scales: torch.Tensor, columns: int, width: int, dtype: torch.dtype
) -> torch.Tensor:
    """Multiply the numbers of some rows with their scales, (lines, blocks in a row), by torch."""
    if numbers.dtype == torch.uint8:
        # Two numbers at once: looked up as one element of twice the size.
        flat = _pairs(dtype, numbers.device).index_select(0, numbers.to(torch.int32)).view(dtype)
    elif numbers.device.type == "cpu" and numbers.is_floating_point():
        # Looked up: the CPU has no instruction for fp8, and torch takes eight times as long.
        flat = _each(numbers.dtype).index_select(0, numbers.view(torch.uint8).to(torch.int32))
    else:
        flat = numbers.to(dtype)
    (lines, across), whole = scales.shape, columns // width
    if whole == across:  # almost always
        flat.view(lines, -1, whole, width).mul_(scales.view(lines, 1, whole, 1))
        return flat.view(-1, columns)
    values = flat.view(lines, -1, columns)
    values[..., : whole * width].view(*values.shape[:2], whole, width).mul_(scales[:, None, :whole, None])
    values[..., whole * width :].mul_(scales[:, None, whole:])
    return values.view(-1, columns)


@functools.cache
def _pairs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the two numbers of each byte, (256,), in elements as large as two of `dtype`."""
    table = _e2m1(torch.device("cpu")).to(dtype)
    both = torch.stack([table.repeat(16), table.repeat_interleave(16)], dim=1)
    return both.view({2: torch.int32, 4: torch.int64}[dtype.itemsize]).view(-1).to(device)


@functools.cache
def _e2m1(device: torch.device) -> torch.Tensor:
    """Return the number of each 4 bits, (16,), float32."""
    return torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=torch.float32, device="cpu").to(device)


@functools.cache
def _each(stored: torch.dtype) -> torch.Tensor:
    """Return the number of each byte, (256,), float32, as torch converts it."""
    return torch.arange(256, dtype=torch.uint8, device="cpu").view(stored).to(torch.float32)


@functools.cache
def _exponents(device: torch.device) -> torch.Tensor:
    """Return the factor of each byte of exponents, (256,), float32."""
    return as_factors(torch.arange(256, dtype=torch.uint8, device="cpu")).to(device)


@asks_again
@functools.cache
def runs_kernel(device: torch.device) -> bool:
    """Whether the kernel runs on a GPU, found out by running it; it is loaded then."""

    def trial() -> None:
        scales = torch.zeros(1, dtype=torch.uint8, device=device)
        values = RowValues(scales, (1, 32), (1, 32))
        values._by_kernel(torch.zeros(16, dtype=torch.uint8, device=device), 0, 1, torch.bfloat16)

    return runs_on(device, trial, "so that torch computes the values of weights in 4 bits, which takes longer")


@functools.cache
def _kernels() -> ModuleType:
    from . import kernels

    return kernels
