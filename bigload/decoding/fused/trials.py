"""Trials of kernels: one is used where it runs, and gives the bits of what it stands for."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from ...hardware.triton_support import asks_again, runs_on

logger = logging.getLogger(__name__)


@functools.cache
def kernels() -> Any:
    """Return the module of the kernels, which imports Triton."""
    from . import kernels

    return kernels


@asks_again
@functools.cache
def runs_kernels(device: torch.device) -> bool:
    """Whether the kernels run on a device, found out by running one."""
    if device.type != "cuda":
        return False
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    return runs_on(device, lambda: kernels().touch[(1,)](flag))


def passes(trial: Callable[[], bool]) -> bool:
    """Whether a trial says so; one that raises does not.

    Triton's compiler may fail, memory may be short, and a model's own code may refuse what it is given there.
    """
    try:
        return trial()
    except Exception as error:  # the step has run
        logger.debug("a kernel is not used: %s", error)
        return False


def has_bits_of(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same, signs of zeros too, wherever their numbers are in memory."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
