"""Weights at rest in host memory: one piece for each group of layers that come to the device together."""

from __future__ import annotations

import logging
import mmap
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch

from ..sizes import show
from .allocation import advise_huge_pages
from .layout import Layout, TensorSpec, in_mapping

logger = logging.getLogger(__name__)

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every GPU


class Store:
    """Where a group's parts rest.

    Attributes:
        layout: where the parts lie in a slot.
        tensors: the parts at rest, by name, which the model's tensors view while they are not on the device.
    """

    layout: Layout
    tensors: dict[str, torch.Tensor]

    def source_of(self, name: str) -> torch.Tensor:
        """Return the values of one part, to copy."""
        return self.tensors[name]

    def read_into(self, memory: torch.Tensor) -> None:
        """Bring all parts to where the layout has them in host memory, (layout.nbytes or more,), uint8."""
        raise NotImplementedError

    def at_rest(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the twin at rest of a part that lies in a slot."""
        begin = tensor.storage_offset() * tensor.itemsize
        return next(self.tensors[name] for name, offset in self.layout.offsets.items() if offset == begin)

    def require_unchanged(self) -> None:
        """Refuse parts that are not what they were.

        Raises:
            OffloadError: says why.
        """

    def release(self) -> None:
        """Let go of the parts; their memory is freed when nobody views it any more."""
        self.tensors = {}


class HostGroup(Store):
    """A group's parts in one piece of host memory of just their size, pinned if a GPU is to read it.

    Attributes:
        layout: where the parts lie.
        tensors: the parts, by name: to be filled, and viewed by the model's tensors at rest.
        is_pinned: the GPU reads it at the full speed of the link, while the host does something else.
    """

    @torch.inference_mode(False)
    def __init__(self, parts: Mapping[str, TensorSpec], device: torch.device) -> None:
        """Make room for parts.

        Args:
            parts: what they are, by name.
            device: where they will be brought.
        """
        self.layout = Layout(parts)
        self._mapping = _Mapping(-1, max(self.layout.nbytes, 1))
        self._memory = torch.frombuffer(self._mapping, dtype=torch.uint8)[: self.layout.nbytes]
        advise_huge_pages(self._memory)
        self._unpin: Callable[[], object] | None = None
        if device.type == "cuda":
            self._memory.zero_()  # on all cores; pinning would touch the pages on one
            self._unpin = _pin(self._mapping, self._memory, device)
        self.is_pinned = self._unpin is not None
        # Each in a storage of its own: torch.save refuses tensors of several dtypes in one.
        self.tensors = {
            name: in_mapping(self._mapping, part.dtype, self.layout.offsets[name], part.shape)
            for name, part in parts.items()
        }

    @property
    def source(self) -> torch.Tensor:
        """The bytes to bring to the device, (layout.nbytes,), uint8."""
        return self._memory

    def read_into(self, memory: torch.Tensor) -> None:
        """Copy the source."""
        memory[: self.layout.nbytes].copy_(self.source)

    def source_of(self, name: str) -> torch.Tensor:
        """Return one part of the source."""
        return self.layout.views(self.source)[name]

    def release(self) -> None:
        """Let go of the memory: unpinned now, freed when nobody views it any more."""
        if self._unpin is not None:
            self._unpin()
        self.is_pinned = False
        self.tensors = {}
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._mapping = _Mapping(-1, 1)


class _Mapping(mmap.mmap):
    """Memory of just the size that is asked for; torch's own, if pinned, is rounded up to a power of two."""


def _pin(mapping: _Mapping, memory: torch.Tensor, device: torch.device) -> Callable[[], object] | None:
    """Pin the memory of a mapping.

    Args:
        mapping: before it is unmapped, when nobody views it any more, it is unpinned.
        memory: (n,), uint8, in the mapping.
        device: a GPU that will read it.

    Returns:
        What unpins it now. None where the system does not allow to pin it.
    """
    address, nbytes = memory.data_ptr(), memory.numel()
    if not nbytes:
        return None
    try:
        with torch.cuda.device(device):
            torch.cuda.check_error(_cudart().cudaHostRegister(address, nbytes, _PORTABLE))
    except RuntimeError as error:
        with suppress(RuntimeError):
            torch.zeros(1, device=device)  # the next launch reports what failed before, and forgets it
        _warn_of_pageable_memory(nbytes, error)
        return None
    unpin = weakref.finalize(mapping, _unregister, address, device)
    unpin.atexit = False  # the system does it then, and CUDA may be gone
    return unpin


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _unregister(address: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # copies may read it still
    with torch.cuda.device(device):
        _cudart().cudaHostUnregister(address)


def pinned_memory(nbytes: int, at_least: int | None = None) -> torch.Tensor:
    """Allocate memory by torch, pinned as far as the system allows it.

    Args:
        nbytes: how much.
        at_least: the smallest size of use: where the system does not pin `nbytes`, half as much is tried, and so on.
            None: all or nothing.

    Returns:
        (nbytes,), uint8; pinned memory may be shorter, down to `at_least`. Pageable, with a warning, where the system
        does not pin even that.
    """
    least, size = nbytes if at_least is None else at_least, nbytes
    while True:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            size //= 2
            if size < max(least, 1):
                _warn_of_pageable_memory(least, error)
                return torch.empty(nbytes, dtype=torch.uint8)


_has_warned = False


def _warn_of_pageable_memory(nbytes: int, error: Exception) -> None:
    global _has_warned
    if not _has_warned:
        _has_warned = True
        logger.warning(
            "%s of host memory cannot be pinned (%s); copies to and from the GPU will be slower. "
            "Raise the limit of locked memory (ulimit -l)",
            show(nbytes),
            str(error).partition("\n")[0],
        )
