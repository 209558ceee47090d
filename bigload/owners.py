"""Modules that read a child's weight past the child's forward: such a child must stay as it is.

Mamba's mixer multiplies by `self.dt_proj.weight` itself, for instance; of a quantized layer that would be packed bytes.
Which children an owner reads stands in the code of its methods.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

# Methods that run before there are weights, or move them about.
_BEFORE_LOADING = ("__init__", "_init_weights", "init_weights", "reset_parameters", "_reset_parameters", "tie_weights")
# What may be asked of a weight without reading its values.
_FACTS = {"dtype", "device", "shape", "size", "dim", "ndim", "is_meta", "requires_grad", "requires_grad_", "numel"}


def weights_read(owner: nn.Module) -> set[str]:
    """Name the direct children whose weight the owner's own methods read.

    Reads under an `if` that this instance makes false are left out. Where a method's source is not to be had, every
    child that it names counts, if it names `weight` at all.
    """
    if isinstance(owner, nn.TransformerEncoderLayer):
        return set()  # only its fused path does, which loading turns off
    return {
        child
        for cls in type(owner).__mro__
        if issubclass(cls, nn.Module) and cls is not nn.Module
        for function in vars(cls).values()
        if isinstance(function, FunctionType) and function.__name__ not in _BEFORE_LOADING
        for child in _read_by(function, owner)
    }


def _read_by(function: FunctionType, owner: nn.Module) -> Iterator[str]:
    names = _names(function.__code__)
    children = [name for name, _ in owner.named_children() if name in names]
    if "weight" not in names or not children:
        return  # nearly all methods, at the cost of a look at their names
    tree = _parsed(function)
    if tree is None:
        yield from children
    else:
        yield from (child for child in _reads(tree, owner) if child in children)


@functools.cache
def _names(code: CodeType) -> frozenset[str]:
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(*inner)


@functools.cache
def _parsed(function: FunctionType) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # typed at a prompt, or made by a program
        return None


def _reads(node: ast.AST, owner: nn.Module) -> Iterator[str]:
    """Walk the code for `self.child.weight` where it is a value, not asked for a fact and not assigned to."""
    if isinstance(node, ast.Attribute) and node.attr in _FACTS and _weight_of(node.value):
        return
    child = _weight_of(node)
    if child is not None and isinstance(getattr(node, "ctx", None), ast.Load):
        yield child
        return
    skipped = node.body if isinstance(node, ast.If) and _is_false(node.test, owner) else []
    for inner in ast.iter_child_nodes(node):
        if not any(inner is statement for statement in skipped):
            yield from _reads(inner, owner)


def _weight_of(node: ast.AST) -> str | None:
    is_weight = isinstance(node, ast.Attribute) and node.attr == "weight"
    if is_weight and isinstance(node.value, ast.Attribute) and isinstance(node.value.value, ast.Name):  # type: ignore[attr-defined]
        return node.value.attr if node.value.value.id == "self" else None  # type: ignore[attr-defined]
    return None


_PLAIN = (ast.Expression, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.Attribute, ast.Name, ast.Constant)
_PLAIN_PARTS = (ast.cmpop, ast.boolop, ast.unaryop, ast.expr_context)


def _is_false(test: ast.expr, owner: nn.Module) -> bool:
    """Decide a condition that only compares attributes of the owner with constants; any other may be true."""
    nodes: list[Any] = list(ast.walk(test))
    if not all(isinstance(node, _PLAIN + _PLAIN_PARTS) for node in nodes):
        return False
    try:
        return not eval(compile(ast.Expression(test), "<condition>", "eval"), {"__builtins__": {}, "self": owner})
    except Exception:  # an attribute that is not there yet, a name of the method's own
        return False
