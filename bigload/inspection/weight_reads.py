"""Finds what one function reads of the weights of a module's children, in its syntax tree.

Recognised are `self.child.weight`, also through a local name, `getattr`, a loop over a list of children, or a function
that the child is passed to; and `next(module.parameters())`. Code that casts a child, as by `self.child.float()`, asks
for weights of this dtype, which a quantized layer would not have.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from .outer_names import globals_with_layers
from .weight_names import EVERYTHING, Names, Path, Paths, as_direct, resolved

# Attributes and methods of a weight that say the same of a quantized one, or are asked to find out whether it is one.
_HARMLESS = {"device", "dim", "ndim", "is_meta", "is_cuda", "requires_grad", "requires_grad_", "is_floating_point"}
_SHAPE = {"shape", "size", "numel", "nelement"}
# Of a dtype, what only asks which kind it is.
_GUARDS = {"is_floating_point", "is_complex", "is_signed"}
_ASKING = {"isinstance", "hasattr", "type", "id", "is_floating_point"}
_INITIAL = {"normal_", "uniform_", "zero_", "fill_"}
_ENDS = (ast.Return, ast.Raise, ast.Continue, ast.Break)
_MAX_DEPTH = 3


class Read(NamedTuple):
    """What a function reads of a child's weight.

    Attributes:
        module: the child.
        what: "values", "dtype", "shape" or "cast", for code that casts the weight itself.
        getter: the name of the function, if it only returns the dtype to whoever calls it.
    """

    module: nn.Module
    what: str
    getter: str | None = None


class _Found(NamedTuple):
    """A read in the code of a class: of the children on a path, for owners whose conditions are not false."""

    path: Path
    what: str
    getter: str | None
    conditions: tuple[Callable[[nn.Module], bool | None], ...]


def reads_of(
    function: FunctionType,
    owner: nn.Module,
    held: tuple[tuple[str, type], ...],
    stored: torch.dtype | None,
    *,
    is_run: bool,
) -> list[Read] | None:
    """List what a method of a module reads of its children's weights.

    Args:
        function: the method; its first argument is the owner.
        owner: the module.
        held: names and classes of the owner's callable attributes that are no modules.
        stored: the dtype that a quantized weight shows, with which guards such as `!= torch.int8` are decided.
        is_run: whether the owner's forward may call it. Only then lists of parameters count, which other methods count,
            save or freeze.

    Returns:
        None if the function's source is not available.
    """
    cls: Any = type(owner)
    found = _in_class(function, cls, held, stored, is_run=is_run)
    if found is None:
        return None
    possible = (read for read in found if not any(condition(owner) is False for condition in read.conditions))
    return [
        Read(child, read.what, read.getter)
        for read in possible
        for child in resolved(owner, read.path)
        if child is not owner
    ]


def reads_of_own(
    function: FunctionType, owner: nn.Module, passed: tuple[Any, ...], stored: torch.dtype | None
) -> list[Read]:
    """List what a function that one module holds, such as a hook or a lambda, reads of modules' weights.

    Args:
        function: the function.
        owner: the module.
        passed: its first arguments, where they are known.
        stored: as for `reads_of`.
    """
    tree = parsed(function)
    if tree is None:
        return []
    named = [*zip(function.__code__.co_varnames, passed, strict=False)]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not assigned yet
            named.append((name, cell.cell_contents))
    bound = _of_globals(function) | {name: {(value,)} for name, value in named if isinstance(value, nn.Module)}
    scope = _Scope(function.__name__, function.__globals__, type(owner), {}, stored, has_self=False, depth=1)
    return [
        Read(child, read.what) for read in _Function(scope, tree, bound).reads() for child in resolved(owner, read.path)
    ]


@functools.cache  # the search takes milliseconds, and a model has many modules of a class
def _in_class(
    function: FunctionType, cls: type, held: tuple[tuple[str, type], ...], stored: torch.dtype | None, *, is_run: bool
) -> tuple[_Found, ...] | None:
    tree = parsed(function)
    arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
    if tree is None:
        return None
    scope = _Scope(function.__name__, function.__globals__, cls, dict(held), stored, has_self=True, is_run=is_run)
    bound: dict[str, Paths] = {**_of_globals(function), **({arguments[0]: {()}} if arguments else {})}
    return tuple(dict.fromkeys(_Function(scope, tree, bound).reads()))


def _of_globals(function: FunctionType) -> dict[str, Paths]:
    return {name: {(found,)} for name, found in globals_with_layers(function).items()}


class _Scope(NamedTuple):
    """Where the names in a function's code come from.

    Attributes:
        name: of the function.
        names: the globals of its file.
        cls: the class of the owner.
        held: the classes of the owner's callable attributes that are no modules, by name.
        stored: the dtype that a quantized weight shows.
        has_self: the function calls the owner `self`.
        depth: how many calls led to it.
        is_run: lists of parameters count.
    """

    name: str
    names: dict[str, Any]
    cls: type
    held: dict[str, type]
    stored: torch.dtype | None
    has_self: bool
    depth: int = 0
    is_run: bool = True


def parsed(function: FunctionType) -> ast.AST | None:
    """Return the syntax tree of a function; None if its source is not available."""
    return _parsed(function.__code__)


@functools.cache  # by code, which holds no model as the closure of a function may
def _parsed(code: CodeType) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):  # defined at a prompt, or generated
        return None


class _Function:
    """The reads in one function, some of whose names stand for the owner or its children."""

    def __init__(self, scope: _Scope, tree: ast.AST, bound: Mapping[str, Paths]) -> None:
        self._scope, self._tree, self._names = scope, tree, Names(tree, bound, scope.stored, lists=scope.is_run)
        self._conditions: list[Callable[[nn.Module], bool | None]] = []  # of the code that is being searched

    def reads(self) -> Iterator[_Found]:
        """Yield the reads. Assignments to a weight do not count, nor what asks for a fact that stays the same."""
        yield from self._under(self._tree)

    def _under(self, node: ast.AST) -> Iterator[_Found]:
        if isinstance(node, ast.Attribute) and (
            weight := self._names.weight(node.value) | self._names.first_parameter(node.value)
        ):
            yield from self._fact(node.attr, weight, is_first=not self._names.weight(node.value))
        elif isinstance(node, ast.Attribute) and node.attr in _GUARDS and self._names.dtype_read(node.value):
            return
        elif dtype := self._names.dtype_read(node):
            yield from self._found(dtype, "dtype")
        elif (weight := self._names.weight(node)) and isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
            yield from self._found(weight, "values")
        elif not isinstance(node, ast.Name) and (first := self._names.first_parameter(node)):
            yield from self._of_first(first)
        elif isinstance(node, (ast.Raise, ast.JoinedStr)):
            return
        elif isinstance(node, (ast.For, ast.comprehension)):
            yield from self._loop(node)
        elif listed := self._names.listing(node):
            yield from self._found({(*path, EVERYTHING) for path in listed}, "values")
        elif isinstance(node, ast.Compare):
            for operand in (node.left, *node.comparators):
                if not self._names.dtype_read(operand):
                    yield from self._under(operand)
        elif isinstance(node, ast.Return) and node.value is not None and (dtype := self._names.dtype_read(node.value)):
            name = self._scope.name if self._scope.depth == 0 else None
            yield from self._found(dtype, "dtype", name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and self._only_names(node):
            return
        elif isinstance(node, ast.Call):
            yield from self._call(node)
        else:
            yield from self._inside(node)

    def _loop(self, node: ast.For | ast.comprehension) -> Iterator[_Found]:
        """Yield the reads in a loop; what is done with each of a list of parameters is found by its name."""
        name = getattr(node.iter.func, "id", "") if isinstance(node.iter, ast.Call) else ""
        sources = node.iter.args if name in ("enumerate", "zip") and isinstance(node.iter, ast.Call) else [node.iter]
        rest = node.ifs if isinstance(node, ast.comprehension) else [*node.body, *node.orelse]
        for part in [*(source for source in sources if not self._names.listing(source)), *rest]:
            yield from self._under(part)

    def _inside(self, node: ast.AST) -> Iterator[_Found]:
        """Yield the reads in the parts of a node that can run."""
        if isinstance(node, ast.BoolOp):
            is_and, outer = isinstance(node.op, ast.And), len(self._conditions)
            for value in node.values:
                yield from self._under(value)
                if self._names.truth(value) is not None and self._names.truth(value) is not is_and:
                    break
                if is_and:
                    self._conditions.append(functools.partial(self._truth_for, value))
            del self._conditions[outer:]
            return
        test = node.test if isinstance(node, (ast.If, ast.IfExp)) else None
        known = None if test is None else self._names.truth(test)
        for name, part in ast.iter_fields(node):
            if (name == "body" and known is False) or (name == "orelse" and known is True):
                continue
            is_guarded = test is not None and name == "body"
            if is_guarded and test is not None:
                self._conditions.append(functools.partial(self._truth_for, test))
            for inner in part if isinstance(part, list) else [part]:
                if isinstance(inner, ast.AST):
                    yield from self._under(inner)
                    if self._always_ends(inner):
                        break
            if is_guarded:
                self._conditions.pop()

    def _truth_for(self, test: ast.expr, owner: nn.Module) -> bool | None:
        return self._names.truth_for(test, owner if self._scope.has_self else None)

    def _always_ends(self, node: ast.AST) -> bool:
        """Whether the statements after an `if` never run, since its condition is known."""
        known = self._names.truth(node.test) if isinstance(node, ast.If) else None
        if known is None or not isinstance(node, ast.If):
            return False
        live = node.body if known else node.orelse
        return bool(live) and isinstance(live[-1], _ENDS)

    def _fact(self, name: str, weight: Paths, *, is_first: bool) -> Iterator[_Found]:
        if name == "dtype":
            yield from self._found(weight, "dtype")
        elif name in _SHAPE:
            yield from self._found(weight, "shape")
        elif name not in _HARMLESS:
            yield from self._of_first(weight) if is_first else self._found(weight, "values")

    def _of_first(self, first: Paths) -> Iterator[_Found]:
        """Yield a use of a module's first parameter: of the owner's, whatever it belongs to, it is new_zeros() ..."""
        for path in first:
            yield from self._found({path}, "values" if len(path) > 1 else "dtype")

    def _only_names(self, node: ast.Assign | ast.AnnAssign) -> bool:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return (
            node.value is not None
            and bool(
                self._names.dtype_read(node.value)
                or self._names.first_parameter(node.value)
                or self._names.listing(node.value)
            )
            and all(isinstance(target, ast.Name) for target in targets)
        )

    def _call(self, node: ast.Call) -> Iterator[_Found]:
        called = node.func
        name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
        if _initializes(called):
            return
        if name in _ASKING and not self._names.weight(called):
            asked = [a for a in node.args if not self._names.weight(a) and not self._names.first_parameter(a)]
            for argument in [called, *asked]:
                yield from self._under(argument)
            return
        if name == "len" and all(map(self._names.listing, node.args)):
            return
        if name == "functional_call" and node.args and self._scope.is_run:
            yield from self._found({(*path, EVERYTHING) for path in self._names.paths(node.args[0])}, "values")
        yield from self._found(self._names.cast(node), "cast")
        if self._scope.depth < _MAX_DEPTH:
            yield from self._in_callee(as_direct(node))
        yield from self._inside(node)

    def _in_callee(self, node: ast.Call) -> Iterator[_Found]:
        """Yield what a function reads of the children that it is passed."""
        passed: list[tuple[int | str, Paths]] = [
            *((index, self._names.paths(argument)) for index, argument in enumerate(node.args)),
            *((keyword.arg, self._names.paths(keyword.value)) for keyword in node.keywords if keyword.arg),
        ]
        function, receiver = self._callee(node.func)
        if not any(paths for _, paths in passed) and (not receiver or receiver == {()}):
            return
        tree = None if function is None else parsed(function)
        if function is None or tree is None:
            return
        code = function.__code__
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if receiver is not None:
            passed = [(0, receiver), *((key + 1 if isinstance(key, int) else key, paths) for key, paths in passed)]
        bound = {
            names[key] if isinstance(key, int) else key: paths
            for key, paths in passed
            if paths and (not isinstance(key, int) or key < len(names))
        }
        bound = {**_of_globals(function), **bound}
        scope = self._scope._replace(names=function.__globals__, has_self=receiver == {()}, depth=self._scope.depth + 1)
        child = self._child_called(receiver)
        for read in _Function(scope, tree, bound).reads():
            if child is None or read.path[: len(child)] != child:  # what a child reads of its own is found at the child
                yield read._replace(conditions=(*self._conditions, *read.conditions))

    def _child_called(self, receiver: Paths | None) -> Path | None:
        """Return the path of the module whose method is called, if it is a child of the owner."""
        path = next(iter(receiver), ()) if receiver else ()
        held = self._scope.held.get(path[0]) if path and isinstance(path[0], str) else None
        return path if held is not None and issubclass(held, nn.Module) else None

    def _callee(self, called: ast.expr) -> tuple[FunctionType | None, Paths | None]:
        """Return the function that a call runs, and what its first argument stands for if the call does not pass it."""
        names = self._scope.names
        if isinstance(called, ast.Name):
            return _as_function(names.get(called.id)), None
        if not isinstance(called, ast.Attribute):
            return None, None
        value = called.value
        known = names.get(value.id) if isinstance(value, ast.Name) else None
        if isinstance(known, ModuleType):
            return _as_function(getattr(known, called.attr, None)), None
        through = value.func.id if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) else ""
        if isinstance(known, type) or through == "type":
            return _of_class(known if isinstance(known, type) else self._scope.cls, called.attr, None)
        at = self._names.paths(value)
        if len(at) == 1 and len(path := next(iter(at))) == 1 and path[0] in self._scope.held:
            return _of_class(self._scope.held[path[0]], called.attr, at)
        if at != {()} and through != "super":
            return None, None
        held = self._scope.held.get(called.attr)
        if held is None:
            return _of_class(self._scope.cls, called.attr, {()})
        # Such as an attention processor.
        return _of_class(held, "forward" if issubclass(held, nn.Module) else "__call__", {(called.attr,)})

    def _found(self, paths: Paths, what: str, getter: str | None = None) -> Iterator[_Found]:
        return (_Found(path, what, getter, tuple(self._conditions)) for path in paths)


def _as_function(called: Any) -> FunctionType | None:
    function = inspect.unwrap(called) if callable(called) else None
    is_own = isinstance(function, FunctionType) and not (function.__module__ or "").startswith("torch.")
    return function if is_own else None


def _of_class(cls: type, name: str, receiver: Paths | None) -> tuple[FunctionType | None, Paths | None]:
    """Return a class's method, and what its first argument stands for."""
    method = inspect.getattr_static(cls, name, None)
    if isinstance(method, staticmethod):
        return _as_function(method.__func__), None
    if isinstance(method, classmethod):
        return _as_function(method.__func__), set()
    return _as_function(method), receiver


def _initializes(called: ast.expr) -> bool:
    """Whether a call gives a tensor initial values: `nn.init.normal_(...)`, `weight.data.normal_()`."""
    if not isinstance(called, ast.Attribute):
        return False
    holder = called.value.id if isinstance(called.value, ast.Name) else getattr(called.value, "attr", "")
    return called.attr in _INITIAL or holder == "init"
