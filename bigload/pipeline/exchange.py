"""Exchanges what a model holds beside its registered modules and tensors: the layers in a list, a bound method."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..inspection.aliases import Alias, aliases, exchanged
from ..model.view import ModelView
from ..planning.plan import Plan
from .attributes import Edit


class HeldElsewhere:
    """The places of a model that hold layers, tensors or bound methods which a load replaces."""

    def __init__(self, view: ModelView, plan: Plan) -> None:
        """Find them. The model is not changed.

        Raises:
            ConfigError: the weight of a layer that is to be quantized is held outside the layer.
        """
        self._view, self._plan = view, plan
        self._layers = set(plan.layers.values())
        self._aliases = aliases(view.first_paths, self._is_wanted)
        weights = (
            {id(layer._parameters["weight"]): path for path, layer in plan.layers.items()} if self._aliases else {}
        )
        for alias in self._aliases:
            for path in (weights[id(held)] for held in alias.held if id(held) in weights):
                raise ConfigError(
                    f"{alias.name!r} holds the weight of {path!r}, which would not be the quantized one: name {path!r} "
                    "in skip_modules"
                )

    @cached_property
    def _tensors(self) -> set[int]:
        view = self._view
        return {id(tensor) for tensor in (*view.parameters.values(), *view.buffers.values())}

    def _is_wanted(self, value: Any) -> bool:
        if isinstance(value, nn.Module):
            return value in self._layers
        if isinstance(value, torch.Tensor):
            return id(value) in self._tensors
        # The forward of any module that is streamed is another one later.
        owner, is_forward = value.__self__, value.__func__.__name__ == "forward"
        return isinstance(owner, nn.Module) and (
            owner in self._layers or (is_forward and bool(self._plan.offloaded) and owner in self._view.first_paths)
        )

    def edits(self, layers: Mapping[nn.Module, nn.Module], tensors: Mapping[int, torch.Tensor | None]) -> list[Edit]:
        """Return the assignments that exchange them.

        Args:
            layers: old layer -> new layer.
            tensors: id of each old tensor -> the new one.
        """
        return exchanges(self._aliases, layers, tensors)


def exchanges(
    found: list[Alias], layers: Mapping[nn.Module, nn.Module], tensors: Mapping[int, torch.Tensor | None]
) -> list[Edit]:
    """Return the assignments that put new layers and tensors into the places that hold old ones.

    Args:
        found: the places.
        layers: old layer -> new layer.
        tensors: id of each old tensor -> the new one.
    """

    def new(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return layers.get(value, value)
        if isinstance(value, torch.Tensor):
            return tensors.get(id(value), value)
        if not isinstance(value, types.MethodType) or not isinstance(value.__self__, nn.Module):
            return value
        owner, name = layers.get(value.__self__, value.__self__), value.__func__.__name__
        if name == "forward" and any(held is value for alias in found for held in alias.held):
            return functools.partial(_forward_of, owner)
        return value if owner is value.__self__ else types.MethodType(getattr(type(owner), name), owner)

    return [(alias.slots, alias.key, exchanged(alias.value, new)) for alias in found]


def _forward_of(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the forward that a module has now: offloading, and others, replace it."""
    return module.forward(*args, **kwargs)
