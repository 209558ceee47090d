"""Rotary embeddings in captured steps: one kernel for queries and keys, where a model launches ten.

In models of transformers, attention calls a function of its file that rotates queries and keys by tables of cosines and
sines. The kernel takes the place of such a function where it gives its bits: for what it is given when a step runs as
before, and for random numbers of those shapes.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import get_ident
from types import FunctionType
from typing import Any

import torch
from torch import nn

from ...hardware.devices import current_gpu
from ...quantization.expert_launches import next_power_of_2
from .trials import has_bits_of, kernels, passes, runs_kernels

NAME = "apply_rotary_pos_emb"
_Rotate = Callable[..., Any]
Strides = list[tuple[int, ...]]


def rotated(
    strides: Strides, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `x * cos + rotate_half(x) * sin` for queries and keys of one token, each operation rounded.

    Args:
        strides: of the results.
        q: (batch, heads, 1, width), in 16 bit.
        k: (batch, heads of the keys, 1, width).
        cos: (batch or 1, 1, width or width / 2); of the latter, both halves use the same.
        sin: likewise.
    """
    width, heads = q.shape[-1], q.shape[1] + k.shape[1]
    q_out, k_out = (torch.empty_strided(x.shape, each, **_kind(x)) for x, each in zip((q, k), strides, strict=True))
    rows = [table.stride(0) if table.shape[0] > 1 else 0 for table in (cos, sin)]
    with current_gpu(q.device):  # on which Triton launches
        kernels().rotate[(q.shape[0] * heads,)](
            q,
            k,
            cos,
            sin,
            q_out,
            k_out,
            q.shape[1],
            heads,
            *(stride for each in (q, k, q_out, k_out) for stride in each.stride()[:2]),
            *rows,
            width,
            cos.shape[-1],
            next_power_of_2(width),
            num_warps=1,
            enable_fp_fusion=False,  # torch rounds products before it adds them
        )
    return q_out, k_out


class Rotations:
    """The rotary embeddings of a model, and for which tensors the kernel computes them."""

    def __init__(self, model: nn.Module) -> None:
        self._files = _files_of(model)
        self._known: dict[Any, Strides | None] = {}

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Find out where the kernel gives the bits of a step, which is run as before."""
        with _instead(self._files, self._noting):
            yield

    def _noting(self, own: _Rotate) -> _Rotate:
        def noting(*args: Any, **kwargs: Any) -> Any:
            found = own(*args, **kwargs)
            if _suits(args, kwargs) and runs_kernels(args[0].device) and _is_pair_like(found, args):
                key = _key(own, args)
                if key not in self._known:
                    are = [each.stride() for each in found]
                    self._known[key] = are if passes(partial(_gives_its_bits, own, args, are)) else None
                strides = self._known[key]
                if strides is not None and not _are_same(rotated(strides, *args), found):
                    self._known[key] = None
            return found

        return noting

    @contextmanager
    def captured(self) -> Iterator[None]:
        """Have a step that is captured launch the kernel."""
        with _instead(self._files, self._fusing):
            yield

    def _fusing(self, own: _Rotate) -> _Rotate:
        def fusing(*args: Any, **kwargs: Any) -> Any:
            strides = self._known.get(_key(own, args)) if _suits(args, kwargs) else None
            return own(*args, **kwargs) if strides is None else rotated(strides, *args)

        return fusing


def _files_of(model: nn.Module) -> list[dict[str, Any]]:
    """Return the names of the files in which a module's forward calls a function that rotates."""
    found = {}
    for kind in {type(module) for module in model.modules()}:
        own: Any = getattr(kind, "forward", None)  # TorchScript's has none
        forward = inspect.unwrap(own)
        if isinstance(forward, FunctionType) and NAME in forward.__code__.co_names and NAME in forward.__globals__:
            found[id(forward.__globals__)] = forward.__globals__
    return [*found.values()]


def _suits(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if len(args) != 4 or kwargs or not all(isinstance(each, torch.Tensor) for each in args):
        return False
    q, k, cos, sin = args
    width = q.shape[-1]
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and len({(each.dtype, each.device) for each in args}) == 1
        and all(each.stride(-1) == 1 for each in args)
        and q.dim() == 4
        and q.shape[2] == 1
        and k.shape == (q.shape[0], k.shape[1], 1, width)
        and cos.shape == sin.shape
        and cos.shape in [(rows, 1, columns) for rows in (1, q.shape[0]) for columns in (width, width // 2)]
        and width % 2 == 0
    )


def _is_pair_like(found: Any, args: tuple[Any, ...]) -> bool:
    return (
        isinstance(found, tuple)
        and len(found) == 2
        and all(isinstance(each, torch.Tensor) for each in found)
        and all(one.shape == x.shape and one.dtype == x.dtype for one, x in zip(found, args, strict=False))
        and all(each.stride(-1) == 1 for each in found)
    )


def _key(own: _Rotate, args: tuple[Any, ...]) -> Any:
    return own, tuple((each.shape, each.stride(), each.dtype) for each in args)


def _kind(x: torch.Tensor) -> Any:
    return {"dtype": x.dtype, "device": x.device}


def _are_same(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    return all(map(has_bits_of, one, other))


def _gives_its_bits(own: _Rotate, args: tuple[Any, ...], strides: Strides) -> bool:
    """Try random queries, keys and tables: at a first position, all angles may be zero."""
    rotated(strides, *args)  # it may not run
    draw = torch.Generator(args[0].device).manual_seed(0)
    given: Any = [torch.randn(each.shape, generator=draw, device=each.device).to(each.dtype) for each in args]
    kept = [each.clone() for each in given]  # a function that writes to what it is given does more than the kernel
    return _are_same((*rotated(strides, *given), *kept), (*own(*given), *given))


class _Dispatcher:
    """Takes the place of a function of a file, in the threads that have another one computed instead."""

    def __init__(self, own: _Rotate) -> None:
        self.own, self.of_threads = own, dict[int, _Rotate]()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.of_threads.get(get_ident(), self.own)(*args, **kwargs)


_lock = threading.Lock()  # held while a name of a file changes, which all models and threads share


@contextmanager
def _instead(files: list[dict[str, Any]], make: Callable[[_Rotate], _Rotate]) -> Iterator[None]:
    with ExitStack() as stack:
        for names in files:
            stack.enter_context(_replaced(names, make))
        yield


@contextmanager
def _replaced(names: dict[str, Any], make: Callable[[_Rotate], _Rotate]) -> Iterator[None]:
    thread, there = get_ident(), list[_Dispatcher]()
    try:
        with _lock:
            if not isinstance(names[NAME], _Dispatcher):
                names[NAME] = _Dispatcher(names[NAME])
            there.append(names[NAME])
            names[NAME].of_threads[thread] = make(names[NAME].own)
        yield
    finally:
        with _lock:
            for dispatcher in there:
                dispatcher.of_threads.pop(thread, None)
                if not dispatcher.of_threads and names.get(NAME) is dispatcher:
                    names[NAME] = dispatcher.own
