"""Norms in captured steps: one kernel each, where a model launches eight, which take longer to begin than to run.

A norm is taken for one if it has a weight, an epsilon and no more than plain settings beside, and if the kernel gives
the bits of its own forward: for what it is given when a step runs as before, and for random rows of that shape and a
random weight, once for norms of the same code and settings. So it may add up squares in no order but torch's, whose
kernel (ATen/native/cuda/Reduce.cuh) has each thread add every n-th value, or every n-th four, into four sums, and adds
those, then halves of the threads. Up to 2.9 or so, the last 32 threads were added by pairs of neighbours, and rows of
128 values were not read in fours: a trial tells which way this torch goes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from types import FunctionType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from ...hardware.devices import current_gpu
from ...quantization.expert_launches import next_power_of_2
from .trials import has_bits_of, kernels, passes, runs_kernels

# Of torch's kernel: threads of a block and of a warp.
_BLOCK, _WARP = 512, 32
# Of each kind of torch, newest first: the width from which each thread reads four values at once, and down to how many
# threads halves are added, not pairs.
_KINDS = ((128, 1), (129, 1), (129, _WARP))
# Of rows in float32: each shows another order with a chance of one in twelve or more.
_DRAWS = 128
_EPSILONS = ("variance_epsilon", "eps")
# Attributes of torch's own that say nothing of a norm; and of what kind others may be, by which its code may go.
_OWN = frozenset(vars(nn.Module())) - {"training"}
_PLAIN = (bool, int, float, str, type(None), torch.dtype)
# Of each model, the orders that were right: it is captured again for each length of a cache.
_right: WeakKeyDictionary[nn.Module, dict[Any, Order]] = WeakKeyDictionary()


class Order(NamedTuple):
    """How torch adds up a row.

    Attributes:
        threads: of the row.
        turns: in which each of them reads four values.
        are_fours: whether these lie side by side; else `threads` apart.
        halvings: how often the sums of half of the threads are added to those of the others, before pairs are added.
    """

    threads: int
    turns: int
    are_fours: bool
    halvings: int


def orders_of(rows: int, width: int) -> list[Order]:
    """Return how torch may add up each of some rows of float32, the newest way first; none if in another way still."""
    found = (_order_of(rows, width, fours_from, halved_to) for fours_from, halved_to in _KINDS)
    return [order for order in dict.fromkeys(found) if order is not None]


def _order_of(rows: int, width: int, fours_from: int, halved_to: int) -> Order | None:
    are_fours = width >= fours_from
    if are_fours and width % 4:
        return None
    most = _power_of_2(min(width // 4 if are_fours else width, _BLOCK))
    at_once = min(_power_of_2(min(rows, _BLOCK)), _BLOCK // min(most, _WARP))
    threads = min(most, _BLOCK // at_once)
    if -(-width // threads) >= 16 * at_once > 16:
        return None  # divided among warps too
    halvings = max(0, threads.bit_length() - halved_to.bit_length())
    return Order(threads, -(-width // (4 * threads)), are_fours, halvings)


def fused_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, order: Order) -> torch.Tensor:
    """Return `weight * (x * rsqrt(mean(x ** 2) + eps))`, computed in float32, the bracket rounded to the dtype of x.

    Args:
        x: (..., width), in 16 bit, or, in a trial, float32; contiguous.
        weight: (width,), of the same dtype.
        eps: added to the mean.
        order: in which squares are added.
    """
    out, width = torch.empty_like(x), x.shape[-1]
    block = next_power_of_2(width)
    warps = min(max(1, order.threads // 128, block // 1024), 8)
    pairings = order.threads.bit_length() - 1 - order.halvings
    with current_gpu(x.device):  # on which Triton launches
        kernels().rms_norm[(x.numel() // width,)](
            x,
            weight,
            out,
            eps,
            _share(width),
            width,
            order.threads,
            order.turns,
            order.are_fours,
            order.halvings,
            pairings,
            block,
            num_warps=warps,
            enable_fp_fusion=False,  # torch rounds squares before it adds them
        )
    return out


class Norms:
    """The norms of a model, and with which shapes the kernel computes them."""

    def __init__(self, model: nn.Module) -> None:
        self._all = {module: kind for module in model.modules() if (kind := _kind(module)) is not None}
        self._fused: dict[tuple[int, Any], Order] = {}
        self._right = _right.setdefault(model, {})
        self._known: dict[Any, Order | None] = {**self._right}

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Find out where the kernel gives the bits of a step, which is run as before."""
        with _replaced({module: self._noting(module) for module in self._all}):
            yield

    def _noting(self, module: Any) -> Callable[..., Any]:
        own, thread = module.forward, get_ident()

        def noting(*args: Any, **kwargs: Any) -> Any:
            found = own(*args, **kwargs)
            if get_ident() == thread and len(args) == 1 and not kwargs and _suits(args[0], module.weight, found):
                self._note(module, args[0], found)
            return found

        return noting

    def _note(self, module: Any, x: torch.Tensor, found: torch.Tensor) -> None:
        key = _key(x)
        kind = (self._all[module], x.device, key)
        is_known = kind in self._known
        orders = [self._known[kind]] if is_known else orders_of(x.numel() // x.shape[-1], x.shape[-1])
        order = next((each for each in orders if each and _is_right(module, x, found, each, is_known)), None)
        self._known[kind] = order  # None if it is used once more
        if order is not None:
            self._fused[id(module), key] = self._right[kind] = order
        else:
            self._right.pop(kind, None)
            self._fused.pop((id(module), key), None)

    @contextmanager
    def captured(self) -> Iterator[None]:
        """Have a step that is captured launch the kernel."""
        own = [module for module, kind in self._all.items() if _kind(module) == kind]  # the others were changed since
        with _replaced({module: self._fusing(module) for module in own}):
            yield

    def _fusing(self, module: Any) -> Callable[..., Any]:
        own, thread = module.forward, get_ident()

        def fusing(*args: Any, **kwargs: Any) -> Any:
            is_one = get_ident() == thread and len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor)
            order = self._fused.get((id(module), _key(args[0]))) if is_one else None
            if order is None:
                return own(*args, **kwargs)
            return _by_kernel(module, args[0], order)

        return fusing


def _kind(module: Any) -> Any:
    """Return what a norm's code computes by, its weight aside; None of a module that is none.

    It is remembered beside a model, which it must not keep alive: code may know the model.
    """
    is_norm = (
        list(module._parameters) == ["weight"]
        and not module._buffers
        and not module._modules
        and isinstance(module.weight, torch.Tensor)
        and module.weight.dim() == 1
        and isinstance(getattr(type(module), "forward", None), FunctionType)
        and _epsilon(module) is not None
    )
    settings = {name: value for name, value in vars(module).items() if name not in _OWN} if is_norm else {}
    if not settings or not all(map(_is_plain, settings.values())):  # as a forward that was set on it is not
        return None
    own = type(module)
    return ref(own), ref(own.forward), tuple((name, repr(value)) for name, value in sorted(settings.items()))


def _is_plain(value: Any) -> bool:
    return all(type(each) in _PLAIN for each in (value if isinstance(value, tuple) else (value,)))


def _epsilon(module: Any) -> float | None:
    found = (vars(module).get(name) for name in _EPSILONS)
    return next((value for value in found if isinstance(value, float)), None)


def _by_kernel(module: Any, x: torch.Tensor, order: Order) -> torch.Tensor:
    eps = _epsilon(module)
    assert eps is not None
    return fused_norm(x, module.weight, eps, order)


def _key(x: torch.Tensor) -> Any:
    return tuple(x.shape), x.dtype, x.is_contiguous()


def _suits(x: Any, weight: torch.Tensor, found: Any) -> bool:
    if not isinstance(x, torch.Tensor) or not isinstance(found, torch.Tensor):
        return False
    is_alike = x.dtype == weight.dtype == found.dtype and x.dtype in (torch.bfloat16, torch.float16)
    return (
        is_alike
        and x.shape[-1:] == weight.shape
        and x.shape == found.shape
        and x.is_contiguous()
        and weight.is_contiguous()
        and x.device == weight.device
        and runs_kernels(x.device)
    )


def _is_right(module: Any, x: torch.Tensor, found: torch.Tensor, order: Order, is_known: bool) -> bool:
    """Whether the kernel gives what a norm found, and, where it is not known to, what such norms find in trials.

    What it found comes first: in a trial, code that draws random numbers would draw those of the step.
    """

    def gives_its_bits() -> bool:
        return has_bits_of(_by_kernel(module, x, order), found) and (is_known or _gives_its_bits(module, x, order))

    return passes(gives_its_bits)


def _gives_its_bits(module: Any, x: torch.Tensor, order: Order) -> bool:
    """Try rows of several magnitudes, as many as there are, and many in float32.

    A sum in another order differs in its last bit, in some rows. In 16 bit, hardly any value shows that. The weight is
    drawn, too: with one of ones, which may be written to later, it does not show what is rounded before it is
    multiplied.
    """
    draw = torch.Generator(x.device).manual_seed(0)
    weight = torch.randn(x.shape[-1], generator=draw, device=x.device)
    for dtype, magnitudes in ((x.dtype, (1.0, 1e-3, 30.0)), (torch.float32, (1.0,) * _DRAWS)):
        twin = _twin(module, weight.to(dtype))
        for magnitude in magnitudes:
            rows = torch.randn(x.shape, generator=draw, device=x.device).mul_(magnitude).to(dtype)
            by_kernel, kept = _by_kernel(twin, rows, order), rows.clone()
            if not has_bits_of(by_kernel, twin.forward(rows)) or not has_bits_of(rows, kept):
                return False  # one that writes to what it is given does more than the kernel
    return True


def _twin(module: Any, weight: torch.Tensor) -> Any:
    """Return a norm of the same kind with another weight."""
    twin = copy.copy(module)
    vars(twin).pop("forward", None)
    twin._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    return twin


@contextmanager
def _replaced(forwards: dict[nn.Module, Any]) -> Iterator[None]:
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module in forwards:
            vars(module).pop("forward", None)


@functools.cache
def _share(width: int) -> float:
    """Return 1 / width in float32."""
    return float(torch.ones((), dtype=torch.float32, device="cpu") / width)


def _power_of_2(number: int) -> int:
    """Return the largest power of 2 that is not above a number from 1 on."""
    return 1 << (number.bit_length() - 1)
