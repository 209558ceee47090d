"""The progress bar of loads and conversions, in bytes."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from tqdm import TqdmExperimentalWarning, TqdmWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmExperimentalWarning)
    warnings.simplefilter("ignore", TqdmWarning)  # of a notebook without ipywidgets, where text is shown
    from tqdm.auto import tqdm


def progress_bar(total: int, what: str, progress: bool | None) -> tqdm[Any]:
    """Make a progress bar.

    Args:
        total: bytes.
        what: its description.
        progress: whether to show it; None shows it on a terminal and in a notebook.
    """
    shown = _is_seen() if progress is None else progress
    return tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=not shown, leave=False)


def _is_seen() -> bool:
    """Whether standard error is a terminal, or the output of a notebook's cell."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return sys.stderr.isatty() or (shell is not None and getattr(shell, "kernel", None) is not None)
