"""Weights in fp4 in a checkpoint of fp8, such as DeepSeek-V4's experts: value = number * scale of its block.

`M.weight` is stored as int8: two numbers of 4 bits (E2M1) in a byte, those of the lower bits first.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ...errors import CheckpointError
from ...io.tensors import StoredTensor
from .fp8 import SCALE_DTYPES
from .tensor import ScaledTensor, scaled_tensor

METHODS = ("fp8", "mxfp8")


def fp4_tensor(name: str, weight: StoredTensor, scales: StoredTensor) -> ScaledTensor:
    """Return a weight in fp4. How large its blocks are follows from its scales: the config tells it of fp8 alone.

    Args:
        name: its name.
        weight: its numbers, (..., rows, columns / 2).
        scales: its scales, (..., blocks in a column, blocks in a row).

    Raises:
        CheckpointError: the scales do not fit the weight.
    """
    *outer, rows, nbytes = weight.shape if len(weight.shape) > 1 else (0, 0)
    *outer_scales, down, across = scales.shape if len(scales.shape) > 1 else (0, 0)
    shape = (*outer, rows, 2 * nbytes)
    is_even = bool(down and across) and not rows % down and not shape[-1] % across
    if outer != outer_scales or not is_even or scales.dtype not in SCALE_DTYPES:
        raise CheckpointError(
            f"'{scales.name}' has shape {scales.shape} of {scales.dtype}, which divides '{name}', in fp4 of shape "
            f"{shape}, into no equal blocks: the file is damaged, or of another format"
        )
    block = rows // down, shape[-1] // across
    numbers = replace(weight, dtype=torch.uint8)
    return scaled_tensor(name, f"fp4 by blocks of {block[0]} x {block[1]}", numbers, scales, shape, block)
