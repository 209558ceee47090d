"""Traces tensors through stack, cat and transpose, to find where each ends up without copying data.

transformers merges weights with operations of its own (experts into one tensor, for instance). Run on traced tensors,
they show which region of which parameter each stored tensor fills. The pipeline then loads it straight into that
region.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


class NotTraceable(Exception):  # noqa: N818 - handled by the caller, not an error
    """An operation does more than rearrange whole tensors."""


@dataclass(frozen=True)
class TracedRegion:
    """The region of a larger tensor that one whole stored tensor fills.

    Attributes:
        name: of the stored tensor.
        region: an index for each dimension of the larger tensor; an integer for a dimension that stacking added.
        transposed: whether the last two dimensions of the stored tensor are swapped there.
    """

    name: str
    region: tuple[slice | int, ...]
    transposed: bool = False


class TracedTensor:
    """A stand-in for a tensor, with a shape and the stored tensors it is made of, but no data."""

    def __init__(
        self, shape: Sequence[int], pieces: Sequence[TracedRegion], dtype: torch.dtype = torch.float32
    ) -> None:
        self.shape = torch.Size(shape)
        self.pieces = tuple(pieces)
        self.dtype = dtype

    @classmethod
    def whole(cls, name: str, shape: Sequence[int]) -> TracedTensor:
        """Return the stand-in for one stored tensor."""
        return cls(shape, [TracedRegion(name, tuple(slice(0, size) for size in shape))])

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Trace `torch.stack`, `torch.cat` and `torch.transpose`.

        Raises:
            NotTraceable: any other function.
        """
        handlers: dict[Any, Callable[..., Any]] = {torch.stack: _stack, torch.cat: _cat, torch.transpose: _transpose}
        mixed = (
            args and isinstance(args[0], (list, tuple)) and not all(isinstance(each, TracedTensor) for each in args[0])
        )
        if func not in handlers or mixed:
            raise NotTraceable(getattr(func, "__name__", str(func)))
        return handlers[func](*args, **(kwargs or {}))

    def contiguous(self) -> TracedTensor:
        """Return itself: a traced tensor has no memory layout."""
        return self

    def transpose(self, dim0: int, dim1: int) -> TracedTensor:
        """Swap the last two dimensions; any others raise `NotTraceable`."""
        return _transpose(self, dim0, dim1)

    def __getattr__(self, name: str) -> Any:
        raise NotTraceable(name)

    def _refuse(self, *others: Any) -> Any:
        raise NotTraceable("an operator")

    __getitem__ = __len__ = __iter__ = __neg__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __matmul__ = _refuse


def _stack(tensors: Sequence[TracedTensor], dim: int = 0) -> TracedTensor:
    first = tensors[0].shape
    if any(tensor.shape != first for tensor in tensors):
        raise NotTraceable("stack of different shapes")
    dim %= len(first) + 1
    pieces = [
        TracedRegion(piece.name, (*piece.region[:dim], position, *piece.region[dim:]), piece.transposed)
        for position, tensor in enumerate(tensors)
        for piece in tensor.pieces
    ]
    if any(piece.transposed for piece in pieces) and dim > len(first) - 2:
        raise NotTraceable("stack between transposed dimensions")
    return TracedTensor((*first[:dim], len(tensors), *first[dim:]), pieces)


def _cat(tensors: Sequence[TracedTensor], dim: int = 0) -> TracedTensor:
    first = tensors[0].shape
    dim %= len(first)
    if any((*t.shape[:dim], *t.shape[dim + 1 :]) != (*first[:dim], *first[dim + 1 :]) for t in tensors):
        raise NotTraceable("cat of different shapes")
    pieces, offset = [], 0
    for tensor in tensors:
        pieces += [
            TracedRegion(piece.name, _shifted(piece.region, dim, offset), piece.transposed) for piece in tensor.pieces
        ]
        offset += tensor.shape[dim]
    return TracedTensor((*first[:dim], offset, *first[dim + 1 :]), pieces)


def _shifted(region: tuple[slice | int, ...], dim: int, offset: int) -> tuple[slice | int, ...]:
    index = region[dim]
    moved = index + offset if isinstance(index, int) else slice(index.start + offset, index.stop + offset)
    return (*region[:dim], moved, *region[dim + 1 :])


def _transpose(tensor: TracedTensor, dim0: int, dim1: int) -> TracedTensor:
    last = len(tensor.shape) - 1
    if {dim0 % (last + 1), dim1 % (last + 1)} != {last - 1, last}:
        raise NotTraceable("transpose of other than the last two dimensions")
    if any(isinstance(index, int) for piece in tensor.pieces for index in piece.region[-2:]):
        raise NotTraceable("transpose of a stacked dimension")
    pieces = [
        TracedRegion(piece.name, (*piece.region[:-2], *piece.region[:-3:-1]), not piece.transposed)
        for piece in tensor.pieces
    ]
    return TracedTensor((*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2]), pieces)
