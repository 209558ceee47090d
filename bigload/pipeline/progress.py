"""A bar in bytes, on a terminal unless it is asked for or not."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(total: int, what: str, progress: bool | None) -> tqdm[Any]:
    """Make a bar.

    Args:
        total: bytes.
        what: is being done.
        progress: whether to show it; None shows it where standard error is a terminal.
    """
    shown = sys.stderr.isatty() if progress is None else progress
    return tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=not shown, leave=False)
