"""Recognizes subclasses of nn.Linear that compute exactly what it does: a quantized layer may replace them.

Falcon's layers write out nn.Linear's arithmetic, those of OpenAI's Whisper cast the weight to the input's dtype, others
only have their own constructor. Three checks recognize them. Their forward is run on small weights and compared with
nn.Linear's: this rejects one that scales, adds noise or returns a tuple. The attributes that it reads are recorded:
this rejects one that depends on other state of the instance, such as a scale that is usually 1. And the class must not
have public methods that other modules may call.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Iterator, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.nn import functional

from .weight_readers import names_in

_IN, _OUT = 6, 4
# The attributes that the output may depend on.
_VALUES = {"weight", "bias", "in_features", "out_features"}
_LINEAR_ATTRIBUTES = vars(nn.Linear(1, 1, device="meta")).keys()
# Methods that are not called once the layer has its weight.
_UNUSED_AFTER_LOADING = re.compile(r"__init__|__repr__|extra_repr|_*reset_parameters|_*init_.*")


def acts_as_linear(module: nn.Module) -> bool:
    """Whether an instance of a subclass of nn.Linear computes exactly what nn.Linear does. The instance is not run.

    A module with hooks is rejected: they may change its output, or depend on this very object.
    """
    names = _names_used(type(module), type(module).forward)  # type: ignore[arg-type]
    own, weight = vars(module), module._parameters.get("weight")
    return (
        names is not None
        and names.isdisjoint(own.keys() - _LINEAR_ATTRIBUTES)
        and weight is not None
        and (own.get("out_features"), own.get("in_features")) == tuple(weight.shape)
        and not any(value for name, value in own.items() if "_hook" in name and isinstance(value, dict))
    )


def class_acts_as_linear(cls: type[nn.Module]) -> bool:
    """Whether instances of a class compute exactly what nn.Linear does, unless their own attributes change it."""
    return _names_used(cls, cls.forward) is not None  # type: ignore[arg-type]


@functools.cache  # the forward is part of the key, as it may be patched
def _names_used(cls: type[nn.Module], forward: Any) -> frozenset[str] | None:
    """Return the names that a class's forward uses; None if it does not compute exactly what nn.Linear does."""
    bases = [base for base in cls.__mro__ if base not in nn.Linear.__mro__]
    own = [(name, value) for base in bases for name, value in vars(base).items()]
    # A metaclass, or __init_subclass__, could do anything when a class is derived from it.
    if not issubclass(cls, nn.Linear) or type(cls) is not type or any(name == "__init_subclass__" for name, _ in own):
        return None
    try:
        used = _names_in_use(forward, own)
        if not _takes_one_input(forward) or not all(_is_replaceable(name, value, used) for name, value in own):
            return None
        read = _attributes_read_if_same(cls, forward)
    except Exception:  # the class's code may raise anything, as its constructor has not run
        return None
    methods = {name for name, value in own if isinstance(value, FunctionType)}
    return None if read is None or read - _VALUES - methods else frozenset(used | read) - _VALUES


def _takes_one_input(forward: Any) -> bool:
    parameters = inspect.signature(forward).parameters.values()
    return len(parameters) == 2 and all(one.kind <= one.POSITIONAL_OR_KEYWORD for one in parameters)


def _names_in_use(forward: Any, own: Sequence[tuple[str, Any]]) -> set[str]:
    """Return the names that a forward uses, and those that the methods it calls use."""
    used: set[str] = set()
    waiting = [forward, *(value for name, value in own if name == "forward")]  # it may call its parent's forward
    while waiting:
        function = inspect.unwrap(waiting.pop())
        if isinstance(function, FunctionType):
            new = names_in(function.__code__) - used
            used |= new
            waiting += [value for name, value in own if name in new]
    return used


def _is_replaceable(name: str, value: Any, used: set[str]) -> bool:
    """Whether no other code needs this attribute of a class once a quantized layer replaces it.

    Other code may call public methods, but not private ones, nor does it need those that only the forward calls.
    """
    if name == "forward":
        return True
    if isinstance(value, FunctionType):
        is_new = not hasattr(nn.Linear, name)
        return bool(_UNUSED_AFTER_LOADING.fullmatch(name)) or (is_new and (name.startswith("_") or name in used))
    return name.startswith("__") and name.endswith("__")


def _attributes_read_if_same(cls: type[nn.Module], forward: Any) -> set[str] | None:
    """Run a class's forward. Return the attributes that it read, or None if its values are not nn.Linear's."""
    read: set[str] = set()

    def reading(layer: nn.Module, name: str) -> Any:
        read.add(name)
        return object.__getattribute__(layer, name)

    watched = type(cls.__name__, (cls,), {"__getattribute__": reading})
    # Independent of the caller's default device, autocast, grad mode and random state.
    with (
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=[]),
    ):
        kinds = [(dtype, has_bias) for dtype in (torch.float32, torch.bfloat16) for has_bias in (True, False)]
        is_same = all(_is_same(watched, forward, x, has_bias) for dtype, has_bias in kinds for x in _inputs(dtype))
    return read if is_same else None


def _inputs(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yield inputs of one to four dimensions, of small values too, and with infinities and NaN that clipping alters."""
    for shape in ((_IN,), (5, _IN), (2, 3, _IN), (2, 2, 3, _IN)):
        x = torch.linspace(-1, 1, math.prod(shape)).view(shape)
        yield from (x.to(dtype), (x * 1e-3).to(dtype))
    for special in (math.inf, -math.inf, math.nan):
        x = torch.ones(3, _IN, dtype=dtype)
        x[1, 2] = special
        yield x


def _is_same(cls: type[nn.Module], forward: Any, x: torch.Tensor, has_bias: bool) -> bool:
    """Whether a forward returns what nn.Linear's does, and uses only torch's own autograd functions."""
    # No weight is zero: zero times infinity is NaN.
    weight = nn.Parameter(torch.linspace(-1, 1.1, _OUT * _IN).view(_OUT, _IN).to(x.dtype))
    bias = nn.Parameter(torch.linspace(0.3, -0.7, _OUT).to(x.dtype)) if has_bias else None
    layer = object.__new__(cls)  # without its constructor, whose arguments are unknown
    for name, value in {"weight": weight, "bias": bias, "in_features": _IN, "out_features": _OUT}.items():
        object.__setattr__(layer, name, value)
    tracked = x.clone().requires_grad_()
    out: Any = forward(layer, tracked)
    if type(out) is not torch.Tensor or out.dtype != x.dtype or not _gradients_reach([tracked, weight], out):
        return False
    with torch.no_grad():
        expected = functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    # Tolerate a few roundings: of the product, and of the sum with the bias.
    rounding = 4 * torch.finfo(x.dtype).eps
    largest = float(expected.nan_to_num(0, 0, 0).abs().max())
    same = functools.partial(torch.allclose, rtol=rounding, atol=rounding * largest, equal_nan=True)
    return out.shape == expected.shape and same(out.detach().float(), expected)


def _gradients_reach(tensors: Sequence[torch.Tensor], out: torch.Tensor) -> bool:
    """Whether the autograd graph of a result reaches all tensors, without a custom `autograd.Function`.

    The graph is walked, not run: torch's autograd engine starts threads, and a process forked later could not use it.
    """
    waiting, found, reached = [out.grad_fn], set[Any](), set[int]()
    while waiting:
        node = waiting.pop()
        if isinstance(node, BackwardCFunction):
            return False
        if node is not None and node not in found:
            found.add(node)
            reached.add(id(getattr(node, "variable", None)))
            waiting += [before for before, _ in node.next_functions]
    return all(id(tensor) in reached for tensor in tensors)
