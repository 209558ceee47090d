"""All that a captured step of a model computes with fewer kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .attention_masks import AttentionMasks
from .norms import Norms
from .rotations import Rotations


class Fusions:
    """What of a model can be computed with fewer kernels: found out in a step that is run as before."""

    def __init__(self, model: nn.Module) -> None:
        self._norms, self._rotations, self._masks = Norms(model), Rotations(model), AttentionMasks(model)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Find out where fewer kernels give the bits of a step."""
        with self._norms.noting(), self._rotations.noting(), self._masks.noting():
            yield

    @contextmanager
    def captured(self) -> Iterator[None]:
        """Have a step that is captured launch them."""
        with self._norms.captured(), self._rotations.captured(), self._masks.captured():
            yield
