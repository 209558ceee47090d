"""The progress bar of loads and conversions, in bytes."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(total: int, what: str, progress: bool | None) -> tqdm[Any]:
    """Make a progress bar.

    Args:
        total: bytes.
        what: its description.
        progress: whether to show it; None shows it if standard error is a terminal.
    """
    shown = sys.stderr.isatty() if progress is None else progress
    return tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=not shown, leave=False)
