"""Python's collector of cycles, which rests where it would take time, or free what must not be freed yet."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.RLock()
_resting: list[bool] = []  # of each block that is running: whether the collector was on before the first of them


@contextmanager
def without_collections() -> Iterator[None]:
    """Pause the collector in all threads, until the last of such blocks that overlap has ended."""
    with _lock:
        _resting.append(_resting[0] if _resting else gc.isenabled())
        gc.disable()
    try:
        yield
    finally:
        with _lock:
            if _resting.pop() and not _resting:
                gc.enable()
