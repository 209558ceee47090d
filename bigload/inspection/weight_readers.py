"""Finds modules that read a child's weight without calling the child's forward, which may make it wrong to quantize.

Mamba's mixer multiplies by `self.dt_proj.weight` itself, for instance; in a quantized layer that would be packed bytes.
A vision tower casts its input to `self.proj.weight.dtype`, which would be uint8. The methods of each module, and the
functions that they pass children to, are searched for such reads.
"""

from __future__ import annotations

import dis
import functools
import re
from collections.abc import Iterable, Iterator, Set
from contextlib import suppress
from itertools import pairwise
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from .outer_names import is_a, unwrapped
from .weight_names import CASTS
from .weight_reads import Read, reads_of, reads_of_own

# Methods that run before the weights are loaded, that replace them, or that only describe the module.
# (diffusers' `fuse_projections`, which only users call, makes one plain layer of several, which fails if quantized.)
_NO_FORWARD = re.compile(
    r"__init__|_*(re)?init(iali[sz]e.*|_.*)?|_*reset_parameters|_*tie_.*|_*resize_.*|__repr__|extra_repr|fuse_projections"
)
# torch's encoder layer reads weights only in its fused path, which loading disables.
_NOT_READING = (nn.Module, nn.TransformerEncoderLayer, nn.TransformerEncoder)
# Base classes of models, which only ask for the dtype of floating parameters.
_LIBRARIES = re.compile(
    r"(transformers\.(modeling_utils|generation|integrations|utils)|diffusers\.models\.modeling_utils|peft)\b"
)

_BY_TEXT = ("getattr", "get_parameter", "_parameters")
_BY_LIST = frozenset({"named_parameters", "state_dict", "functional_call"})
_MAX_DECORATORS = 3
_USUAL_ATTRIBUTES = frozenset(vars(nn.Module()))


class Reader(NamedTuple):
    """A module whose methods may read weights of its children.

    Attributes:
        owner: the module.
        methods: those to search.
        held: names and classes of its attributes, children among them, whose methods may read weights.
        own: functions that it holds itself, such as hooks, each with its first arguments.
    """

    owner: nn.Module
    methods: tuple[FunctionType, ...]
    held: tuple[tuple[str, type], ...]
    own: tuple[tuple[FunctionType, tuple[Any, ...]], ...] = ()

    def reads(self, stored: torch.dtype | None = None) -> Iterator[Read]:
        """Yield what the methods read of the children's weights (values, dtype or shape), or that they cast.

        Reads under an `if` that is false for this instance do not count. If the source of a method is not available,
        but it uses the name `weight`, every child that it names counts.

        Args:
            stored: the dtype that a quantized weight shows. A read that is guarded against it does not count.
        """
        cls: Any = type(self.owner)
        run = _run_by_forward(cls)
        for method in self.methods:
            found = reads_of(method, self.owner, self.held, stored, is_run=method in run)
            yield from _children_named(method, self.owner) if found is None else found
        for function, passed in self.own:
            yield from reads_of_own(function, self.owner, passed, stored)

    def paths_read(self) -> set[str]:
        """Return the paths, from the owner, of the modules whose weight's values the owner's own methods read."""
        read = {read.module for read in self.reads() if read.what == "values"}
        return {path for path, module in self.owner.named_modules(remove_duplicate=False) if module in read}


def reader(owner: nn.Module) -> Reader | None:
    """Return what must be searched of a module; None if its methods read no weight."""
    cls: Any = type(owner)
    is_bare = not (owner._modules or owner._forward_pre_hooks or owner._forward_hooks)
    if is_bare and cls.__module__.startswith("torch."):
        return None
    if isinstance(owner, torch.jit.ScriptModule):
        return None  # its code is torch's, and its layers stay as they are
    methods = _methods_reading(cls)
    attributes = vars(owner)
    functions = [
        *(_own_function(hook, (owner,)) for hooks in _hooks_of(owner) for hook in hooks.values()),
        *(
            _own_function(attributes[name], ())
            for name in attributes.keys() - _USUAL_ATTRIBUTES
            if callable(attributes[name])
        ),
    ]
    kept = tuple(function for function in functions if function is not None)
    named = _names_of_attributes(cls)
    own = {name: attributes[name] for name in named.intersection(attributes)}
    own |= {name: owner._modules[name] for name in named.intersection(owner._modules)}
    held = [name for name in own if _is_reading_class(own[name].__class__)]
    if held:
        users = [method for _, method in _methods_in_question(cls) if names_in(method.__code__).intersection(held)]
        methods = tuple(dict.fromkeys([*methods, *users]))
    if not methods and not kept:
        return None
    return Reader(owner, methods, tuple((name, own[name].__class__) for name in held), kept)


def _hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    return module._forward_pre_hooks, module._forward_hooks


def _own_function(value: Any, passed: tuple[Any, ...]) -> tuple[FunctionType, tuple[Any, ...]] | None:
    """Return a function that a module holds, without what is bound to it, if it may read weights."""
    while is_a(value, functools.partial, MethodType):
        bound = value.args if is_a(value, functools.partial) else (value.__self__,)
        value, passed = (value.func if is_a(value, functools.partial) else value.__func__), (*bound, *passed)
    return (value, passed) if _is_reader(value) else None


def names_used(modules: Iterable[nn.Module], name: str) -> bool:
    """Whether any method of the modules' classes names this attribute, except a method of this name itself."""
    classes = {cls for module in modules for cls in type(module).__mro__ if cls is not nn.Module}
    methods = (method for cls in classes for own, method in _methods(cls) if own != name)
    return any(name in names_in(method.__code__) for method in methods)


def _children_named(method: FunctionType, owner: nn.Module) -> Iterator[Read]:
    names = names_in(method.__code__)
    return (Read(child, "values") for name, child in owner._modules.items() if child is not None and name in names)


def _methods(cls: type) -> Iterator[tuple[str, FunctionType]]:
    for name, member in vars(cls).items():
        for function in _functions_of(member):
            yield name, function


def _functions_of(member: Any, depth: int = 0) -> Iterator[FunctionType]:
    """Yield a method's function, with that which a decorator keeps."""
    if is_a(member, property):
        member = member.fget
    elif is_a(member, functools.cached_property, functools.partialmethod):
        member = member.func
    elif is_a(member, classmethod, staticmethod):
        member = member.__func__
    function = unwrapped(member)
    if function is None:
        return
    yield function
    for cell in (function.__closure__ or ()) if depth < _MAX_DECORATORS else ():
        with suppress(ValueError):  # not assigned yet
            if isinstance(cell.cell_contents, FunctionType):
                yield from _functions_of(cell.cell_contents, depth + 1)


@functools.cache
def _methods_in_question(cls: Any) -> tuple[tuple[str, FunctionType], ...]:
    """Return the methods of a class and its bases that run once the weights are loaded."""
    bases = [base for base in cls.__mro__ if issubclass(base, nn.Module) and base not in _NOT_READING]
    own = [base for base in bases if not _LIBRARIES.match(base.__module__)]
    return tuple((name, m) for base in own for name, m in _methods(base) if not _NO_FORWARD.fullmatch(name))


@functools.cache
def _run_by_forward(cls: Any) -> frozenset[FunctionType]:
    """Return the methods that a forward may call, by the names in its code and in theirs."""
    waiting, run = dict(enumerate(_methods_in_question(cls))), set[FunctionType]()
    names = frozenset({"forward", "__call__"})
    while found := [key for key, (name, _) in waiting.items() if name in names]:
        called = [waiting.pop(key)[1] for key in found]
        run.update(called)
        names = names.union(*(names_in(method.__code__) for method in called))
    return frozenset(run)


@functools.cache
def _names_of_attributes(cls: Any) -> frozenset[str]:
    """Return the names that the methods use, among them those of an instance's own attributes."""
    return (
        frozenset().union(*(names_in(method.__code__) for _, method in _methods_in_question(cls))) - _USUAL_ATTRIBUTES
    )


@functools.cache
def _methods_reading(cls: Any) -> tuple[FunctionType, ...]:
    """Return the methods to search: few name a weight, and looking at names is much faster than parsing."""
    methods = _methods_in_question(cls)
    reading = {
        name for name, method in methods if (_may_read(method) and not _reads_only_own(method)) or _casts_part(method)
    }
    return tuple(method for name, method in methods if name in reading or _calls_reader(method, reading))


@functools.cache
def _is_reading_class(cls: Any) -> bool:
    """Whether instances of a class may read weights when they are called, of modules that they are passed."""
    if issubclass(cls, nn.Module):
        forward = getattr(cls, "forward", None)
        return _is_reader(forward) and not _reads_only_own(forward)
    return any(map(_is_reader, vars(cls).values()))


def _calls_reader(method: FunctionType, reading: Set[str]) -> bool:
    names = names_in(method.__code__)
    if not names.isdisjoint(reading):
        return True
    called = [method.__globals__[name] for name in names if name in method.__globals__]
    inner = [vars(one).get(name) for one in called if is_a(one, ModuleType) for name in names]
    return any(map(_is_reader, [*called, *inner]))


def _is_reader(called: Any) -> bool:
    is_own = is_a(called, FunctionType) and not (called.__module__ or "").startswith("torch.")
    return is_own and _may_read(called)


def _may_read(function: FunctionType) -> bool:
    """Whether a function may read weights, by the names in its code."""
    names = names_in(function.__code__)
    return "weight" in names or not names.isdisjoint(_BY_LIST) or _reads_by_text(function.__code__)


def _reads_by_text(code: CodeType) -> bool:
    names = names_in(code)
    texts = code.co_consts if not names.isdisjoint(_BY_TEXT) else ()
    return any(isinstance(text, str) and text.endswith("weight") for text in texts) or "parameters" in names


@functools.cache
def _reads_only_own(method: FunctionType) -> bool:
    """Whether a method's only use of the name `weight` is `self.weight`, as in a norm: parsing it would take longer."""
    code = method.__code__
    if any(isinstance(constant, CodeType) for constant in code.co_consts) or _reads_by_text(code):
        return False
    if not _BY_LIST.isdisjoint(code.co_names):
        return False
    steps = list(dis.get_instructions(code))
    before = [prior for prior, step in pairwise(steps) if step.argval == "weight" and step.opname == "LOAD_ATTR"]
    return all(prior.opname.startswith("LOAD_FAST") and prior.argval == "self" for prior in before)


@functools.cache
def _casts_part(method: FunctionType) -> bool:
    """Whether a method may cast a child, as by `self.child.to(...)`."""
    code = method.__code__
    if names_in(code).isdisjoint(CASTS):
        return False
    called = pairwise(dis.get_instructions(code))
    return any(prior.opname == "LOAD_ATTR" and step.argval in CASTS for prior, step in called)


@functools.cache
def names_in(code: CodeType) -> frozenset[str]:
    """Return the names of globals and attributes in a function's code, and in the functions inside it."""
    inner = (names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(*inner)
