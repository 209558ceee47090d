"""Modules that read a child's weight past the child's forward: such a child must stay as it is.

Mamba's mixer multiplies by `self.dt_proj.weight` itself, for instance; of a quantized layer that would be packed bytes.
Which children an owner reads stands in the code of its methods.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

from torch import nn

# Methods that run before there are weights, or move them about.
_BEFORE_LOADING = re.compile(r"__init__|_*init_.*|_*reset_parameters|_*tie_.*")
# torch's encoder layer reads weights in its fused path alone, which loading turns off.
_NOT_READING = (nn.Module, nn.TransformerEncoderLayer)
# What may be asked of a weight without reading its values.
_FACTS = {"dtype", "device", "shape", "size", "dim", "ndim", "is_meta", "requires_grad", "requires_grad_", "numel"}


def weights_read(owner: nn.Module) -> set[str]:
    """Name the direct children whose weight the owner's own methods read.

    Reads under an `if` that this instance makes false are left out. Where a method's source is not to be had, every
    child that it names counts, if it names `weight` at all.
    """
    return {
        child
        for cls in type(owner).__mro__
        if issubclass(cls, nn.Module) and cls not in _NOT_READING
        for name, member in vars(cls).items()
        if not _BEFORE_LOADING.fullmatch(name)
        for function in [member.fget if isinstance(member, property) else member]
        if isinstance(function, FunctionType)
        for child in _read_by(inspect.unwrap(function), owner)
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
        aliases = dict(_aliases(tree))
        yield from (child for child in _reads(tree, owner, aliases) if child in children)


def _aliases(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Find `name = self.child`, the local names of children."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute) and _is_self(node.value.value):
            yield from ((target.id, node.value.attr) for target in node.targets if isinstance(target, ast.Name))


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


def _reads(node: ast.AST, owner: nn.Module, aliases: Mapping[str, str]) -> Iterator[str]:
    """Walk the code for `self.child.weight` where it is a value, not asked for a fact and not assigned to."""
    if isinstance(node, ast.Attribute) and node.attr in _FACTS and _weight_of(node.value, aliases):
        return
    child = _weight_of(node, aliases)
    if child is not None and isinstance(getattr(node, "ctx", None), ast.Load):
        yield child
        return
    skipped = node.body if isinstance(node, ast.If) and _is_false(node.test, owner) else []
    for inner in ast.iter_child_nodes(node):
        if not any(inner is statement for statement in skipped):
            yield from _reads(inner, owner, aliases)


def _weight_of(node: ast.AST, aliases: Mapping[str, str]) -> str | None:
    if not (isinstance(node, ast.Attribute) and node.attr == "weight"):
        return None
    child = node.value
    if isinstance(child, ast.Attribute) and _is_self(child.value):
        return child.attr
    return aliases.get(child.id) if isinstance(child, ast.Name) else None


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


_PLAIN = (ast.Expression, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.Attribute, ast.Name, ast.Constant)
_PLAIN_PARTS = (ast.cmpop, ast.boolop, ast.unaryop, ast.expr_context)


def _is_false(test: ast.expr, owner: nn.Module) -> bool:
    """Decide a condition that only compares attributes of the owner with constants; any other may be true."""
    nodes: list[Any] = list(ast.walk(test))
    if not all(isinstance(node, _PLAIN + _PLAIN_PARTS) for node in nodes):
        return False
    if any(isinstance(node, ast.Attribute) and node.attr == "training" for node in nodes):
        return False  # train() and eval() change it
    try:
        return not eval(compile(ast.Expression(test), "<condition>", "eval"), {"__builtins__": {}, "self": owner})
    except Exception:  # an attribute that is not there yet, a name of the method's own
        return False
