"""Large tensors that are allocated when they are needed, and never if only a parameter is made of them."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# Functions that make tensors of a given shape; smaller ones than this are made at once.
_FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}
_MIN_BYTES = 2**20
# What torch takes for a dtype too.
_PYTHON_DTYPES: dict[Any, torch.dtype] = {
    bool: torch.bool,
    int: torch.int64,
    float: torch.float64,
    complex: torch.complex128,
}
# Arguments that say where a tensor is made: left to torch.
_PLACES = {"device", "out", "pin_memory"}
# What may be asked of a tensor that is not allocated yet, and what gives new values to all of it.
_LOOKS = {"size", "dim", "numel", "element_size", "is_floating_point", "is_complex", "requires_grad_", "__len__"}
_READS = {"shape", "dtype", "ndim", "requires_grad", "is_leaf", "layout", "nbytes", "itemsize"}
_FILLS = {"zero_", "fill_", "normal_", "uniform_"}
# While transformers initializes a model, those of torch are replaced by functions of its own, which call them.
_INITS = {"torch.nn.init", "transformers.initialization"}


class Unallocated(TorchFunctionMode):
    """While it is on, large new tensors are on meta; one that anything but a parameter uses becomes real first."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: dict[int, tuple[torch.Tensor, Callable[[], torch.Tensor]]] = {}
        self._is_making = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) in _INITS:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta and id(tensor) not in self._waiting:
                return tensor  # a parameter: it has no values, and this takes most of the time
        elif func in _FACTORIES and not self._is_making and _is_large(args, kwargs) and not kwargs.keys() & _PLACES:
            return self._planned(func, args, kwargs)
        if self._waiting and not self._is_making and func not in _FACTORIES and not self._is_look(func):
            if func.__name__ in _FILLS and args and id(args[0]) in self._waiting and not _tensors(args[1:]):
                return self._fill(func, args[0], args[1:], kwargs)
            for tensor in _tensors([*args, *kwargs.values()]):
                self.make_real(tensor)
        return func(*args, **kwargs)

    def _fill(self, func: Any, tensor: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        _, make = self._waiting[id(tensor)]
        self._waiting[id(tensor)] = tensor, lambda: func(make(), *args, **kwargs)
        return tensor

    def make_real(self, tensor: torch.Tensor) -> None:
        """Allocate a tensor of this block, if that has not been done; others are left as they are."""
        waiting = self._waiting.pop(id(tensor), None)
        if waiting is None:
            return
        before, self._is_making = self._is_making, True
        try:
            torch.utils.swap_tensors(tensor, waiting[1]())  # type: ignore[no-untyped-call]
        finally:
            self._is_making = before

    def finish(self) -> None:
        """Allocate what is held by others still, such as attributes that are no buffers."""
        for tensor, _ in list(self._waiting.values()):
            # Counted are the list, its tuple, the loop's name and the argument; the dict holds the same tuple.
            if sys.getrefcount(tensor) > _OWN_REFERENCES:
                self.make_real(tensor)
        self._waiting.clear()

    def _planned(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        made: torch.Tensor = func(*args, **kwargs, device="meta")
        self._waiting[id(made)] = made, functools.partial(func, *args, **kwargs | {"dtype": made.dtype})
        return made

    @staticmethod
    def _is_look(func: Any) -> bool:
        if func.__name__ == "__get__":
            return getattr(getattr(func, "__self__", None), "__name__", "") in _READS
        return func.__name__ in _LOOKS


_OWN_REFERENCES = 3


def _is_large(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a factory makes a large tensor, by its arguments."""
    shape = kwargs.get("size", args[0] if args and isinstance(args[0], (list, tuple)) else args)
    count = math.prod(size for size in shape if isinstance(size, int)) if isinstance(shape, (list, tuple)) else 0
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    return count * _PYTHON_DTYPES.get(dtype, dtype).itemsize >= _MIN_BYTES


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found
