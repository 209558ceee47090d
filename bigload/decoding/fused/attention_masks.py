"""Boolean masks of attention in captured steps: made numbers once, where each layer makes the same of them again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..constants import asks_for_modes
from .trials import has_bits_of

_Attend = Callable[..., Any]
_PLACE = 3  # of the mask among the arguments


class AttentionMasks:
    """The boolean masks that `scaled_dot_product_attention` is given in a model, and where numbers give the same."""

    def __init__(self, model: nn.Module) -> None:
        self._is_possible = not asks_for_modes(model)
        self._gives_same: dict[Any, bool] = {}

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Find out whether attention gives the same bits with numbers, in a step that is run as before."""
        made = _MadeOnce()

        def attend_twice(attend: _Attend, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            found, mask = attend(*args, **kwargs), _mask_of(args, kwargs)
            if mask is not None:
                again = attend(*args[:_PLACE], **_with_mask(kwargs, made.numbers(mask, args[0])))
                key = _key(args, kwargs, mask)
                self._gives_same[key] = self._gives_same.get(key, True) and has_bits_of(again, found)
            return found

        if not self._is_possible:
            yield
            return
        with _AroundAttention(attend_twice):
            yield

    @contextmanager
    def captured(self) -> Iterator[None]:
        """Have a step that is captured make them once."""
        made = _MadeOnce()

        def attend_with_numbers(attend: _Attend, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            mask = _mask_of(args, kwargs)
            if mask is None or not self._gives_same.get(_key(args, kwargs, mask)):
                return attend(*args, **kwargs)
            return attend(*args[:_PLACE], **_with_mask(kwargs, made.numbers(mask, args[0])))

        if not any(self._gives_same.values()):
            yield
            return
        with _AroundAttention(attend_with_numbers):
            yield


class _MadeOnce:
    """The numbers of the masks of a step, as long as torch counts no write to them.

    A step that is run as before has them from here too: where a mask is written to in a way that torch does not count,
    attention has other bits then.
    """

    def __init__(self) -> None:
        self._made: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def numbers(self, mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Return those of a mask."""
        place = mask.data_ptr(), mask._version, mask.shape, mask.stride(), query.dtype
        if place not in self._made:
            self._made[place] = mask, _numbers(mask, query)  # as long as it is kept, nothing else is in its place
        return self._made[place][1]


def _mask_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the mask, if it is a boolean one of which torch counts the writes.

    With dropout, there is none: to try it would draw random numbers, of which the step then has others.
    """
    mask: Any = args[_PLACE] if len(args) > _PLACE else kwargs.get("attn_mask")
    are_usual = len(args) in (_PLACE, _PLACE + 1) and all(isinstance(each, torch.Tensor) for each in args[:_PLACE])
    is_boolean = isinstance(mask, torch.Tensor) and mask.dtype == torch.bool
    return mask if are_usual and is_boolean and not kwargs.get("dropout_p") and not mask.is_inference() else None


def _with_mask(kwargs: Mapping[str, Any], mask: torch.Tensor) -> dict[str, Any]:
    return {**kwargs, "attn_mask": mask}


def _numbers(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Return what `scaled_dot_product_attention` makes of a mask: 0 where a token counts, else minus infinity."""
    counts, not_at_all = (torch.full((), value, dtype=query.dtype, device=mask.device) for value in (0.0, -torch.inf))
    return torch.where(mask, counts, not_at_all)


def _key(args: tuple[Any, ...], kwargs: Mapping[str, Any], mask: torch.Tensor) -> Any:
    others = tuple((name, value) for name, value in kwargs.items() if name != "attn_mask")
    return tuple((each.shape, each.dtype) for each in (*args[:_PLACE], mask)), mask.stride(), others


class _AroundAttention(TorchFunctionMode):
    """Has attention computed by something else, in this thread."""

    def __init__(self, compute: Callable[[_Attend, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        self._compute = compute

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of torch, or compute attention."""
        if func is functional.scaled_dot_product_attention:
            return self._compute(func, args, dict(kwargs or {}))
        return func(*args, **(kwargs or {}))
