"""The tensors in nested tuples, lists and dicts, such as the arguments of a forward: listed, changed, moved."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """List the tensors in tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from tensors_in(inner)
    elif _is_table(value):
        for inner in value.values():
            yield from tensors_in(inner)


def is_on(value: Any, device: torch.device) -> bool:
    """Whether all tensors in tuples, lists and dicts are on a device."""
    if isinstance(value, torch.Tensor):
        return value.device == device
    if isinstance(value, PackedSequence):
        return value.data.device == device  # its batch_sizes are on the CPU, wherever it is
    if isinstance(value, (list, tuple)):
        return all(is_on(inner, device) for inner in value)
    return not _is_table(value) or all(is_on(inner, device) for inner in value.values())


def send_to_device(values: Any, device: torch.device) -> Any:
    """Move the tensors in tuples, lists and dicts to a device; where all are there, the same object is returned."""
    return values if is_on(values, device) else map_tensors(values, once(partial(to_device, device=device)))


def once(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Change a tensor that is given several times once: nn.MultiheadAttention asks whether query and key are the same.

    Returns:
        A function for one call of `map_tensors`, while which the tensors are held.
    """
    changed: dict[int, torch.Tensor] = {}

    def change_once(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in changed:
            changed[id(tensor)] = change(tensor)
        return changed[id(tensor)]

    return change_once


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Change the tensors in tuples, lists and dicts; other objects, such as caches, stay as they are."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, PackedSequence):
        first, sizes, *order = value
        return type(value)(change(first), sizes, *(map_tensors(inner, change) for inner in order))
    if type(value) in (list, tuple):
        return type(value)(map_tensors(inner, change) for inner in value)
    if isinstance(value, (list, tuple)):
        return of_class(value, [map_tensors(inner, change) for inner in value])
    if _is_table(value):
        return with_values(value, {key: map_tensors(inner, change) for key, inner in value.items()})
    return value


def _is_table(value: Any) -> bool:
    """Whether a value is a dict, or one as transformers' BatchEncoding is. (isinstance is slow for the latter.)"""
    return isinstance(value, dict) or UserDict in type(value).__mro__


def of_class(old: Any, items: list[Any]) -> Any:
    """Make a list or tuple of the class of another one: a named tuple, what `max(dim=0)` returns, one of others."""
    if isinstance(old, list):
        made = copy.copy(old)
        made[:] = items
        return made
    if hasattr(old, "n_sequence_fields"):  # of torch, whose classes allow no other way
        return type(old)(items)
    made = tuple.__new__(type(old), items)
    getattr(made, "__dict__", {}).update(getattr(old, "__dict__", {}))
    return made


def with_values(table: Any, values: Mapping[Any, Any]) -> Any:
    """Copy a dict of any class, such as transformers' outputs, and replace the values of some keys."""
    made = copy.copy(table)
    for key, value in values.items():
        made[key] = value
    return made


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move a tensor to a device, where it has to be moved."""
    if tensor.device == device:
        return tensor
    # Asynchronously between GPUs only: a copy to the CPU would be read before it is complete, and a tensor on the CPU
    # could change before it has been copied.
    return tensor.to(device, non_blocking=tensor.device.type == device.type != "cpu")
