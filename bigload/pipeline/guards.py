"""What other libraries do wrong with quantized layers, refused in each process that holds such layers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from .adapters import refuse_adapters_of_packed_weights
from .optimizers import refuse_optimizers_that_divide_by_zero


def guard(layers: Collection[Any], *, are_trained: bool) -> None:
    """From now on refuse what is wrong with quantized layers; where they are unpickled too, as by a spawned process.

    Args:
        layers: of bitsandbytes.
        are_trained: whether they have the main weights of int8 training.
    """
    guards = [refuse_adapters_of_packed_weights]
    if are_trained:
        guards.append(refuse_optimizers_that_divide_by_zero)
    for layer in layers:
        vars(layer)["guards"] = guards
    for install in guards if layers else ():
        install()
