"""Offloaded weights in pinned host memory: one block for each group of layers that is copied at once."""

from __future__ import annotations

import logging
import mmap
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch

from ..notation import show
from .allocation import advise_huge_pages
from .layout import Layout, TensorSpec, in_mapping

logger = logging.getLogger(__name__)

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every GPU


class Store(ABC):
    """What holds the offloaded weights of a group of layers.

    Attributes:
        layout: the offsets of the weights' parts in a slot on the device.
        tensors: the parts, by name; the model's tensors share their memory while they are not on the device.
    """

    layout: Layout
    tensors: dict[str, torch.Tensor]

    def source_of(self, name: str) -> torch.Tensor:
        """Return one part's values, to be copied."""
        return self.tensors[name]

    @abstractmethod
    def read_into(self, memory: torch.Tensor) -> None:
        """Copy all parts to their offsets in host memory: (layout.nbytes or more,), uint8."""

    @abstractmethod
    def read_slice(self, name: str, index: int, count: int, memory: torch.Tensor) -> None:
        """Copy one of `count` slices, of the same size, of a part to host memory: (bytes,), uint8."""

    def at_rest(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the part in the store of which `tensor` is the copy in a slot."""
        begin = tensor.storage_offset() * tensor.itemsize
        return next(self.tensors[name] for name, offset in self.layout.offsets.items() if offset == begin)

    def use_written(self, name: str) -> None:  # noqa: B027 - what most stores need not do
        """Take note that a part's tensor was written to: those values count from now on."""

    def require_unchanged(self) -> None:  # noqa: B027
        """Check that the parts are still what they were when the store was made.

        Raises:
            OffloadError: they changed or are gone.
        """

    def release(self) -> None:
        """Drop the parts; their memory is freed with the last view of it."""
        self.tensors = {}


class HostGroup(Store):
    """A store in one block of host memory of exactly the parts' size, pinned where a GPU is to read it.

    Attributes:
        layout: the offsets of the parts, here as in a slot.
        tensors: the parts, by name; uninitialized until the caller fills them.
        is_pinned: whether a GPU can copy from it asynchronously, at the full speed of the link.
    """

    @torch.inference_mode(False)
    def __init__(self, parts: Mapping[str, TensorSpec], device: torch.device) -> None:
        """Allocate and, for a GPU, pin the memory.

        Args:
            parts: dtype and shape of each part, by name.
            device: where the parts will be copied to.
        """
        self.layout = Layout(parts)
        self._mapping = _Mapping(-1, max(self.layout.nbytes, 1))
        self._memory = torch.frombuffer(self._mapping, dtype=torch.uint8)[: self.layout.nbytes]
        advise_huge_pages(self._memory)
        self._slices: dict[tuple[str, int], tuple[torch.Tensor, ...]] = {}
        self._unpin: Callable[[], object] | None = None
        if device.type == "cuda":
            self._memory.zero_()  # touches the pages on all cores; pinning would touch them on one
            self._unpin = _pin(self._mapping, self._memory, device)
        self.is_pinned = self._unpin is not None
        # Each has its own storage: torch.save refuses tensors of several dtypes in one.
        self.tensors = {
            name: in_mapping(self._mapping, part.dtype, self.layout.offsets[name], part.shape)
            for name, part in parts.items()
        }

    @property
    def source(self) -> torch.Tensor:
        """The whole block, to be copied to the device: (layout.nbytes,), uint8."""
        return self._memory

    def read_into(self, memory: torch.Tensor) -> None:
        """Copy the whole block."""
        memory[: self.layout.nbytes].copy_(self.source)

    def read_slice(self, name: str, index: int, count: int, memory: torch.Tensor) -> None:
        """Copy it."""
        memory.copy_(self.slice_of(name, index, count))

    def slice_of(self, name: str, index: int, count: int) -> torch.Tensor:
        """Return a view of one of `count` slices of a part: (bytes,), uint8. The views are kept: a token takes many."""
        own = self._slices.get((name, count))
        if own is None:
            begin, nbytes = self.layout.offsets[name], self.layout.parts[name].nbytes
            own = self._slices[name, count] = self.source[begin : begin + nbytes].view(count, -1).unbind()
        return own[index]

    def source_of(self, name: str) -> torch.Tensor:
        """Return a view of one part."""
        return self.layout.views(self.source)[name]

    def release(self) -> None:
        """Unpin the memory now; it is freed with the last view of it."""
        if self._unpin is not None:
            self._unpin()
        self.is_pinned = False
        self.tensors, self._slices = {}, {}
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._mapping = _Mapping(-1, 1)


class _Mapping(mmap.mmap):
    """Memory of exactly the size that is asked for; torch rounds pinned memory up to a power of two."""


def _pin(mapping: _Mapping, memory: torch.Tensor, device: torch.device) -> Callable[[], object] | None:
    """Pin the memory of a mapping, until the mapping is freed.

    Args:
        mapping: owns the memory.
        memory: (n,), uint8, a view of the mapping.
        device: a GPU that will read it.

    Returns:
        A function that unpins it earlier; None where the system does not allow to pin it.
    """
    address, nbytes = memory.data_ptr(), memory.numel()
    if not nbytes:
        return None
    try:
        with torch.cuda.device(device):
            torch.cuda.check_error(_cudart().cudaHostRegister(address, nbytes, _PORTABLE))
    except RuntimeError as error:
        with suppress(RuntimeError):
            torch.zeros(1, device=device)  # CUDA reports the error once more, at the next launch, then clears it
        _warn_of_pageable_memory(nbytes, error)
        return None
    unpin = weakref.finalize(mapping, _unregister, address, device)
    unpin.atexit = False  # the system unpins it then, and CUDA may be gone
    return unpin


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _unregister(address: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # copies may still read it
    with torch.cuda.device(device):
        _cudart().cudaHostUnregister(address)


def pinned_memory(nbytes: int, at_least: int | None = None) -> torch.Tensor:
    """Allocate host memory, pinned as far as the system allows it.

    Args:
        nbytes: the size to ask for.
        at_least: the smallest size of use. Where `nbytes` cannot be pinned, half as much is tried, and so on. None
            stands for `nbytes`.

    Returns:
        Pinned memory, (`at_least` to `nbytes`,), uint8; or, with a warning, pageable memory, (nbytes,), uint8.
    """
    least, size = nbytes if at_least is None else at_least, nbytes
    while True:
        try:
            return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError as error:
            size //= 2
            if size < max(least, 1):
                _warn_of_pageable_memory(least, error)
                return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


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
