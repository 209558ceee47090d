"""The models that random cases are made of: our own, and small ones of many transformers families."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import architectures
import mixtures
import torch
from models import TOKENS, Attended, Blocks, Layers
from torch import nn


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        build: makes one, in eval mode; random where it has weights.
        inputs: what its forward takes.
        skip: what is not quantized, or None for the default.
        is_pretrained: whether it is a model of transformers.
        is_float32: whether GPUs compute it in float32 only: built from a config, it holds positions in that dtype.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, torch.Tensor]]
    skip: list[str] | None = None
    is_pretrained: bool = False
    is_float32: bool = False


class Tied(Blocks):
    """Blocks whose head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight


def _values(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _made(build: Callable[[], nn.Module]) -> nn.Module:
    return build().eval()


def _mixture(name: str) -> nn.Module:
    return mixtures.mixture(name).float()


FAMILIES = {
    "layers": Family(partial(_made, Layers), lambda: {"x": _values(3, 160)}),
    "blocks": Family(partial(_made, Blocks), lambda: {"tokens": TOKENS}),
    "blocks_tied": Family(partial(_made, Tied), lambda: {"tokens": TOKENS}),
    "attended": Family(partial(_made, Attended), lambda: {"x": _values(2, 5, 64)}),
} | {
    name: Family(
        partial(architectures.build, name),
        partial(architectures.inputs, name),
        [each for each in skip if each != "experts"],
        True,
        name == "m2m_100",
    )
    for name, (_, _, _, skip) in architectures.ARCHITECTURES.items()
}
# Experts that are transposed, and have biases; those of a class that takes other arguments.
FAMILIES |= {
    name: Family(partial(_mixture, name), lambda: {"input_ids": mixtures.TOKENS}, ["lm_head"], True)
    for name in ("gpt_oss", "llama4")
}


def inputs_on(family: Family, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What the family's forward takes, floating-point values in a dtype."""
    return {
        name: value.to(device, dtype if value.is_floating_point() else None) for name, value in family.inputs().items()
    }
