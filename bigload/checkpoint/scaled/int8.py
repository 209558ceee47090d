"""Weights in int8 with a scale for each row, as compressed-tensors stores them (w8a8): value = number * scale."""

from __future__ import annotations

from collections.abc import Container

from ...errors import CheckpointError
from ...io.tensors import StoredTensor
from .fp8 import with_scales
from .stated import Stated
from .tensor import ScaledTensor

METHODS = ("compressed-tensors",)


def int8_tensor(
    name: str, weight: StoredTensor, scales: StoredTensor, names: Container[str], said: Stated
) -> ScaledTensor:
    """Return a weight in int8.

    Args:
        name: its name.
        weight: its numbers, (rows, columns).
        scales: its scales.
        names: of all tensors of the checkpoint.
        said: what the config says.

    Raises:
        CheckpointError: the scales do not fit the weight, or its numbers have an offset too.
    """
    if f"{name}_zero_point" in names:
        raise CheckpointError(
            f"'{name}' is stored as int8 with offsets ('{name}_zero_point'), which bigload does not read: use the "
            "original checkpoint, or one that was quantized symmetrically"
        )
    return with_scales(name, "int8", weight, scales, said.block if said.method in METHODS else None, said)
