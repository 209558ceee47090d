"""What names and expressions in a function stand for: a module, its weight, or the dtype of its weight."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from .conditions import truth
from .outer_names import Global

# A path from the owner: names of children, _EVERY_CHILD for each of a list, EVERYTHING for a module and all that is
# below it, _FIRST for who holds the first parameter. It begins with an object if that, such as a closure's, is known,
# or with a Global.
Path = tuple[Any, ...]
Paths = set[Path]
_EVERY_CHILD, EVERYTHING, _FIRST = "*", "**", "first()"

# Methods that list what a module or a dict holds.
_LISTS = ("values", "children", "items", "named_children", "modules", "named_modules")
# Methods of a module that list its parameters, and functions and methods that pass a list or a dict of them on.
_LISTS_PARAMETERS = ("parameters", "named_parameters", "state_dict")
_PASSES_ON = ("dict", "list", "tuple", "iter", "reversed", "sorted", "OrderedDict")


# Methods of a module that cast its weights.
CASTS = frozenset(("to", "type", "float", "half", "bfloat16", "double"))
_NO_CAST = ("device", "non_blocking", "copy", "memory_format")


class Names:
    """What names and expressions in one function stand for. Every method returns paths from the owner."""

    def __init__(
        self, tree: ast.AST, bound: Mapping[str, Paths], stored: torch.dtype | None, *, lists: bool = False
    ) -> None:
        """Learn the function's local names.

        Args:
            tree: the function.
            bound: names of arguments that are modules.
            stored: the dtype that a quantized weight shows.
            lists: whether `parameters()`, `named_parameters()` and `state_dict()` count.
        """
        self._stored, self._lists = stored, lists
        self._weights: dict[str, Paths] = {}  # names of each parameter of a module
        self._listings: dict[str, Paths] = {}  # names of lists and dicts of parameters
        self._modules: dict[str, Paths] = {name: set(paths) for name, paths in bound.items()}
        self._parameters: dict[str, Paths] = {}  # names of the first parameter of a module
        self._dtypes: dict[str, Paths] = {}
        self._elements: dict[str, Paths] = {}  # names of lists and dicts of modules
        self._functions = {node.name: node.args for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._learn(target, node.value)
                    if isinstance(node.value, ast.Lambda) and isinstance(target, ast.Name):
                        self._functions[target.id] = node.value.args
            elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
                self._learn(node.target, node.value)
                if isinstance(node.value, ast.Lambda) and isinstance(node.target, ast.Name):
                    self._functions[node.target.id] = node.value.args
            elif isinstance(node, (ast.For, ast.comprehension)):
                self._learn_loop(node.target, node.iter)
            elif isinstance(node, ast.Call):
                self._learn_arguments(as_direct(node))

    def _learn(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for inner_target, inner_value in zip(target.elts, value.elts, strict=False):
                self._learn(inner_target, inner_value)
        elif isinstance(target, ast.Name):
            self._modules.setdefault(target.id, set()).update(self.paths(value))
            self._listings.setdefault(target.id, set()).update(self.listing(value))
            self._dtypes.setdefault(target.id, set()).update(self.dtype_read(value))
            self._elements.setdefault(target.id, set()).update(self.elements(value))
            if first := self.first_parameter(value):
                self._parameters.setdefault(target.id, set()).update(first)

    def _learn_arguments(self, call: ast.Call) -> None:
        """Learn what a lambda, or a function inside this one, is called with."""
        called = call.func
        arguments = called.args if isinstance(called, ast.Lambda) else None
        if isinstance(called, ast.Name):
            arguments = self._functions.get(called.id)
        if arguments is None:
            return
        names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
        passed = [*zip(names, call.args, strict=False), *((keyword.arg, keyword.value) for keyword in call.keywords)]
        for name, value in passed:
            if name is not None:
                self._learn(ast.Name(name, ast.Store()), value)

    def _learn_loop(self, target: ast.expr, source: ast.expr) -> None:
        if isinstance(source, (ast.Tuple, ast.List)):
            for each in source.elts:
                self._learn(target, each)
            return
        if listing := self.listing(source):
            each = target.elts[-1] if isinstance(target, ast.Tuple) else target
            if isinstance(each, ast.Name):
                self._weights.setdefault(each.id, set()).update((*path, EVERYTHING) for path in listing)
            return
        called = source.func if isinstance(source, ast.Call) else None
        name = called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""
        if isinstance(source, ast.Call) and isinstance(called, ast.Name) and source.args:
            elements = target.elts if isinstance(target, ast.Tuple) else [target]
            if name == "enumerate" and len(elements) == 2:
                self._learn_loop(elements[1], source.args[0])
            elif name == "zip" and len(elements) == len(source.args):
                for element, argument in zip(elements, source.args, strict=True):
                    self._learn_loop(element, argument)
            elif name in ("reversed", "list", "iter"):
                self._learn_loop(target, source.args[0])
        elif isinstance(called, ast.Attribute) and name in _LISTS:
            is_pair = isinstance(target, ast.Tuple) and name in ("items", "named_children", "named_modules")
            each = target.elts[-1] if is_pair and isinstance(target, ast.Tuple) else target
            part: ast.expr = ast.Constant(EVERYTHING if "modules" in name else None)
            self._learn(each, ast.Subscript(called.value, part, ast.Load()))
        else:
            self._learn(target, ast.Subscript(source, ast.Constant(None), ast.Load()))

    def truth(self, test: ast.expr) -> bool | None:
        """Return whether a condition is true for all owners, by the dtype that a quantized weight shows."""
        return truth(test, None, self._shown_dtype)

    def truth_for(self, test: ast.expr, owner: nn.Module | None) -> bool | None:
        """Return the same for one owner, by its attributes too."""
        return truth(test, owner, self._shown_dtype)

    def _shown_dtype(self, node: ast.expr) -> torch.dtype | None:
        return self._stored if self.dtype_read(node) or self.weight(node) else None

    def dtype_read(self, node: ast.AST) -> Paths:
        """Return the paths of the modules whose weight's dtype an expression is."""
        if isinstance(node, ast.Attribute) and node.attr == "dtype":
            return self.weight(node.value) | self.first_parameter(node.value)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            return self._dtypes.get(node.id, set())
        if isinstance(node, ast.NamedExpr):
            return self.dtype_read(node.value)
        if isinstance(node, ast.IfExp):
            known = self.truth(node.test)
            live = [branch for branch, dead in ((node.body, False), (node.orelse, True)) if known is not dead]
            return set().union(*map(self.dtype_read, live))
        return set()

    def weight(self, node: ast.AST) -> Paths:
        """Return the paths of the modules whose weight an expression is."""
        if isinstance(node, ast.Name):
            return self._weights.get(node.id, set())
        if isinstance(node, ast.Attribute) and node.attr == "weight":
            return self.paths(node.value)
        if isinstance(node, ast.Subscript) and (listing := self.listing(node.value)):
            *inner, last = _element(node.slice).split(".")
            if (*inner, last) == (_EVERY_CHILD,):
                return {(*path, EVERYTHING) for path in listing}
            return {(*path, *inner) for path in listing} if last == "weight" else set()
        if isinstance(node, ast.Call) and (name := _constant_argument(node, "getattr", 1)):
            *inner, last = name.split(".")
            return {(*path, *inner) for path in self.paths(node.args[0])} if last == "weight" else set()
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.value, ast.Attribute)
            and node.value.attr == "_parameters"
        ):
            return self.paths(node.value.value) if _element(node.slice) == "weight" else set()
        if isinstance(node, ast.Call) and (name := _constant_argument(node, "get_parameter", 0)):
            *inner, last = name.split(".")
            if last == "weight" and isinstance(node.func, ast.Attribute):
                return {(*path, *inner) for path in self.paths(node.func.value)}
        return set()

    def listing(self, node: ast.AST) -> Paths:
        """Return the paths of the modules whose parameters, and those below them, an expression lists."""
        if not self._lists:
            return set()
        if isinstance(node, ast.Name):
            return self._listings.get(node.id, set())
        if not isinstance(node, ast.Call):
            return set()
        called = node.func
        if isinstance(called, ast.Attribute) and called.attr in _LISTS_PARAMETERS:
            return self.paths(called.value)
        if isinstance(called, ast.Attribute) and called.attr in ("items", "values"):
            return self.listing(called.value)
        name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
        return self.listing(node.args[0]) if name in _PASSES_ON and node.args else set()

    def first_parameter(self, node: ast.AST) -> Paths:
        """Return the paths of the modules whose first parameter an expression is: next(module.parameters())."""
        if isinstance(node, ast.Name):
            return self._parameters.get(node.id, set())
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and node.slice.value == 0:
            node, taken = node.value, True
        else:
            taken = False
        while isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            if node.func.id not in ("next", "iter", "list", "tuple"):
                return set()
            taken, node = taken or node.func.id == "next", node.args[0]
        called = node.func if taken and isinstance(node, ast.Call) else None
        if not isinstance(called, ast.Attribute) or called.attr != "parameters":
            return set()
        return {(*path, _FIRST) for path in self.paths(called.value)}

    def cast(self, node: ast.Call) -> Paths:
        """Return the paths of the modules that a call casts to a dtype, as by `self.router.to(torch.float32)`."""
        called = node.func
        if not isinstance(called, ast.Attribute) or called.attr not in CASTS:
            return set()
        given = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg not in _NO_CAST)]
        if called.attr == "to" and all(map(_is_device, given)):
            return set()
        return self.paths(called.value)

    def paths(self, node: ast.AST) -> Paths:
        """Return the paths of the modules that an expression may be."""
        if isinstance(node, ast.Name):
            return self._modules.get(node.id, set())
        if isinstance(node, ast.Attribute):
            return {(*path, node.attr) for path in self.paths(node.value)}
        if isinstance(node, ast.Subscript):
            return {(*path, _element(node.slice)) for path in self.paths(node.value)} | self.elements(node.value)
        if isinstance(node, ast.BoolOp):
            return set().union(*map(self.paths, node.values))
        if isinstance(node, ast.IfExp):
            return self.paths(node.body) | self.paths(node.orelse)
        if isinstance(node, ast.NamedExpr):
            return self.paths(node.value)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) > 1:
                known = _pattern(node.args[1])
                return {(*path, *known.split(".")) for path in self.paths(node.args[0])}
            if isinstance(node.func, ast.Name) and node.func.id == "next" and node.args:
                return self.elements(node.args[0])
            if (name := _constant_argument(node, "get_submodule", 0)) and isinstance(node.func, ast.Attribute):
                return {(*path, *name.split(".")) for path in self.paths(node.func.value)}
        return set()

    def elements(self, node: ast.AST) -> Paths:
        """Return the paths of the modules that an expression lists."""
        if isinstance(node, ast.Name):
            return self._elements.get(node.id, set())
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            return set().union(*map(self.paths, node.elts))
        if isinstance(node, ast.Dict):
            return set().union(*map(self.paths, node.values))
        if isinstance(node, (ast.ListComp, ast.GeneratorExp)):
            return self.paths(node.elt)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            part = {"children": _EVERY_CHILD, "values": _EVERY_CHILD, "modules": EVERYTHING}.get(node.func.attr)
            return {(*path, part) for path in self.paths(node.func.value)} if part else set()
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            return self.elements(node.args[0]) if node.func.id in ("list", "tuple", "iter", "reversed") else set()
        return set()


def _is_device(node: ast.expr) -> bool:
    """Whether an argument of `.to` names a device, by how it is written."""
    return isinstance(node, ast.Constant) or "device" in ast.unparse(node)


def as_direct(call: ast.Call) -> ast.Call:
    """Return the call that a `partial` or `map` stands for; another one unchanged."""
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    if name == "partial" and call.args:
        return ast.Call(call.args[0], call.args[1:], call.keywords)
    if name in ("map", "filter") and len(call.args) > 1:
        each: list[ast.expr] = [ast.Subscript(source, ast.Constant(None), ast.Load()) for source in call.args[1:]]
        return ast.Call(call.args[0], each, [])
    return call


def _constant_argument(node: ast.Call, function: str, index: int) -> str | None:
    """Return an argument of a call of a function, or a method, of this name if it is a string."""
    name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", None)
    if name != function or len(node.args) <= index:
        return None
    value = node.args[index]
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


def _pattern(node: ast.expr) -> str:
    """Return a name, with a star for what is not known of it."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_pattern, node.values))
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return str(node.value) if isinstance(node, ast.Constant) and is_text else _EVERY_CHILD


def _element(index: ast.expr) -> str:
    """Return the name of a list's element by its index, which may count from the end; "*" for an unknown one."""
    sign = 1
    if isinstance(index, ast.UnaryOp) and isinstance(index.op, ast.USub):
        index, sign = index.operand, -1
    if not isinstance(index, ast.Constant) or not isinstance(index.value, (int, str)):
        return _EVERY_CHILD
    return str(sign * index.value) if isinstance(index.value, int) else index.value


def resolved(owner: nn.Module, path: Path) -> Iterator[nn.Module]:
    """Yield the modules that a path from this owner stands for."""
    found: list[Any] = [owner]
    for part in path:
        if isinstance(part, str):
            found = [inner for each in found for inner in _inside(each, part)]
        else:
            found = [part.value() if isinstance(part, Global) else part]
    yield from (each for each in found if isinstance(each, nn.Module))


def _inside(holder: Any, part: str) -> list[Any]:
    """Return what is in a module, a list or a dict under a name, an index or a key."""
    if isinstance(holder, nn.Module):
        if part == _FIRST:
            return _holder_of_first(holder)
        if part == EVERYTHING:
            return list(holder.modules())
        if part not in holder._modules and not part.lstrip("-").isdigit() and _EVERY_CHILD not in part:
            return [value for value in [_attribute(holder, part)] if value is not None]
        holder = holder._modules
    if isinstance(holder, Mapping):
        if part in holder:
            return [holder[part]]
        if part != _EVERY_CHILD and _EVERY_CHILD in part:
            return [value for key, value in holder.items() if fnmatchcase(key, part)]
        holder = tuple(holder.values())
    if not isinstance(holder, (list, tuple)):
        held = getattr(holder, "__dict__", {})
        return [held[part]] if part in held else []
    if part.lstrip("-").isdigit():
        return [holder[int(part)]] if -len(holder) <= int(part) < len(holder) else []
    return list(holder) if part == _EVERY_CHILD else []


def _attribute(module: nn.Module, name: str) -> Any:
    """Return what a module holds beside its children, or what a property of it returns."""
    if name in vars(module):
        return vars(module)[name]
    said = inspect.getattr_static(type(module), name, None)
    compute = getattr(said, "fget" if isinstance(said, property) else "func", None)
    if not isinstance(said, (property, functools.cached_property)):
        return said if isinstance(said, (nn.Module, list, tuple, dict)) else None
    with suppress(Exception):  # what it needs may not be there before the load
        return None if compute is None else compute(module)
    return None


def _holder_of_first(module: nn.Module) -> list[nn.Module]:
    """Return the module that holds a module's first parameter, if that is its weight."""
    name = next((name for name, _ in module.named_parameters()), "")
    path, _, last = name.rpartition(".")
    return [module.get_submodule(path)] if last == "weight" else []
