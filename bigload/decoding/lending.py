"""The place that a graph keeps for a cache, lent to the next cache of its kind before the prompt is put into it.

Otherwise the prompt would fill a cache of its own, which is then copied: two caches at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .cache_state import LeftLayer


def lend(layers: Sequence[LeftLayer], cache: Any) -> bool:
    """Give the tensors of static layers, which nobody uses any more, to a static cache that has none yet.

    Args:
        layers: those of a cache that is no more, with tensors, whose values are lost.
        cache: of transformers, that no forward has been given, for as many sequences.

    Returns:
        Whether it has them: not if it is of another kind.
    """
    empty = getattr(cache, "layers", None)
    if not layers or not isinstance(empty, list) or len(empty) != len(layers):
        return False
    if not all(_suits(old, new) for old, new in zip(layers, empty, strict=True)):
        return False
    for old, new in zip(layers, empty, strict=True):
        own = vars(new)
        for name, value in old.held.items():  # in this order: what a layer sets when it is first used comes last
            if isinstance(value, torch.Tensor):
                own[name] = value.zero_()
            elif name not in own or name == "is_initialized":
                own[name] = value
    return True


def _suits(old: LeftLayer, new: Any) -> bool:
    had, has = old.held, vars(new)
    return (
        old.kind is type(new)
        and has.get("is_initialized") is False
        and had.get("is_initialized") is True
        and all(has.get(name) == had.get(name) for name in ("max_cache_len", "sliding_window", "_is_croppable"))
    )
