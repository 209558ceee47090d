"""Parametrized weights, such as weight_norm's: taken off for a while, so that a class can initialise what it knows.

`reset_parameters` of a Linear writes to its `weight`. If that is computed of others (`original0`, `weight_g` ..), these
are what is stored, and get their values from the weight as when the parametrization was registered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm

Undo = Callable[[], None]


def taken_off(copied: nn.Module, on_meta: nn.Module) -> list[Undo]:
    """Take parametrizations off a copy of a module and of its children; their weights are NaN until they are written.

    Args:
        copied: changed. What is to be initialised is not on meta.
        on_meta: the same module, all of its tensors on meta.

    Returns:
        What puts them on again, with the values that the weights have got by then.
    """
    undo = []
    for module, same in zip(list(copied.modules()), list(on_meta.modules()), strict=True):
        if all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
            continue
        if parametrize.is_parametrized(module):
            with suppress(Exception):  # one that cannot be computed on meta is left as it is
                weights = {name: getattr(same, name) for name in same.parametrizations}  # type: ignore[union-attr]
                undo.append(_without_parametrizations(module, weights))
        for hook in _weight_norms(module):
            undo.append(_without_weight_norm(module, hook))
    return undo


def explained(module: nn.Module, above: nn.Module) -> str:
    """Say that a module's tensors belong to a parametrization; empty if they do not.

    Args:
        module: the module.
        above: the one that contains it.
    """
    for each in (module, above):
        if isinstance(each, parametrize.ParametrizationList):
            return f"of a parametrization by {', '.join(type(one).__name__ for one in each)}"
    hooks = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
    found = [name for name in hooks if name in ("SpectralNorm", "WeightNorm")]
    return f"computed by {found[0]}" if found else ""


def _without_parametrizations(module: Any, weights: dict[str, torch.Tensor]) -> Undo:
    cls, lists = type(module), module._modules.pop("parametrizations")
    module.__class__ = parametrize.type_before_parametrizations(module)
    made = {name: _blank(weight) for name, weight in weights.items()}
    module._parameters.update(made)

    def put_on() -> None:
        for name in made:
            _put_into(lists[name], module._parameters.pop(name))
        module.__class__ = cls
        module._modules["parametrizations"] = lists

    return put_on


def _put_into(originals: Any, weight: torch.Tensor) -> None:
    """Give the originals of a weight their values, as `ParametrizationList` does when it is made."""
    if weight.isnan().any():
        return
    values: Any = weight
    for one in reversed(originals):
        with suppress(NotImplementedError):
            values = one.right_inverse(values) if hasattr(one, "right_inverse") else values
    named = {"original": values} if originals.is_tensor else {f"original{n}": v for n, v in enumerate(values)}
    for name, value in named.items():
        kind = "_parameters" if name in originals._parameters else "_buffers"
        getattr(originals, kind)[name] = nn.Parameter(value.detach().clone(), requires_grad=False)


def _weight_norms(module: nn.Module) -> Iterator[WeightNorm]:
    return (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm))


def _without_weight_norm(module: Any, hook: WeightNorm) -> Undo:
    name = hook.name
    g, v = (module._parameters.pop(f"{name}_{part}") for part in "gv")
    vars(module).pop(name, None)
    module._parameters[name] = _blank(v)

    def put_on() -> None:
        weight = module._parameters.pop(name)
        has_values = not weight.isnan().any()
        norm = torch.norm_except_dim(weight, 2, hook.dim) if has_values else g
        module._parameters[f"{name}_g"] = nn.Parameter(norm, requires_grad=False)
        module._parameters[f"{name}_v"] = nn.Parameter(weight.detach() if has_values else v, requires_grad=False)

    return put_on


def _blank(like: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(torch.full(like.shape, torch.nan, dtype=like.dtype, device="cpu"), requires_grad=False)
