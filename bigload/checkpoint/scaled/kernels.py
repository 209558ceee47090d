"""A Triton kernel that multiplies numbers of 4 bits with their scales; imported where there is a GPU, when needed."""
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["first", "rows", "columns", "height", "width", "down", "across"])
def multiply(
    numbers, scales, number_table, scale_table, out,
    first, rows, columns, height, width, down, across,
    are_exponents: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A block of one row's values: `out = number * scale`, in float32 and rounded once.

    Rows are counted through all matrices of the weight, from `first` on; a matrix has `rows` of them, and `down` times
    `across` scales, each for `height` times `width` values.
    """
    own = tl.program_id(0).to(tl.int64)
    row = first + own
    column = tl.program_id(1) * block + tl.arange(0, block)
    ok = column < columns
    half: tl.constexpr = block // 2
    byte = tl.program_id(1) * half + tl.arange(0, half)
    pair = tl.load(numbers + own * (columns // 2) + byte, mask=byte < columns // 2, other=0).to(tl.int32)
    values = tl.interleave(tl.load(number_table + (pair & 15)), tl.load(number_table + (pair >> 4)))
    line = (row // rows * down + row % rows // height) * across
    scale = tl.load(scales + line + column // width, mask=ok, other=0)
    if are_exponents:
        scale = tl.load(scale_table + scale.to(tl.int32))
    values = values * scale.to(tl.float32)
    tl.store(out + own * columns + column, values.to(out.dtype.element_ty), mask=ok)
