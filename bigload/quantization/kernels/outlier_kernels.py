"""Triton kernels for outliers among the inputs of an int8 layer; imported where there is a GPU, on the first call."""
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def split(
    x, kept, flags, columns, counts,
    threshold, rows, width, block_columns: tl.constexpr,
):  # fmt: skip
    """A block of columns: which have an outlier, in which order, how many; and the inputs with 0 for outliers."""
    block = tl.program_id(0)
    column = block * block_columns + tl.arange(0, block_columns)
    ok = column < width
    found = tl.zeros([block_columns], tl.int32)
    for row in range(0, rows):
        at = row * width + column
        value = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
        is_outlier = tl.abs(value) >= threshold
        found = tl.maximum(found, (is_outlier & ok).to(tl.int32))
        tl.store(kept + at, tl.where(is_outlier, 0.0, value), mask=ok)
    tl.store(flags + column, found, mask=ok)
    place = tl.cumsum(found, 0) - 1
    tl.store(columns + block * block_columns + place, column, mask=found > 0)
    tl.store(counts + block, tl.sum(found, 0))


@triton.jit
def add_outliers(
    out, x, data, scales, columns, counts,
    width, outputs, blocks, block_columns: tl.constexpr, block_outputs: tl.constexpr, at_once: tl.constexpr,
):  # fmt: skip
    """Add the products of outlier columns to some outputs of a row, in the order of the columns."""
    output = tl.program_id(0) * block_outputs + tl.arange(0, block_outputs)
    row = tl.program_id(1)
    ok = output < outputs
    dtype = out.dtype.element_ty
    scale = tl.load(scales + output, mask=ok, other=0.0)
    weights = data + output.to(tl.int64) * width
    place = tl.arange(0, at_once)
    total = tl.zeros([block_outputs], tl.float32)
    count_of_all = 0
    for block in range(0, blocks):
        count = tl.load(counts + block)
        count_of_all += count
        for begin in range(0, count, at_once):
            inside = begin + place < count
            column = tl.load(columns + block * block_columns + begin + place, mask=inside, other=0)
            value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(weights[:, None] + column[None, :], mask=ok[:, None] & inside[None, :], other=0)
            # As bitsandbytes dequantizes: in float32, and rounded to the dtype of the input.
            weight = (weight.to(tl.float32) * scale[:, None] * 7.874015718698502e-3).to(dtype).to(tl.float32)
            total += tl.sum(weight * value[None, :], 1)
    if count_of_all > 0:
        at = row * outputs + output
        before = tl.load(out + at, mask=ok, other=0.0).to(tl.float32)
        tl.store(out + at, (before + total).to(dtype), mask=ok)
