"""Embeddings off the GPU in captured steps: the host looks rows up before each replay, and the graph reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import nn

from ..offload.forwards import CpuForward, forward_override_of
from .calls import Call


def is_lookup(module: nn.Module) -> bool:
    """Whether a module is an embedding whose rows are looked up on the CPU, which stays where it is."""
    return isinstance(module, nn.Embedding) and isinstance(forward_override_of(module), CpuForward)


class Lookups:
    """What one kind of steps looks up.

    Attributes:
        reason: why no graph can have it; None if one can.
    """

    def __init__(self, model: nn.Module) -> None:
        self.reason: str | None = None
        self._all = [module for module in model.modules() if is_lookup(module)]
        # Of each embedding that a step uses: the number of the tensor in the call that it is given, and its rows.
        self._used: list[tuple[CpuForward, int, torch.Tensor]] = []

    @contextmanager
    def noting(self, call: Call) -> Iterator[None]:
        """Note what a step looks up, which is run as before."""
        with _replaced({_of(module): self._noting(_of(module), call) for module in self._all}):
            yield

    def _noting(self, forward: CpuForward, call: Call) -> Any:
        thread = get_ident()

        def look_up(*args: Any, **kwargs: Any) -> Any:
            rows, numbers = forward.computed(*args, **kwargs), [id(tensor) for tensor in call.tensors]
            if get_ident() != thread:
                return rows
            is_known = any(used is forward for used, _, _ in self._used)
            if len(args) != 1 or kwargs or id(args[0]) not in numbers or is_known:
                self.reason = f"{forward.path!r} is offloaded, and is given what the step computes"
            else:
                with torch.inference_mode(False):
                    self._used.append((forward, numbers.index(id(args[0])), torch.empty_like(rows)))
            return rows

        return look_up

    @contextmanager
    def captured(self, inputs: list[torch.Tensor]) -> Iterator[None]:
        """Have a step that is captured read the rows where `fill` puts them."""

        def reading(forward: CpuForward, number: int, rows: torch.Tensor) -> Any:
            def look_up(*args: Any, **kwargs: Any) -> Any:
                if args and args[0] is inputs[number]:
                    return rows.clone()  # which the step may write to
                return forward.computed(*args, **kwargs)  # of another thread; a capture ends with that

            return look_up

        with _replaced({forward: reading(forward, number, rows) for forward, number, rows in self._used}):
            yield

    def fill(self, call: Call) -> None:
        """Look up the rows of a call, for which the host waits for its tokens."""
        for forward, number, rows in self._used:
            rows.copy_(forward.computed(call.tensors[number]))


def _of(module: nn.Module) -> CpuForward:
    forward = forward_override_of(module)
    assert isinstance(forward, CpuForward)
    return forward


@contextmanager
def _replaced(forwards: dict[CpuForward, Any]) -> Iterator[None]:
    for forward, instead in forwards.items():
        forward.instead = instead
    try:
        yield
    finally:
        for forward in forwards:
            forward.instead = None
