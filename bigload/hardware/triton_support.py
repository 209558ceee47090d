"""Whether Triton's kernels run on a GPU."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)


def runs_on(device: torch.device, trial: Callable[[], object], otherwise: str = "") -> bool:
    """Find out by a trial: without Triton, or a C compiler, which Triton needs, kernels do not run.

    Args:
        device: a GPU; the current one during the trial.
        trial: launches a kernel.
        otherwise: what follows if it fails; that is warned of.
    """
    if torch.version.hip or importlib.util.find_spec("triton") is None:
        return False
    try:
        with torch.cuda.device(device):
            trial()
    except Exception as error:
        if otherwise:
            logger.warning("Triton's kernels do not run on %s, %s: %s", device, otherwise, error)
        return False
    return True
