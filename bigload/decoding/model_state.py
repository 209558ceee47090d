"""What captured graphs rely on in a model: where its tensors are, and that none of its code was exchanged."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from ..hardware.nested_tensors import tensors_in
from ..offload.leaves import without_torch_function
from .calls import is_state
from .held_values import HeldValues

# What users switch in a config, and the code of the model looks up in each forward.
_SWITCHES = ("_attn_implementation", "return_dict")
# What `generate` switches for the steps alone, and back for each prompt.
_OF_STEPS = "_experts_implementation"


# Attributes of torch's own.
_OWN = frozenset(vars(nn.Module()))


class HeldTensors:
    """The tensors that modules hold as attributes, and in lists, dicts and objects that are attributes."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._before = model, _held(model)

    def change(self) -> str | None:
        """Say where another tensor is now; None if nowhere. A replay would not put it there."""
        now = _held(self._model)
        for place in {**self._before, **now}:
            before, after = self._before.get(place, []), now.get(place, [])
            if len(before) != len(after) or any(one is not two for one, two in zip(before, after, strict=True)):
                path, name = place
                return f"it puts another tensor into {name!r} of {path or 'the model'!r}, instead of writing to it"
        return None


def _held(model: nn.Module) -> dict[tuple[str, str], list[torch.Tensor]]:
    found: dict[tuple[str, str], list[torch.Tensor]] = {}
    for path, module in model.named_modules():
        for name, value in (*vars(module).items(), *module._buffers.items()):
            if name not in _OWN and (tensors := [*_tensors_of(value)]):
                found[path, name] = tensors
    return found


def _tensors_of(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, (torch.Tensor, list, tuple, dict)):
        yield from tensors_in(value)
    elif type(value).__module__.startswith("bitsandbytes"):
        return  # what it notes of its layers, of which the tensors that count are compared by themselves
    elif is_state(value):
        yield from tensors_in([*vars(value).values()])


class ModelState:
    """A model as it was when it was captured. To compare takes tens of microseconds, in each step."""

    def __init__(self, model: nn.Module) -> None:
        modules = [*model.modules()]
        tables = [table for module in modules for table in (module._modules, module._parameters, module._buffers)]
        with without_torch_function():
            tensors = [tensor for table in tables for tensor in table.values() if isinstance(tensor, torch.Tensor)]
        self._tables = HeldValues(tables)
        self._tensors = tensors
        hooks = [hooks for module in modules[1:] for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._hooks, self._no_hooks = [each for each in hooks if each], [each for each in hooks if not each]
        self._own = [vars(module) for module in modules[1:]]
        # Tensors that are attributes of modules, and those of quantized weights, which are no parameters: by their name
        # what holds them.
        self._attributes: dict[str, list[dict[str, Any]]] = {}
        for module in modules:
            self._add_attributes(vars(module))
            self._add_attributes(getattr(vars(module).get("state"), "__dict__", {}), ("CB", "SCB"))  # of int8
            for parameter in module._parameters.values():
                quant_state = getattr(parameter, "quant_state", None)
                while quant_state is not None:
                    self._add_attributes(vars(quant_state))
                    quant_state = getattr(quant_state, "state2", None)
        # What may hold tensors of a step, in lists and objects.
        self._holders = [
            value
            for module in modules
            for name, value in vars(module).items()
            if name not in _OWN and not isinstance(value, torch.Tensor) and [*_tensors_of(value)]
        ]
        configs = {id(config): config for module in modules if (config := vars(module).get("config")) is not None}
        self._configs = [*configs.values()]
        self._before = self._now()
        self._pointers = Pointers(self._held())

    def _add_attributes(self, held: dict[str, Any], names: tuple[str, ...] = ()) -> None:
        for name, value in held.items():
            if isinstance(value, torch.Tensor) and (not names or name in names):
                self._attributes.setdefault(name, []).append(held)

    def _held(self) -> list[torch.Tensor]:
        tensors = [*self._tensors]
        for name, held in self._attributes.items():
            tensors += map(itemgetter(name), held)
        return tensors

    def _now(self) -> list[Any]:
        inside = [id(tensor) for holder in self._holders for tensor in _tensors_of(holder)]
        forwards = [*map(dict.get, self._own, repeat("forward"))]
        switches = [repr(getattr(config, name, None)) for config in self._configs for name in _SWITCHES]
        everywhere = nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks
        return [inside, forwards, switches, any(self._no_hooks), [*map(len, (*self._hooks, *everywhere))]]

    def of_steps(self) -> tuple[str, ...]:
        """Return what the model's configs say for a step alone: graphs of other steps are kept meanwhile."""
        return tuple(repr(getattr(config, _OF_STEPS, None)) for config in self._configs)

    def is_same(self) -> bool:
        """Whether nothing has changed since that graphs rely on."""
        try:
            return self._tables.are_same() and self._now() == self._before and self._pointers.are_of(self._held())
        except (KeyError, TypeError, RuntimeError):  # an attribute that was a tensor is none now
            return False


class Pointers:
    """Where tensors were in memory."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._pointers, self._indices = _pointers_of(tensors), [*range(len(tensors))]
        # Of torch where it supports GPUs, whose own graphs ask it in each replay: it takes half the time.
        self._compare = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)

    def are_of(self, tensors: list[torch.Tensor]) -> bool:
        """Whether tensors, as many as those, are where they were."""
        if self._compare is None:
            return _pointers_of(tensors) == self._pointers
        return bool(self._compare(tensors, self._pointers, self._indices))


def _pointers_of(tensors: list[torch.Tensor]) -> list[int]:
    with torch._C.DisableTorchFunctionSubclass():
        return [*map(torch.Tensor.data_ptr, tensors)]
