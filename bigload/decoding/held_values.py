"""What dicts and lists held when a step was captured, compared with what they hold now in a few microseconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .simple import SIMPLE

Container = dict[Any, Any] | list[Any]


class HeldValues:
    """The values in some dicts and lists: the same objects, and simple values that are equal.

    Python compares two lists of dicts in one call, and asks no value that is the same object. Another tensor in its
    place answers with a tensor, which is neither true nor false, unless it has one element.
    """

    def __init__(self, containers: Sequence[Container]) -> None:
        self._all = containers
        self.note()

    def note(self) -> None:
        """Note what they hold."""
        self._held = [each for each in self._all if each]
        self._empty = [each for each in self._all if not each]
        self._copies = [each.copy() for each in self._held]
        self._asked = [
            (each, name, value)
            for each in self._held
            for name, value in (each.items() if isinstance(each, dict) else enumerate(each))
            if _may_equal_another(value)
        ]
        self._copy_of = {id(each): copied for each, copied in zip(self._held, self._copies, strict=True)}

    def put(self, container: Container, name: Any, value: Any) -> None:
        """Put a value into one of them, as if it had been there when they were noted."""
        container[name] = self._copy_of[id(container)][name] = value

    def are_same(self) -> bool:
        """Whether they hold what they held."""
        try:
            if any(self._empty) or self._held != self._copies:
                return False
        except (RuntimeError, TypeError, ValueError):  # of a tensor, or an array, that was asked for its truth
            return False
        return all(each[name] is value for each, name, value in self._asked)


def _may_equal_another(value: Any) -> bool:
    """Whether a value that is not simple may say of another object that both are equal."""
    if isinstance(value, torch.Tensor):
        return value.numel() <= 1
    equals: Any = type(value).__eq__
    return not isinstance(value, SIMPLE) and equals is not object.__eq__
