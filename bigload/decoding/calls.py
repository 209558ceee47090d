"""What a step is called with: tensors, whose values differ from step to step; caches; and what must stay the same."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..hardware.nested_tensors import map_tensors, of_class
from .masks import DeferredMask, MaskPlace
from .simple import SIMPLE

# Arguments that hold the new tokens, by transformers' names.
_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


class Call:
    """A call, taken apart.

    Attributes:
        tensors: all tensors in its arguments, each as often as it occurs.
        states: the caches: objects whose tensors a step changes.
        masks: those that the graph of a step makes.
        others: functions, modules and configs in its arguments.
        key: equal for calls that a graph can stand for: shapes, dtypes and devices of the tensors, and all else that
            is no tensor. Each entry begins with the path of an argument.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._args, self._kwargs = args, dict(kwargs)
        self.tensors: list[torch.Tensor] = []
        self.states: list[Any] = []
        self.masks: list[DeferredMask] = []
        self.others: list[Any] = []
        key: list[tuple[Any, ...]] = []
        for number, value in enumerate(args):
            self._take(number, value, key)
        for name, value in kwargs.items():
            self._take(name, value, key)
        self.key = tuple(key)

    def _take(self, path: Any, value: Any, key: list[tuple[Any, ...]]) -> None:
        if isinstance(value, torch.Tensor):
            self.tensors.append(value)
            key.append((path, value.shape, value.stride(), value.dtype, value.device))
        elif isinstance(value, SIMPLE):
            key.append((path, type(value), value))
        elif isinstance(value, (tuple, list)):
            key.append((path, type(value), len(value)))
            for number, each in enumerate(value):
                self._take((path, number), each, key)
        elif isinstance(value, (dict, UserDict)):
            key.append((path, type(value), len(value)))
            for name, each in value.items():
                self._take((path, name), each, key)
        elif isinstance(value, DeferredMask):
            self.masks.append(value)
            key.append((path, DeferredMask, value.key))
        elif is_state(value):
            self.states.append(value)
            key.append((path, type(value)))
        else:
            self.others.append(value)
            key.append((path, id(value)))

    @property
    def rows(self) -> int | None:
        """How many rows of tokens it is given, of which a cache has as many sequences in each call of a model."""
        tokens = tokens_of(self._args, self._kwargs)
        return None if tokens is None or not tokens.dim() else tokens.shape[0]

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> tuple[Any, Any]:
        """Return the arguments with other tensors in the place of theirs, in the order of `tensors`."""
        rest = iter(tensors)
        args = map_tensors(self._args, lambda tensor: next(rest))
        return args, map_tensors(self._kwargs, lambda tensor: next(rest))

    def with_masks(self, arguments: Mapping[str, Any], places: Sequence[MaskPlace]) -> dict[str, Any]:
        """Return named arguments with masks that are made from what is in some places, in the order of `masks`."""
        rest = iter(places)
        return {
            name: value.made_from(next(rest)) if isinstance(value, DeferredMask) else value
            for name, value in arguments.items()
        }


def is_state(value: Any) -> bool:
    """Whether an object may hold tensors that a step changes."""
    if isinstance(value, (nn.Module, type)) or callable(value) or hasattr(value, "to_dict"):
        return False
    return hasattr(value, "__dict__")


def first_difference(key: tuple[Any, ...], other: tuple[Any, ...]) -> str:
    """Name the first argument in which two calls differ, or what beside arguments makes steps of other kinds."""
    for one, two in zip(key, other, strict=False):
        if one != two:
            path = one[0]
            while isinstance(path, tuple):
                path = path[0]
            return f"argument {path!r}"
    return "number of arguments" if len(key) != len(other) else "its caches, torch's modes or the model's config"


class UnknownOutputError(Exception):
    """A step returns something that a replay could not make again."""


def output_maker(output: Any, call: Call, static: list[torch.Tensor]) -> Callable[[Call], Any]:
    """Return what makes the output of a replay, with tensors of its own, for the call that it is made for.

    Args:
        output: what the step returned as it was captured.
        call: that it was captured with; its caches are not kept.
        static: the tensors that stood for those of the call.

    Raises:
        UnknownOutputError: there is an object in it that no argument is.
    """
    if isinstance(output, torch.Tensor):
        for number, each in enumerate(static):
            if each is output:
                return lambda now: now.tensors[number]
        return lambda now: output.clone()
    if isinstance(output, SIMPLE):
        return lambda now: output
    for number, each in enumerate(call.states):
        if each is output:
            return lambda now: now.states[number]
    if isinstance(output, (tuple, list)):
        items = [output_maker(each, call, static) for each in output]
        like = type(output)() if type(output) in (tuple, list) else output
        return lambda now: of_class(like, [make(now) for make in items])
    if isinstance(output, dict):
        named = {name: output_maker(each, call, static) for name, each in output.items()}
        cls: Any = type(output) if dataclasses.is_dataclass(output) or type(output) is dict else None
        if cls is dict:
            return lambda now: {name: make(now) for name, make in named.items()}
        if cls is not None:
            return lambda now: cls(**{name: make(now) for name, make in named.items()})
    raise UnknownOutputError(f"it returns a {type(output).__name__}")


def tokens_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the tokens, (batch, tokens), or their embeddings, (batch, tokens, features), that a forward is given."""
    for name in _TOKENS[::-1]:  # of a model with an encoder, those of the decoder
        value = kwargs.get(name)
        if isinstance(value, torch.Tensor):
            return value
    return next((value for value in args if isinstance(value, torch.Tensor)), None)


def caches_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """List the caches of transformers among the arguments."""
    values = (*args, *kwargs.values())
    return [value for value in values if hasattr(type(value), "is_compileable")]
