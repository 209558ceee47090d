"""Whether Triton's kernels run on a GPU."""

from __future__ import annotations

import functools
import importlib.util
import logging
import signal
from collections.abc import Callable
from subprocess import CalledProcessError

import torch

from .allocation import is_shortage

logger = logging.getLogger(__name__)


def runs_on(device: torch.device, trial: Callable[[], object], otherwise: str = "") -> bool:
    """Find out by a trial: without Triton, or a C compiler, which Triton needs, kernels do not run.

    Args:
        device: a GPU; the current one during the trial.
        trial: launches a kernel.
        otherwise: what follows if it fails; that is warned of.

    Raises:
        Exception: the trial failed by what passes, so that it says nothing of the GPU; see `asks_again`.
    """
    if torch.version.hip or importlib.util.find_spec("triton") is None:
        return False
    try:
        with torch.cuda.device(device):
            trial()
    except Exception as error:
        if _passes(error):
            raise
        if otherwise:
            logger.warning("Triton's kernels do not run on %s, %s: %s", device, otherwise, error)
        return False
    return True


def asks_again(runs_kernels: Callable[[torch.device], bool]) -> Callable[[torch.device], bool]:
    """Decorate what asks `runs_on`: no for now, where that failed by what passes, such as a full GPU.

    It stands above a `functools.cache`, which remembers answers, but no errors.
    """

    @functools.wraps(runs_kernels)
    def asked(device: torch.device) -> bool:
        try:
            return runs_kernels(device)
        except Exception as error:
            if not _passes(error):
                raise
            logger.debug("Triton's kernels do not run on %s now: %s", device, error)
            return False

    return asked


def _passes(error: BaseException | None) -> bool:
    """Whether memory was short, or Ctrl-C has ended the compiler, which gets it too and did not wait for a point."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and is_shortage(error)):
            return True
        if isinstance(error, CalledProcessError) and error.returncode == -signal.SIGINT:
            return True
        error = error.__cause__ or error.__context__
    return False
