"""A model's parameters and buffers, under all their names."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import ConfigError, listed
from ..hardware.interrupts import interruptible
from . import transformers_facts
from .view import ModelView, view_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, slots=True)
class ModelTensor:
    """A parameter or buffer of the model.

    Attributes:
        names: all of its names, in the order of the modules; several if it is tied.
        value: the model's own tensor, real or on meta.
        is_parameter: a parameter, not a buffer.
        persistent: whether the state_dict holds it.
    """

    names: tuple[str, ...]
    value: torch.Tensor
    is_parameter: bool
    persistent: bool

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the model."""
        return tuple(self.value.shape)


def tensors_of(model: nn.Module | ModelView, tied_parameters: Sequence[tuple[str, str]] = ()) -> list[ModelTensor]:
    """List the parameters and buffers of a model, tied ones once.

    Tied are tensors that are one object, pairs that the transformers class declares, and `tied_parameters`.

    Raises:
        ConfigError: the model is not a module, or is quantized already, or has lazy modules that have not run;
            `tied_parameters` names an unknown parameter, or ties two of different shapes.
    """
    view = view_of(model)
    parameters, buffers = view.parameters, view.buffers
    _require_plain(parameters, buffers)
    declared = [
        (first, second)
        for first, second in transformers_facts.tied_pairs(view.model)
        if first in parameters and second in parameters and parameters[first].shape == parameters[second].shape
    ]
    _check_ties(tied_parameters, parameters)
    groups = _group_names(parameters, [*declared, *tied_parameters])
    tensors = [ModelTensor(names, parameters[names[0]], True, True) for names in interruptible(groups)]
    for names in _group_names(buffers, ()):
        persistent = any(_is_persistent(view.owner(name), name) for name in names)
        tensors.append(ModelTensor(names, buffers[names[0]], False, persistent))
    return tensors


def _require_plain(parameters: Mapping[str, nn.Parameter], buffers: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        if type(parameter).__name__ in ("Params4bit", "Int8Params"):
            raise ConfigError(
                f"'{name}' is quantized by bitsandbytes already (a {type(parameter).__name__}); build the model anew "
                "to load or quantize it again"
            )
    for name, tensor in interruptible([*parameters.items(), *buffers.items()]):
        if is_lazy(tensor):
            raise ConfigError(f"'{name}' has no shape yet: run the lazy modules once before the model is loaded")


def _check_ties(pairs: Sequence[tuple[str, str]], parameters: dict[str, nn.Parameter]) -> None:
    if not isinstance(pairs, (tuple, list)):
        raise ConfigError(f"tied_parameters must be a list of pairs of parameter names, but it is {pairs!r}")
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(name, str) for name in pair):
            raise ConfigError(f"tied_parameters must hold pairs of parameter names, but it holds {pair!r}")
        absent = [name for name in pair if name not in parameters]
        if absent:
            raise ConfigError(f"tied_parameters names {listed(absent)}, which the model does not have")
        first, second = (tuple(parameters[name].shape) for name in pair)
        if first != second:
            raise ConfigError(f"tied_parameters ties '{pair[0]}' {first} to '{pair[1]}' {second}: shapes differ")


def _group_names(tensors: dict[str, Any], pairs: Iterable[tuple[str, str]]) -> list[tuple[str, ...]]:
    """Group the names of tensors that are one object or declared tied; groups and names stay in order."""
    group_of: dict[str, list[str]] = {}
    by_object: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        group = by_object.setdefault(id(tensor), [])
        group.append(name)
        group_of[name] = group
    for first, second in pairs:
        kept, merged = group_of[first], group_of[second]
        if kept is not merged:
            kept.extend(merged)
            group_of.update(dict.fromkeys(merged, kept))
    rank = {name: position for position, name in enumerate(tensors)}
    groups = {id(group): tuple(sorted(group, key=rank.__getitem__)) for group in group_of.values()}
    return sorted(groups.values(), key=lambda names: rank[names[0]])


def _is_persistent(owner: nn.Module, name: str) -> bool:
    return name.rpartition(".")[2] not in owner._non_persistent_buffers_set
