"""Initial values of parameters and buffers, made by the code of their classes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, listed
from .parametrized import explained, taken_off
from .tensors import ModelTensor
from .tree import paths_above
from .view import ModelView

# What torch's and other libraries' modules call the method that gives their tensors initial values.
_METHODS = ("reset_parameters", "_reset_parameters")


def initial_values(view: ModelView, tensors: Sequence[ModelTensor]) -> dict[str, torch.Tensor]:
    """Make initial values on the CPU, with torch's generator. The model is not changed.

    A model of transformers initialises its modules by its own rules (`_init_weights`), other modules by their
    `reset_parameters`, or by that of a module which contains them.

    Returns:
        Values by each tensor's first name.

    Raises:
        CheckpointError: a class does not initialise its tensors.
    """
    waiting = {tensor.name: tensor for tensor in tensors}
    made: dict[str, torch.Tensor] = {}
    while waiting:
        name = next(iter(waiting))
        owner = name.rpartition(".")[0]
        for path in [owner, *reversed(paths_above(owner))]:
            made |= _made_by(view, path, waiting)
            if name in made:
                break
        else:
            raise CheckpointError(_why_not(view, name), missing_keys=[name])
        waiting = {name: tensor for name, tensor in waiting.items() if name not in made}
    return made


def _why_not(view: ModelView, name: str) -> str:
    owner = name.rpartition(".")[0]
    why = explained(view.modules[owner], view.modules[owner.rpartition(".")[0]])
    if why:
        return (
            f"{listed([name])}: {why}, which bigload does not initialise: build its module outside of "
            "init_empty_weights, so that it has values, and do not name it in initialize_missing"
        )
    cls = type(view.modules[owner]).__name__
    return (
        f"{listed([name])}: neither its class {cls} nor a module that contains it has a reset_parameters that "
        "initialises it: give it values before the load"
    )


def rebuilt_by_owners(view: ModelView, tensors: Sequence[ModelTensor]) -> dict[str, torch.Tensor]:
    """Make buffers anew with their owners' `reset_parameters`, where these write them."""
    waiting, made = {tensor.name: tensor for tensor in tensors}, dict[str, torch.Tensor]()
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in waiting):
        with torch.random.fork_rng(devices=[]):
            made |= _made_by(view, owner, waiting, of_transformers=False)
    return made


def seems_unwritten(view: ModelView) -> bool:
    """Whether no real parameter was written to of layers that initialise theirs, as after `to_empty()`."""
    own = [
        parameter
        for module in view.first_paths
        if hasattr(type(module), "reset_parameters")
        for parameter in module._parameters.values()
        if parameter is not None and not parameter.is_meta
    ]
    return bool(own) and not any(parameter._version for parameter in own)


def _made_by(
    view: ModelView, path: str, waiting: Mapping[str, ModelTensor], *, of_transformers: bool = True
) -> dict[str, torch.Tensor]:
    """Initialise what is waiting below a path by the code of the module there; returns what that has written."""
    prefix = f"{path}." if path else ""
    wanted = {name: tensor.value for name, tensor in waiting.items() if name.startswith(prefix)}
    for initialize in _initializers(view, path, of_transformers=of_transformers):
        with torch.device("cpu"), torch.no_grad():
            blank = {name: _blank(value) for name, value in wanted.items()}
            copied = _with_values(view.modules[path], prefix, blank)
            put_on = taken_off(copied, _with_values(view.modules[path], prefix, {}))
            initialize(copied)
            for each in put_on:
                each()
        held = _named(copied, prefix)
        made = {name: held[name].detach() for name in wanted if _is_written(held.get(name), blank[name])}
        if made:
            return made
    return {}


def _initializers(view: ModelView, path: str, *, of_transformers: bool) -> Iterator[Callable[[Any], object]]:
    pretrained = {view.first_paths[model] for model in view.pretrained} if of_transformers else set()
    above = next((each for each in [path, *reversed(paths_above(path))] if each in pretrained), None)
    if above is not None:
        yield view.modules[above]._init_weights  # type: ignore[misc]
    for method in _METHODS:
        if callable(getattr(type(view.modules[path]), method, None)):
            yield operator.methodcaller(method)


def _blank(value: torch.Tensor) -> torch.Tensor:
    data = torch.empty(value.shape, dtype=value.dtype)
    if value.is_floating_point():
        data = torch.full_like(data, torch.nan).clone()  # a new tensor, not written to yet
    return nn.Parameter(data, requires_grad=False) if isinstance(value, nn.Parameter) else data


def _is_written(value: torch.Tensor | None, blank: torch.Tensor) -> bool:
    if value is None or (value is blank and not value._version):
        return False
    return not value.is_meta and not (value.is_floating_point() and bool(value.isnan().any()))


def _with_values(module: nn.Module, prefix: str, values: Mapping[str, torch.Tensor]) -> nn.Module:
    """Copy a module and its children; tensors that are not in `values` are on meta, so that nothing writes to them."""
    new = object.__new__(type(module))
    new.__dict__.update(vars(module))
    for kind in ("_parameters", "_buffers"):
        own: Mapping[str, torch.Tensor | None] = getattr(module, kind)
        new.__dict__[kind] = {
            name: None if t is None else values.get(prefix + name, _on_meta(t)) for name, t in own.items()
        }
    new.__dict__["_modules"] = {
        name: None if child is None else _with_values(child, f"{prefix}{name}.", values)
        for name, child in module._modules.items()
    }
    return new


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    data = torch.empty_like(tensor, device="meta").detach()
    return nn.Parameter(data, requires_grad=False) if isinstance(tensor, nn.Parameter) else data


def _named(module: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {prefix + name: tensor for name, tensor in tensors}
