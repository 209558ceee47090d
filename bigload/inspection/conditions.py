"""Conditions in a module's code that are known before it runs."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_PLAIN = (ast.Expression, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.Attribute, ast.Name, ast.Constant)
_PLAIN_PARTS = (ast.cmpop, ast.boolop, ast.unaryop, ast.expr_context)
_COMPARED: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda value, among: value in among,
    ast.NotIn: lambda value, among: value not in among,
}


def truth(test: ast.expr, owner: nn.Module | None, dtype_of: Callable[[ast.expr], torch.dtype | None]) -> bool | None:
    """Return whether a condition is true for this owner; None if that is not known before its code runs.

    Known are comparisons of the owner's attributes with constants, and of known dtypes with dtypes of torch.

    Args:
        test: the condition.
        owner: the module that its code calls `self`; None if it is not to be asked.
        dtype_of: returns the dtype that an expression stands for, or None.
    """
    if isinstance(test, ast.BoolOp):
        decisive = isinstance(test.op, ast.Or)
        known = [truth(value, owner, dtype_of) for value in test.values]
        if decisive in known:
            return decisive
        return None if None in known else not decisive
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        known_inner = truth(test.operand, owner, dtype_of)
        return None if known_inner is None else not known_inner
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        compared = _COMPARED.get(type(test.ops[0]))
        left, right = _constant(test.left, dtype_of), _constant(test.comparators[0], dtype_of)
        if compared is not None and left is not None and right is not None:
            return compared(left, right)
    asked = test.func if isinstance(test, ast.Call) and not test.args else test
    if isinstance(asked, ast.Attribute) and asked.attr == "is_floating_point":
        dtype = dtype_of(asked.value)
        return None if dtype is None else dtype.is_floating_point
    return None if owner is None else _evaluated(test, owner)


def _constant(node: ast.expr, dtype_of: Callable[[ast.expr], torch.dtype | None]) -> Any:
    """Return the dtype, or the list of dtypes, that an expression stands for, or None."""
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        several = [_constant(element, dtype_of) for element in node.elts]
        return None if None in several else several
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
        named = getattr(torch, node.attr, None)
        return named if isinstance(named, torch.dtype) else None
    return dtype_of(node)


def _evaluated(test: ast.expr, owner: nn.Module) -> bool | None:
    """Evaluate a comparison of the owner's attributes with constants."""
    nodes: list[Any] = list(ast.walk(test))
    if not all(isinstance(node, _PLAIN + _PLAIN_PARTS) for node in nodes):
        return None
    if any(isinstance(node, ast.Attribute) and node.attr == "training" for node in nodes):
        return None  # train() and eval() change it
    try:
        return bool(eval(compile(ast.Expression(test), "<condition>", "eval"), {"__builtins__": {}, "self": owner}))
    except Exception:  # an attribute that is not set yet, or a local name of the method
        return None
