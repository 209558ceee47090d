"""What names and expressions in a function stand for: a module, its weight, or the dtype of its weight."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from .conditions import truth

# A path from the owner: names of children, _EVERY_CHILD for each of a list, _FIRST for who holds the first parameter.
Path = tuple[str, ...]
Paths = set[Path]
_EVERY_CHILD, _FIRST = "*", "first()"


class Names:
    """What names and expressions in one function stand for. Every method returns paths from the owner."""

    def __init__(self, tree: ast.AST, bound: Mapping[str, Paths], stored: torch.dtype | None) -> None:
        """Learn the function's local names.

        Args:
            tree: the function.
            bound: names of arguments that are modules.
            stored: the dtype that a quantized weight shows.
        """
        self._stored = stored
        self._modules: dict[str, Paths] = {name: set(paths) for name, paths in bound.items()}
        self._parameters: dict[str, Paths] = {}  # names of the first parameter of a module
        self._dtypes: dict[str, Paths] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._learn(target, node.value)
            elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
                self._learn(node.target, node.value)
            elif isinstance(node, (ast.For, ast.comprehension)):
                self._learn_loop(node.target, node.iter)

    def _learn(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for inner_target, inner_value in zip(target.elts, value.elts, strict=False):
                self._learn(inner_target, inner_value)
        elif isinstance(target, ast.Name):
            self._modules.setdefault(target.id, set()).update(self.paths(value))
            self._dtypes.setdefault(target.id, set()).update(self.dtype_read(value))
            if first := self.first_parameter(value):
                self._parameters.setdefault(target.id, set()).update(first)

    def _learn_loop(self, target: ast.expr, source: ast.expr) -> None:
        if isinstance(source, (ast.Tuple, ast.List)):
            for each in source.elts:
                self._learn(target, each)
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
        elif isinstance(called, ast.Attribute) and name in ("values", "children", "items", "named_children"):
            is_pair = isinstance(target, ast.Tuple) and name in ("items", "named_children")
            each = target.elts[-1] if is_pair and isinstance(target, ast.Tuple) else target
            self._learn_loop(each, called.value)
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
        if isinstance(node, ast.Attribute) and node.attr == "weight":
            return self.paths(node.value)
        if isinstance(node, ast.Call) and _constant_argument(node, "getattr", 1) == "weight":
            return self.paths(node.args[0])
        if isinstance(node, ast.Call) and (name := _constant_argument(node, "get_parameter", 0)):
            *inner, last = name.split(".")
            if last == "weight" and isinstance(node.func, ast.Attribute):
                return {(*path, *inner) for path in self.paths(node.func.value)}
        return set()

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

    def paths(self, node: ast.AST) -> Paths:
        """Return the paths of the modules that an expression may be."""
        if isinstance(node, ast.Name):
            return self._modules.get(node.id, set())
        if isinstance(node, ast.Attribute):
            return {(*path, node.attr) for path in self.paths(node.value)}
        if isinstance(node, ast.Subscript):
            return {(*path, _element(node.slice)) for path in self.paths(node.value)}
        if isinstance(node, ast.IfExp):
            return self.paths(node.body) | self.paths(node.orelse)
        if isinstance(node, ast.NamedExpr):
            return self.paths(node.value)
        if isinstance(node, ast.Call):
            if name := _constant_argument(node, "getattr", 1):
                return {(*path, name) for path in self.paths(node.args[0])}
            if (name := _constant_argument(node, "get_submodule", 0)) and isinstance(node.func, ast.Attribute):
                return {(*path, *name.split(".")) for path in self.paths(node.func.value)}
        return set()


def _constant_argument(node: ast.Call, function: str, index: int) -> str | None:
    """Return an argument of a call of a function, or a method, of this name if it is a string."""
    name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", None)
    if name != function or len(node.args) <= index:
        return None
    value = node.args[index]
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


def _element(index: ast.expr) -> str:
    """Return the name of a list's element by its index, which may count from the end; "*" for an unknown one."""
    sign = 1
    if isinstance(index, ast.UnaryOp) and isinstance(index.op, ast.USub):
        index, sign = index.operand, -1
    if not isinstance(index, ast.Constant) or not isinstance(index.value, (int, str)):
        return _EVERY_CHILD
    return str(sign * index.value) if isinstance(index.value, int) else index.value


def resolved(owner: nn.Module, path: Path) -> Iterator[str]:
    """Yield the paths of the modules of this owner that a path stands for."""
    found = [("", owner)]
    for part in path:
        found = [
            (f"{at}.{name}".strip("."), child)
            for at, module in found
            for name, child in (_holder_of_first(module) if part == _FIRST else _children(module, part))
        ]
    yield from (at for at, _ in found if at)


def _children(module: nn.Module, part: str) -> list[tuple[str, nn.Module]]:
    children = [(name, child) for name, child in module._modules.items() if child is not None]
    if part.startswith("-") and part[1:].isdigit():
        return children[int(part) :][:1] if int(part[1:]) <= len(children) else []
    return [(name, child) for name, child in children if part in (name, _EVERY_CHILD)]


def _holder_of_first(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the path and the module that holds a module's first parameter, if that is its weight."""
    name = next((name for name, _ in module.named_parameters()), "")
    path, _, last = name.rpartition(".")
    return [(path, module.get_submodule(path))] if last == "weight" else []
