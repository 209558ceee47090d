"""Experts in mxfp4 (GPT-OSS): `P_blocks`, two numbers of 4 bits in a byte, and `P_scales`, an exponent for 32 of them.

Source: OCP Microscaling Formats (MX) Specification 1.0. The model's parameter `P` is the transpose of what is stored.
"""

from __future__ import annotations

import torch

from ...errors import CheckpointError
from ...io.tensors import StoredTensor
from .tensor import ScaledTensor, scaled_tensor

METHODS = ("mxfp4",)
BLOCKS, SCALES = "_blocks", "_scales"
_BYTES = 16  # of a block


def is_mxfp4(tensor: StoredTensor) -> bool:
    """Whether a tensor may be the packed numbers of experts, (E, rows, blocks, 16)."""
    return tensor.name.endswith(BLOCKS) and tensor.dtype == torch.uint8 and len(tensor.shape) == 4


def mxfp4_tensor(name: str, blocks: StoredTensor, scales: StoredTensor) -> ScaledTensor:
    """Return experts in mxfp4.

    Raises:
        CheckpointError: the scales do not fit the blocks.
    """
    count, rows, groups, nbytes = blocks.shape
    if nbytes != _BYTES:
        raise CheckpointError(
            f"'{blocks.name}' has blocks of {nbytes} bytes, mxfp4 has blocks of {_BYTES}: the file is damaged, or of "
            "another format"
        )
    if (scales.dtype, scales.shape) != (torch.uint8, (count, rows, groups)):
        raise CheckpointError(
            f"'{scales.name}' has shape {scales.shape} of {scales.dtype}; for '{blocks.name}' of shape {blocks.shape} "
            f"it must be {(count, rows, groups)} of torch.uint8: the file is damaged"
        )
    shape = (count, rows, groups * 2 * _BYTES)
    return scaled_tensor(name, "mxfp4, blocks of 32", blocks, scales, shape, (1, 2 * _BYTES), is_turned=True)
