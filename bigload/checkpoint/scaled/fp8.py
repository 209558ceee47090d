"""Weights in fp8 with a scale for each block, row or matrix: DeepSeek-V3, Qwen3 FP8, compressed-tensors, ModelOpt.

`M.weight` has its scales beside it, as `M.weight_scale_inv` (blocks of 128 x 128, unless a config says otherwise) or as
`M.weight_scale`. Both are factors: value = number * scale. Those of ModelOpt's blocks (FP8_PB_WO) have the shape
(blocks in a column, 1, blocks in a row, 1), as its reduction over the blocks leaves them.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ...errors import CheckpointError
from ...io.tensors import StoredTensor
from .stated import MODELOPT_BLOCK, Stated
from .tensor import ScaledTensor, scaled_tensor

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
METHODS = ("fp8", "mxfp8", "fbgemm_fp8", "compressed-tensors", "modelopt")
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float8_e8m0fnu)
# What DeepSeek-V3, which named its scales so first, and all who followed it use.
_USUAL = {"_scale_inv": (128, 128)}


def fp8_tensor(name: str, weight: StoredTensor, end: str, scales: StoredTensor, said: Stated) -> ScaledTensor:
    """Return a weight in fp8.

    Args:
        name: its name.
        weight: its numbers, (..., rows, columns).
        end: what the name of its scales ends with.
        scales: its scales.
        said: what the config says.

    Raises:
        CheckpointError: the scales do not fit the weight.
    """
    block = said.block if said.method in METHODS else None
    if len(scales.shape) == len(weight.shape) + 2 and scales.shape[-3] == scales.shape[-1] == 1:
        scales = replace(scales, shape=(*scales.shape[:-3], scales.shape[-2]))
        block = block or (MODELOPT_BLOCK, MODELOPT_BLOCK)
    elif block is None and not _is_simple(weight.shape, scales.shape):
        block = _USUAL.get(end)
    return with_scales(name, "fp8", weight, scales, block, said)


def with_scales(
    name: str, kind: str, weight: StoredTensor, scales: StoredTensor, block: tuple[int, int] | None, said: Stated
) -> ScaledTensor:
    """Return a weight with scales for blocks of a known size or, if `block` is None, for rows or the matrix.

    Raises:
        CheckpointError: the scales do not fit the weight.
    """
    if len(weight.shape) < 2:
        raise CheckpointError(f"'{name}' is stored as {kind}, but its shape {weight.shape} is not that of a matrix")
    if scales.dtype not in SCALE_DTYPES:
        raise CheckpointError(
            f"'{scales.name}' is stored as {scales.dtype}, expected scales in a floating dtype or as bytes: the file "
            "is damaged"
        )
    *outer, rows, columns = weight.shape
    if block is not None:
        grid = (*outer, -(-rows // block[0]), -(-columns // block[1]))
        if scales.shape != grid:
            source = f", as '{said.file}' says" if said.block == block else ""
            raise CheckpointError(
                f"'{scales.name}' has shape {scales.shape}; '{name}' of shape {weight.shape} needs {grid} in blocks of "
                f"{block[0]} x {block[1]}{source}: the file is damaged, or the config is another checkpoint's"
            )
        return scaled_tensor(name, f"{kind} by blocks of {block[0]} x {block[1]}", weight, scales, weight.shape, block)
    if _is_one_each(weight.shape, scales.shape):
        return scaled_tensor(name, f"{kind} by tensor", weight, scales, weight.shape, (max(1, rows), max(1, columns)))
    if _is_by_row(weight.shape, scales.shape):
        return scaled_tensor(name, f"{kind} by rows", weight, scales, weight.shape, (1, max(1, columns)))
    raise CheckpointError(
        f"'{scales.name}' has shape {scales.shape}, which is neither one scale nor one for each row of '{name}', of "
        f"shape {weight.shape}, and no config beside it says how large its blocks are: put the checkpoint's "
        "config.json beside its weights"
    )


def _is_one_each(shape: tuple[int, ...], scales: tuple[int, ...]) -> bool:
    """Whether there is one scale for each matrix."""
    outer = shape[:-2]
    return math.prod(scales) == 1 == math.prod(outer) or (
        bool(outer) and scales in (outer, (*outer, 1), (*outer, 1, 1))
    )


def _is_by_row(shape: tuple[int, ...], scales: tuple[int, ...]) -> bool:
    return scales in (shape[:-1], (*shape[:-1], 1))


def _is_simple(shape: tuple[int, ...], scales: tuple[int, ...]) -> bool:
    return _is_one_each(shape, scales) or _is_by_row(shape, scales)
