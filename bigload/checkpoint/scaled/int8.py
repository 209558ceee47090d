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
        CheckpointError: the scales do not fit the weight, or its numbers have offsets or an order of their own too.
    """
    for part, what in {"_zero_point": "offsets", "_g_idx": "columns in another order"}.items():
        if name + part in names:
            raise CheckpointError(
                f"'{name}' is stored as int8 with {what} ('{name}{part}'), which bigload does not read: use the "
                "original checkpoint, or one that was quantized symmetrically, without activation ordering"
            )
    return with_scales(name, "int8", weight, scales, said.block if said.method in METHODS else None, said)
