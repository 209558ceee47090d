"""The attention masks of decode steps, made by the graph that uses them.

Before each step, `generate` makes a mask of its own, by some twenty small operations, while the GPU waits. While steps
are captured, it gets what stands for one: a graph makes it from the mask of the prompt and the tokens so far, by the
same function; for a step that is not captured it is made as before.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..offload.leaves import MethodOverride
from .constants import ConstantsInGraph

NAME = "create_masks_for_generate"
# What a mask is made from where there is a cache; of all else, what is given must be None or False.
_MADE_FROM = frozenset({"config", "inputs_embeds", "attention_mask", "cache", "past_key_values", "position_ids"})


class DeferredMask:
    """What stands for the mask of one step.

    Attributes:
        given: (batch, tokens so far), which tokens count; None for all.
        length: tokens that the cache has room for.
        key: equal for masks that one graph can make.
    """

    def __init__(self, make: Callable[..., Any], arguments: Mapping[str, Any], length: int) -> None:
        self._make, self._arguments, self.length = make, arguments, length
        self.given: torch.Tensor | None = arguments["attention_mask"]
        stub = arguments["inputs_embeds"]
        self.key = (length, stub.shape, stub.dtype, stub.device, id(arguments["config"]))

    def made(self) -> Any:
        """Make the mask."""
        return self._make(**self._arguments)

    def place(self) -> MaskPlace:
        """Return a place for `given` of any step."""
        stub = self._arguments["inputs_embeds"]
        return MaskPlace(torch.zeros((stub.shape[0], self.length), dtype=torch.bool, device=stub.device))

    def made_from(self, place: MaskPlace) -> Any:
        """Make the mask from what is in that place, without waiting for the device."""
        with ConstantsInGraph(place.tensor.device):
            return self._make(**(dict(self._arguments) | {"attention_mask": place.tensor}))


class MaskPlace:
    """Where a graph finds which tokens count; those after the token of a step do not, whatever is there.

    Attributes:
        tensor: (batch, length), boolean.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self._filled = tensor, 0

    def fill(self, mask: DeferredMask) -> None:
        """Put in what a step is given."""
        given, length = mask.given, self.tensor.shape[1] + 1
        count = length if given is None else given.shape[1]
        if given is None and self._filled < length:
            self.tensor.fill_(True)
        elif given is not None:
            if count < self._filled:
                self.tensor.zero_()
            self.tensor[:, :count].copy_(given)
        self._filled = count


def made(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a step with the masks that are deferred made."""
    if not any(type(value) is DeferredMask for value in arguments.values()):
        return arguments
    return {name: value.made() if type(value) is DeferredMask else value for name, value in arguments.items()}


class DeferringMasks(MethodOverride):
    """Has a model of transformers defer the masks of its decode steps."""

    def __init__(self, model: nn.Module, make: Callable[..., Any]) -> None:
        self._make, self._is_stopped = make, False
        self._latest: tuple[Any, int | None] = (lambda: None, None)
        super().__init__(model, NAME)

    def __call__(self, **arguments: Any) -> Any:
        """Return a mask, or what stands for it."""
        length = self._length_of(arguments)
        return self._make(**arguments) if length is None else DeferredMask(self._make, arguments, length)

    def stop(self) -> None:
        """Make all masks as before: a graph cannot make those of this model."""
        self._is_stopped = True

    def _length_of(self, arguments: Mapping[str, Any]) -> int | None:
        stub, given = arguments.get("inputs_embeds"), arguments.get("attention_mask")
        if self._is_stopped or stub is None or stub.shape[1] != 1 or "attention_mask" not in arguments:
            return None
        if any(value is not None and value is not False for name, value in arguments.items() if name not in _MADE_FROM):
            return None
        if not _is_passed_on(self.module):
            return None
        cache = arguments.get("cache", arguments.get("past_key_values"))
        if self._latest[0]() is not cache or cache is None:
            self._latest = (weakref.ref(cache) if cache is not None else lambda: None), _room_in(cache)
        length = self._latest[1]
        if length is None or given is None:
            return length
        suits = isinstance(given, torch.Tensor) and given.dim() == 2 and given.device == stub.device
        return length if suits and given.shape[1] <= length else None


def deferring(model: nn.Module) -> DeferringMasks | None:
    """Have a model defer its masks; None for one that is not of transformers, or makes them in its own way."""
    made_by = sys.modules.get("transformers.generation.utils")
    make = getattr(made_by, NAME, None)
    return None if make is None or hasattr(model, NAME) or not _is_passed_on(model) else DeferringMasks(model, make)


def _is_passed_on(model: nn.Module) -> bool:
    """Whether nothing but the model itself gets the masks that `generate` makes."""
    usual = getattr(sys.modules.get("transformers.generation.utils"), "GenerationMixin", None)
    name = "prepare_inputs_for_generation"
    if getattr(type(model), name, None) is not getattr(usual, name, None) or name in vars(model):
        return False
    if not isinstance(vars(model).get("forward"), MethodOverride) or type(model).__call__ is not nn.Module.__call__:
        return False  # around the method that replays steps there is another one
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return False
    hooks = (*model._forward_pre_hooks.values(), *model._forward_hooks.values())
    return all((getattr(hook, "__module__", None) or "").startswith("bigload.") for hook in hooks)


def _room_in(cache: Any) -> int | None:
    """Return how many tokens a static cache has room for; None if some of its layers count them in Python."""
    layers = getattr(cache, "layers", None)
    if not layers or not getattr(cache, "is_initialized", False):
        return None
    rooms = {getattr(layer, "max_cache_len", None) for layer in layers}
    in_tensors = all(
        isinstance(vars(layer).get("cumulative_length"), torch.Tensor) and not getattr(layer, "is_sliding", False)
        for layer in layers
    )
    room = rooms.pop() if len(rooms) == 1 else None
    return room if in_tensors and isinstance(room, int) else None
