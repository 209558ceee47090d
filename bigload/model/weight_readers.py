"""Finds modules that read a child's weight without calling the child's forward: such a child must not be quantized.

Mamba's mixer multiplies by `self.dt_proj.weight` itself, for instance; in a quantized layer that would be packed bytes.
The source of each method is searched for reads of `self.child.weight`, also through a local name, in a loop over a list
of children, or of a child's own child. Reads through other calls (getattr, a helper function that receives the child)
are not found.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

# Methods that run before the weights are loaded, or that replace them. (diffusers' `fuse_projections`, which only users
# call, makes one plain layer of several; of quantized layers it cannot, and fails.)
_BEFORE_LOADING = re.compile(r"__init__|_*init_.*|_*reset_parameters|_*tie_.*|_*resize_.*|fuse_projections")
# torch's encoder layer reads weights only in its fused path, which loading disables.
_NOT_READING = (nn.Module, nn.TransformerEncoderLayer, nn.TransformerEncoder)
# Attributes and methods of a weight that do not read its values.
_FACTS = {"dtype", "device", "shape", "size", "dim", "ndim", "is_meta", "requires_grad", "requires_grad_", "numel"}


def weights_read(owner: nn.Module) -> set[str]:
    """Return the paths, from the owner, of the modules whose weight the owner's own methods read.

    Reads under an `if` that is false for this instance do not count. If the source of a method is not available, but it
    uses the name `weight`, every child that it names counts.
    """
    if not owner._modules:
        return set()
    methods = (method for cls in type(owner).__mro__ for method in _methods_naming_weights(cls))
    return {child for method in methods for child in _read_by(method, owner)}


@functools.cache
def _methods_naming_weights(cls: type) -> tuple[FunctionType, ...]:
    if not issubclass(cls, nn.Module) or cls in _NOT_READING:
        return ()
    members = [
        inspect.unwrap(function)
        for name, member in vars(cls).items()
        if not _BEFORE_LOADING.fullmatch(name)
        for function in [member.fget if isinstance(member, property) else member]
        if isinstance(function, FunctionType)
    ]
    # Few methods name a weight, and checking their names is much faster than parsing their source.
    return tuple(m for m in members if isinstance(m, FunctionType) and "weight" in names_in(m.__code__))


def _read_by(function: FunctionType, owner: nn.Module) -> Iterator[str]:
    names = names_in(function.__code__)
    me = function.__code__.co_varnames[0] if function.__code__.co_argcount else ""
    children = [name for name, child in owner._modules.items() if child is not None and name in names]
    if not children:
        return
    tree = _parsed(function)
    if tree is None:
        yield from children
    else:
        yield from _WeightReads(owner, me, tree).under(tree)


@functools.cache
def names_in(code: CodeType) -> frozenset[str]:
    """Return the names of globals and attributes in a function's code, and in the functions inside it."""
    inner = (names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(*inner)


@functools.cache
def _parsed(function: FunctionType) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # defined at a prompt, or generated
        return None


_EVERY_CHILD = "*"  # in a path: every child of a list of modules


class _WeightReads:
    """Finds reads of children's weights in one method: `self.child.weight`, or through a local name of the child."""

    def __init__(self, owner: nn.Module, me: str, tree: ast.AST) -> None:
        self._owner, self._me = owner, me
        self._aliases: dict[str, set[tuple[str, ...]]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._learn(target, node.value)
            elif isinstance(node, (ast.For, ast.comprehension)):
                several = node.iter.elts if isinstance(node.iter, (ast.Tuple, ast.List)) else []
                for each in several or [ast.Subscript(node.iter, ast.Constant(0), ast.Load())]:
                    self._learn(node.target, each)

    def _learn(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for inner_target, inner_value in zip(target.elts, value.elts, strict=False):
                self._learn(inner_target, inner_value)
        elif isinstance(target, ast.Name):
            self._aliases.setdefault(target.id, set()).update(self._paths(value))

    def under(self, node: ast.AST) -> Iterator[str]:
        """Yield the paths, from the owner, of the modules whose weight the code reads.

        Assignments to a weight, and reads of its shape, dtype or the like, do not count.
        """
        if isinstance(node, ast.Attribute) and node.attr in _FACTS and self._read(node.value):
            return
        read = self._read(node)
        if read and isinstance(getattr(node, "ctx", None), ast.Load):
            for path in read:
                yield from _resolved(self._owner, path)
            return
        skipped = node.body if isinstance(node, ast.If) and _is_false(node.test, self._owner) else []
        for inner in ast.iter_child_nodes(node):
            if not any(inner is statement for statement in skipped):
                yield from self.under(inner)

    def _read(self, node: ast.AST) -> set[tuple[str, ...]]:
        return self._paths(node.value) if isinstance(node, ast.Attribute) and node.attr == "weight" else set()

    def _paths(self, node: ast.AST) -> set[tuple[str, ...]]:
        """Return the paths that `self.child`, `self.child.inner`, `self.children[0]` or a local name may refer to."""
        if isinstance(node, ast.Name):
            return {()} if node.id == self._me else self._aliases.get(node.id, set())
        if isinstance(node, ast.Attribute):
            return {(*path, node.attr) for path in self._paths(node.value)}
        if isinstance(node, ast.Subscript):
            return {(*path, _EVERY_CHILD) for path in self._paths(node.value)}
        return set()


def _resolved(owner: nn.Module, path: tuple[str, ...]) -> Iterator[str]:
    found = [("", owner)]
    for part in path:
        found = [
            (f"{at}.{name}".lstrip("."), child)
            for at, module in found
            for name, child in module._modules.items()
            if child is not None
            if part in (name, _EVERY_CHILD)
        ]
    yield from (at for at, _ in found if at)


_PLAIN = (ast.Expression, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.Attribute, ast.Name, ast.Constant)
_PLAIN_PARTS = (ast.cmpop, ast.boolop, ast.unaryop, ast.expr_context)


def _is_false(test: ast.expr, owner: nn.Module) -> bool:
    """Whether a condition is false for this owner. Only comparisons of its attributes with constants are evaluated."""
    nodes: list[Any] = list(ast.walk(test))
    if not all(isinstance(node, _PLAIN + _PLAIN_PARTS) for node in nodes):
        return False
    if any(isinstance(node, ast.Attribute) and node.attr == "training" for node in nodes):
        return False  # train() and eval() change it
    try:
        return not eval(compile(ast.Expression(test), "<condition>", "eval"), {"__builtins__": {}, "self": owner})
    except Exception:  # an attribute that is not set yet, or a local name of the method
        return False
