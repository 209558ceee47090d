"""Memory of devices, asked for so that it is fast to get."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import mmap
import os
import sys
from collections.abc import Callable

import torch

# Below this there is no whole huge page to gain.
_WORTH_HUGE_PAGES = 4 * 2**20


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Make room for one tensor, uninitialized; on the CPU in huge pages where that is worth it.

    Raises:
        torch.OutOfMemoryError: the device has no room.
    """
    made = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and made.nbytes >= _WORTH_HUGE_PAGES:
        advise_huge_pages(made)
    return made


def reserve(device: torch.device, nbytes: int) -> None:
    """Let torch's allocator get memory that is about to be asked for, piece by piece, from a GPU in one piece.

    A piece of its own takes 0.1 ms each, all of it 0.4 ms. What is not to be had at once may be in pieces.
    """
    if device.type != "cuda" or "max_split_size_mb" in _allocator_options():  # one piece could not be divided
        return
    lacking = nbytes - (torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if lacking <= 0:
        return
    try:
        torch.empty(lacking, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        gc.collect()  # a model that was let go of may be there still: bitsandbytes' layers refer to themselves
        with contextlib.suppress(torch.OutOfMemoryError):
            torch.empty(lacking, dtype=torch.uint8, device=device)


def _allocator_options() -> str:
    return os.environ.get("PYTORCH_ALLOC_CONF", "") + os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")


def advise_huge_pages(tensor: torch.Tensor) -> None:
    """Ask for pages of 2 MiB: reading into fresh memory is more than twice as fast, since 512 faults become one."""
    advise = _madvise()
    if advise is not None:
        page = mmap.PAGESIZE
        begin = -(-tensor.data_ptr() // page) * page
        advise(begin, tensor.data_ptr() + tensor.nbytes - begin, mmap.MADV_HUGEPAGE)  # refused: nothing is lost


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise
