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
from ..hardware.interrupts import interruptible
from ..inspection.aliases import Alias, aliases, exchanged
from ..inspection.outer_names import is_a
from ..model.quantizable_experts import weights_of
from ..model.view import ModelView
from ..planning.plan import Plan
from .attributes import Edit


class HeldElsewhere:
    """The places of a model that hold layers, tensors or bound methods which a load replaces."""

    def __init__(self, view: ModelView, plan: Plan) -> None:
        """Find them. The model is not changed.

        Raises:
            ConfigError: a weight that is to be quantized is held outside its layer, or the module of its experts.
        """
        self._view, self._plan = view, plan
        self._layers = set(plan.layers.values())
        self._experts = {view.modules[path] for path in plan.experts}
        self._aliases = aliases(view.first_paths, self._is_wanted)
        weights = {}
        if self._aliases:
            weights = {id(layer._parameters["weight"]): path for path, layer in plan.layers.items()}
            weights |= {id(view.parameters[name]): path for name, (path, _) in weights_of(plan.experts).items()}
        for alias in self._aliases:
            for path in (path for held in alias.held if (path := weights.get(id(self._whole(held))))):
                raise ConfigError(
                    f"{alias.name!r} holds the weight of {path!r}, and would go on to hold the unquantized one: name "
                    f"{path!r} in skip_modules"
                )

    @cached_property
    def _tensors(self) -> dict[int, torch.Tensor]:
        """The model's tensors by their memory; several that share it are left out, since a view may be of any."""
        found: dict[int, torch.Tensor | None] = {}
        for tensor in (*self._view.parameters.values(), *self._view.buffers.values()):
            if tensor is not None and tensor is not found.setdefault(_memory(tensor), tensor):
                found[_memory(tensor)] = None
        return {memory: tensor for memory, tensor in found.items() if tensor is not None}

    @cached_property
    def _ids(self) -> set[int]:
        view = self._view
        return {id(tensor) for tensor in (*view.parameters.values(), *view.buffers.values())}

    def _whole(self, held: Any) -> Any:
        """Return the tensor of the model that a held one is, or is a view of."""
        is_other = isinstance(held, torch.Tensor) and id(held) not in self._ids
        return self._tensors.get(_memory(held)) if is_other else held

    def _is_wanted(self, value: Any) -> bool:
        if isinstance(value, nn.Module):
            return value in self._layers
        if isinstance(value, torch.Tensor):
            return id(value) in self._ids or _memory(value) in self._tensors
        # The forward of quantized experts, and of any module that is streamed, is another one later.
        owner, is_forward = value.__self__, getattr(value.__func__, "__name__", "") == "forward"
        if not isinstance(owner, nn.Module):
            return False
        is_replaced = owner in self._experts or (bool(self._plan.offloaded) and owner in self._view.first_paths)
        return owner in self._layers or (is_forward and is_replaced)

    def edits(self, layers: Mapping[nn.Module, nn.Module], tensors: Mapping[int, torch.Tensor | None]) -> list[Edit]:
        """Return the assignments that exchange them.

        Args:
            layers: old layer -> new layer.
            tensors: id of each old tensor -> the new one.
        """
        held = (each for alias in self._aliases for each in alias.held if isinstance(each, torch.Tensor))
        views = {
            id(view): _like(view, old, new)
            for view in held
            if id(view) not in tensors
            and (old := self._tensors.get(_memory(view))) is not None
            and (new := tensors.get(id(old))) is not None
        }
        return exchanges(self._aliases, layers, {**tensors, **views})


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
        if is_a(value, nn.Module):
            return layers.get(value, value)
        if is_a(value, torch.Tensor):
            return tensors.get(id(value), value)
        if not is_a(value, types.MethodType) or not is_a(value.__self__, nn.Module):
            return value
        owner, name = layers.get(value.__self__, value.__self__), getattr(value.__func__, "__name__", "")
        if name == "forward" and any(held is value for alias in found for held in alias.held):
            return functools.partial(_forward_of, owner)
        if owner is value.__self__:
            return value
        return types.MethodType(getattr(type(owner), name, value.__func__), owner)

    return [(alias.slots, alias.key, exchanged(alias.value, new)) for alias in interruptible(found)]


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _like(view: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Return the view of a new tensor that another one is of the old tensor."""
    if new.shape != old.shape or new.stride() != old.stride():
        return view
    offset = new.storage_offset() + view.storage_offset() - old.storage_offset()
    made = torch.as_strided(new.detach(), view.shape, view.stride(), offset)
    return nn.Parameter(made, view.requires_grad) if isinstance(view, nn.Parameter) else made


def _forward_of(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the forward that a module has now: offloading, and others, replace it."""
    return module.forward(*args, **kwargs)
