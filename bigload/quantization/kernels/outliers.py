"""The product of an int8 layer with a threshold, without waiting for the GPU.

bitsandbytes computes columns of the input in which a value reaches the threshold in 16 bit, and the others in int8. To
know how many columns these are, the host waits for the GPU in each layer, so that no graph can be captured. Here the
GPU keeps the list of these columns to itself. The result is bitsandbytes' own where there are no outliers; else the
sum over their columns may be rounded in another order, before it is added and rounded to 16 bit once.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch

from ...hardware.devices import current_gpu
from ...hardware.triton_support import asks_again, runs_on

# Rows of an input: with more, as of a prompt, bitsandbytes' own product is faster, and its wait does not matter.
MAX_ROWS = 32
# Shapes of the programs.
_BLOCK_COLUMNS, _BLOCK_OUTPUTS, _AT_ONCE = 512, 64, 16


def is_on_gpu_alone(state: Any, device: torch.device) -> bool:
    """Whether a few rows are computed without the host.

    Args:
        state: bitsandbytes' state of an int8 layer.
        device: of its weight.
    """
    return state.threshold == 0.0 or (not state.has_fp16_weights and device.type == "cuda" and _runs_kernels(device))


def suits(state: Any, rows: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether an input, (..., in_features), is one for `outlier_product`: a few rows, and no gradient is asked of it or
    of the bias.
    """
    return (
        state.threshold > 0.0
        and rows.device.type == "cuda"
        and 0 < rows.numel() <= MAX_ROWS * rows.shape[-1]
        and not (torch.is_grad_enabled() and (rows.requires_grad or (bias is not None and bias.requires_grad)))
        and not torch.compiler.is_compiling()
        and is_on_gpu_alone(state, rows.device)
    )


def outlier_product(
    rows: torch.Tensor, data: torch.Tensor, scales: torch.Tensor, threshold: float, bias: torch.Tensor | None
) -> torch.Tensor:
    """Multiply rows with an int8 weight; columns of rows with an outlier in 16 bit.

    Args:
        rows: (n, in_features), floating point, contiguous; n of at most `MAX_ROWS`.
        data: (out_features, in_features), int8.
        scales: (out_features,), fp32.
        threshold: what an outlier reaches; above 0.
        bias: (out_features,) or None.

    Returns:
        (n, out_features), in the dtype of rows.
    """
    own = torch.ops.bitsandbytes
    with nullcontext() if rows.device.type == "cpu" else current_gpu(rows.device):  # on which Triton launches
        outliers = _Outliers(rows, threshold)
        quantized, row_scales, _ = own.int8_vectorwise_quant.default(outliers.kept, 0.0)
        if len(rows) > 1:  # in one row, only the outlier itself is in its column
            quantized.masked_fill_(outliers.flags, 0)
        out: torch.Tensor = own.int8_scaled_mm.default(quantized, data, row_scales, scales, bias=bias, dtype=rows.dtype)
        outliers.add_to(out, data, scales)
    return out


class _Outliers:
    """The columns of an input in which a value reaches a threshold.

    Attributes:
        kept: the input in float16, with 0 for outliers.
        flags: (in_features,), whether each column is one; boolean.
    """

    def __init__(self, rows: torch.Tensor, threshold: float) -> None:
        self._rows, (count, width) = rows, rows.shape
        half = rows.to(torch.float16)
        self._blocks = -(-width // _BLOCK_COLUMNS)
        self.kept = torch.empty_like(half)
        self.flags = torch.empty(width, dtype=torch.bool, device=rows.device)
        self._columns = torch.empty(self._blocks * _BLOCK_COLUMNS, dtype=torch.int32, device=rows.device)
        self._counts = torch.empty(self._blocks, dtype=torch.int32, device=rows.device)
        _kernels().split[(self._blocks,)](
            half,
            self.kept,
            self.flags.view(torch.uint8),
            self._columns,
            self._counts,
            _in_float16(threshold),
            count,
            width,
            _BLOCK_COLUMNS,
        )

    def add_to(self, out: torch.Tensor, data: torch.Tensor, scales: torch.Tensor) -> None:
        """Add their products with a weight, (out_features, in_features), to the output, (n, out_features)."""
        outputs, width = data.shape
        _kernels().add_outliers[(-(-outputs // _BLOCK_OUTPUTS), len(out))](
            out,
            self._rows,
            data,
            scales,
            self._columns,
            self._counts,
            width,
            outputs,
            self._blocks,
            _BLOCK_COLUMNS,
            _BLOCK_OUTPUTS,
            _AT_ONCE,
        )


@functools.cache
def _in_float16(threshold: float) -> float:
    """Return a threshold as torch compares it with float16."""
    return float(torch.tensor(threshold, dtype=torch.float16, device="cpu"))


@asks_again
@functools.cache
def _runs_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels run on a GPU, found out by running them: without a C compiler, for one, they do not."""

    def trial() -> None:
        rows = torch.zeros(1, 32, dtype=torch.float16, device=device)
        outliers = _Outliers(rows, 1.0)
        weight = torch.zeros(32, 32, dtype=torch.int8, device=device)
        outliers.add_to(rows, weight, torch.zeros(32, device=device))

    return runs_on(device, trial)


@functools.cache
def _kernels() -> ModuleType:
    from . import outlier_kernels

    return outlier_kernels
