"""Models without weights: parameters on the meta device, shapes without memory; and the dtype they are built in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary


class _Building(threading.local):
    """The `init_empty_weights` blocks that this thread is in: real parameter -> the empty one in its place."""

    def __init__(self) -> None:
        self.blocks: list[WeakIdKeyDictionary] = []


_building = _Building()
_installing = threading.Lock()
_installed = False


@contextmanager
def init_empty_weights(include_buffers: bool = False) -> Iterator[None]:
    """Build modules whose parameters take no memory: each goes to the meta device as it is registered.

    Parameters that are shared stay shared, buffers stay real (they are small, and often not in any checkpoint),
    and modules built in other threads meanwhile are left alone.

    Args:
        include_buffers: put buffers on meta too, as all else that is created inside.
    """
    _install_hook()
    _building.blocks.append(WeakIdKeyDictionary())
    try:
        with torch.device("meta") if include_buffers else nullcontext():
            yield
    finally:
        _building.blocks.pop()


def _install_hook() -> None:
    """Put the hook in place once and for good: torch iterates its hooks while other threads build modules."""
    global _installed
    with _installing:
        if not _installed:
            register_module_parameter_registration_hook(_to_meta)  # type: ignore[arg-type]
            _installed = True


def _to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """Return the empty parameter to register, or None to leave the one there is."""
    if not _building.blocks or parameter is None or parameter.is_meta:
        return None
    if isinstance(parameter, nn.UninitializedParameter):
        return None
    empty = _building.blocks[0]  # the outermost block's, so that nested ones share
    if parameter not in empty:
        empty[parameter] = like_parameter(parameter, torch.empty_like(parameter.data, device="meta"))
    return empty[parameter]  # type: ignore[no-any-return]


_default = threading.RLock()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make tensors in a dtype where none is named. torch has one default for all threads, so ours take turns."""
    with _default:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def like_parameter(parameter: nn.Parameter, data: torch.Tensor) -> nn.Parameter:
    """Make a parameter around other data, with the class, attributes and requires_grad of this one."""
    new = torch.Tensor._make_subclass(type(parameter), data, parameter.requires_grad)
    new.__dict__.update(parameter.__dict__)
    return new
