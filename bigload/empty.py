"""Models without weights: parameters on the meta device, which has shapes and no memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary


@contextmanager
def init_empty_weights(include_buffers: bool = False) -> Iterator[None]:
    """Build modules whose parameters take no memory: each goes to the meta device as it is registered.

    Parameters that are shared stay shared, buffers stay real (they are small, and often not in any checkpoint),
    and modules built in other threads meanwhile are left alone.

    Args:
        include_buffers: put buffers on meta too, as all else that is created inside.
    """
    owner = threading.get_ident()
    empty: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if threading.get_ident() != owner or parameter is None or parameter.is_meta:
            return None  # leaves it as it is
        if isinstance(parameter, nn.UninitializedParameter):
            return None
        if parameter not in empty:
            empty[parameter] = like_parameter(parameter, torch.empty_like(parameter.data, device="meta"))
        return empty[parameter]  # type: ignore[no-any-return]

    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        if include_buffers:
            with torch.device("meta"):
                yield
        else:
            yield
    finally:
        hook.remove()


def like_parameter(parameter: nn.Parameter, data: torch.Tensor) -> nn.Parameter:
    """Make a parameter around other data, with the class, attributes and requires_grad of this one."""
    new = torch.Tensor._make_subclass(type(parameter), data, parameter.requires_grad)
    new.__dict__.update(parameter.__dict__)
    return new
