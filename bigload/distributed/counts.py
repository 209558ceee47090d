"""How many values a divided model has. transformers and PEFT would count the bytes of its quantized weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from torch import nn

from .shards import QuantizedShard, shard_of


def count_values(model: nn.Module, root: nn.Module) -> None:
    """Let a divided model count as it would in one process.

    Both libraries double what a parameter of bitsandbytes' class holds, but FSDP shows DTensors, whose bytes include
    scales and padding.

    Args:
        model: gets a `num_parameters`, if its class has one.
        root: the same, or what adapters have made of it: gets PEFT's `get_nb_trainable_parameters`.
    """
    if hasattr(type(model), "num_parameters"):  # of transformers and diffusers
        own: Any = model.num_parameters
        vars(model)["num_parameters"] = functools.partial(_num_parameters, model, own)
    if hasattr(type(root), "get_nb_trainable_parameters"):
        own = root.get_nb_trainable_parameters
        vars(root)["get_nb_trainable_parameters"] = functools.partial(_trainable_and_all, root, own)


def _num_parameters(
    model: nn.Module, own: Callable[..., int], only_trainable: bool = False, *args: Any, **given: Any
) -> int:
    count = own(only_trainable, *args, **given)
    return count if only_trainable else count + _not_counted(model)


def _trainable_and_all(model: nn.Module, own: Callable[[], tuple[int, int]]) -> tuple[int, int]:
    trainable, count = own()
    return trainable, count + _not_counted(model)


def _not_counted(model: nn.Module) -> int:
    """Return how many more values quantized weights have than their shards claim; none of them is trained."""
    found = ((shard_of(parameter), parameter.numel()) for parameter in model.parameters())
    return sum(math.prod(own.whole.shape) - claimed for own, claimed in found if isinstance(own, QuantizedShard))
