"""A Triton kernel for a norm of rows; imported where there is a GPU that runs it, on the first call."""
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def rms_norm(
    x, weight, out, eps, factor, width,
    threads: tl.constexpr, turns: tl.constexpr, are_fours: tl.constexpr, halvings: tl.constexpr, pairings: tl.constexpr,
):  # fmt: skip
    """One row. Its squares are added in the order in which torch's own kernel adds them: see `norms.py`."""
    row = tl.program_id(0).to(tl.int64) * width
    thread = tl.arange(0, threads)
    first = tl.zeros([threads], tl.float32)
    second, third, fourth = first, first, first
    step: tl.constexpr = 1 if are_fours else threads
    for turn in tl.static_range(turns):
        at = turn * 4 * threads + (thread * 4 if are_fours else thread)
        one = tl.load(x + row + at, mask=at < width, other=0.0).to(tl.float32)
        two = tl.load(x + row + at + step, mask=at + step < width, other=0.0).to(tl.float32)
        three = tl.load(x + row + at + 2 * step, mask=at + 2 * step < width, other=0.0).to(tl.float32)
        four = tl.load(x + row + at + 3 * step, mask=at + 3 * step < width, other=0.0).to(tl.float32)
        first += one * one
        second += two * two
        third += three * three
        fourth += four * four
    total = ((first + second) + third) + fourth
    for halving in tl.static_range(halvings):
        total = tl.sum(tl.reshape(total, [2, threads >> (halving + 1)]), 0)
    for pairing in tl.static_range(pairings):
        total = tl.sum(tl.reshape(total, [(1 << pairings) >> (pairing + 1), 2]), 1)
    scale = tl.rsqrt(total * factor + eps)
    for turn in tl.static_range(4 * turns):
        at = turn * threads + thread
        ok = at < width
        value = tl.load(x + row + at, mask=ok, other=0.0).to(tl.float32) * scale
        value = value.to(out.dtype.element_ty).to(tl.float32) * tl.load(weight + at, mask=ok, other=0.0).to(tl.float32)
        tl.store(out + row + at, value.to(out.dtype.element_ty), mask=ok)
