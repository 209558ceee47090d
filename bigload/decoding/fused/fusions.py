"""All that a captured step of a model computes with fewer kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from .attention_masks import AttentionMasks
from .norms import Norms
from .rotations import Rotations


class Fusions:
    """What of a model can be computed with fewer kernels: found out in a step that is run as before."""

    def __init__(self, model: nn.Module) -> None:
        self._each: list[Norms | Rotations | AttentionMasks] = []
        # A block would be compiled again where something in it is replaced, to code that may round elsewhere.
        if not any(map(_is_compiled, model.modules())):
            self._each = [Norms(model), Rotations(model), AttentionMasks(model)]

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Find out where fewer kernels give the bits of a step."""
        with ExitStack() as stack:
            for each in self._each:
                stack.enter_context(each.noting())
            yield

    @contextmanager
    def captured(self) -> Iterator[None]:
        """Have a step that is captured launch them."""
        with ExitStack() as stack:
            for each in self._each:
                stack.enter_context(each.captured())
            yield


def _is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has a module's forward, which it sets on the module, or stands for it in calls."""
    return module._compiled_call_impl is not None or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
