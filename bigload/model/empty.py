"""Builds models without weights: their parameters are on the meta device."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils.weak import WeakIdKeyDictionary

from .unallocated import Unallocated


class _Building(threading.local):
    """This thread's open `init_empty_weights` blocks, each a map from real parameters to the empty ones.

    Attributes:
        blocks: the maps, the outermost first.
        unallocated: keeps large tensors from being allocated, in the outermost block that leaves buffers real.
    """

    def __init__(self) -> None:
        self.blocks: list[WeakIdKeyDictionary] = []
        self.unallocated: Unallocated | None = None


_building = _Building()


def once(function: Callable[[], None]) -> Callable[[], None]:
    """Make a function run once in a process; threads that call it meanwhile wait.

    For what registers hooks, never to remove them: torch iterates them while other threads build modules.
    """
    lock, has_run = threading.Lock(), False

    @functools.wraps(function)
    def guarded() -> None:
        nonlocal has_run
        with lock:
            if not has_run:
                function()
                has_run = True

    return guarded


@contextmanager
def init_empty_weights(include_buffers: bool = False) -> Iterator[None]:
    """Build modules without weights: each parameter is replaced by one on the meta device when it is registered.

    Parameters of a MiB or more are not allocated at all, unless their values are computed from others. Shared
    parameters stay shared. Buffers stay real: they are small, and often not in the checkpoint. Other threads are not
    affected.

    Args:
        include_buffers: create buffers, and all other tensors, on meta too.

    Examples:
        >>> import bigload
        >>> from torch import nn
        >>> with bigload.init_empty_weights():
        ...     model = nn.Linear(1024, 1024)
        >>> model.weight.device
        device(type='meta')
    """
    _install_hooks()
    unallocated = None if include_buffers or _building.unallocated else Unallocated()
    _building.blocks.append(WeakIdKeyDictionary())
    if unallocated is not None:
        _building.unallocated = unallocated
    try:
        with torch.device("meta") if include_buffers else unallocated or nullcontext():
            yield
            if unallocated is not None:
                unallocated.finish()
    finally:
        _building.blocks.pop()
        if unallocated is not None:
            _building.unallocated = None


@once
def _install_hooks() -> None:
    register_module_parameter_registration_hook(_to_meta)  # type: ignore[arg-type]
    register_module_buffer_registration_hook(_to_real)


def _to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """Return the empty parameter to register instead, or None to keep the real one."""
    if not _building.blocks or parameter is None or parameter.is_meta:
        return None
    if isinstance(parameter, nn.UninitializedParameter):
        return None
    empty = _building.blocks[0]  # the outermost block's, so that nested ones share
    if parameter not in empty:
        empty[parameter] = like_parameter(parameter, torch.empty_like(parameter.data, device="meta"))
    return empty[parameter]  # type: ignore[no-any-return]


def _to_real(module: nn.Module, name: str, buffer: torch.Tensor | None) -> None:
    """Allocate a buffer that is not yet: it stays real."""
    if _building.unallocated is not None and buffer is not None:
        _building.unallocated.make_real(buffer)


_default = threading.RLock()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set torch's default dtype. It is global to all threads, so a lock lets only one of ours set it at a time."""
    with _default, default_dtype_set_to(dtype):
        yield


@contextmanager
def default_dtype_set_to(dtype: torch.dtype) -> Iterator[None]:
    """Set torch's default dtype, without the lock: for what may take long, or starts threads."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def like_parameter(parameter: nn.Parameter, data: torch.Tensor) -> nn.Parameter:
    """Return a parameter with other data, and the class, attributes and requires_grad of this one."""
    new = torch.Tensor._make_subclass(type(parameter), data, parameter.requires_grad)
    new.__dict__.update(parameter.__dict__)
    return new
