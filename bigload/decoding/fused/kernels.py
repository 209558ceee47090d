"""Triton kernels for norms and rotary embeddings; imported where there is a GPU that runs them, on the first call."""
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def touch(flag):
    """Does nothing of use: whether it runs is what is asked."""
    tl.store(flag, 1)


@triton.jit
def rms_norm(
    x, weight, out, eps, factor, width,
    threads: tl.constexpr, turns: tl.constexpr, are_fours: tl.constexpr, halvings: tl.constexpr, pairings: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """One row. Its squares are added in the order in which torch's own kernel adds them: see `norms.py`."""
    row = tl.program_id(0).to(tl.int64) * width
    thread = tl.arange(0, threads)
    first = tl.zeros([threads], tl.float32)
    second, third, fourth = first, first, first
    step: tl.constexpr = 1 if are_fours else threads
    for turn in range(turns):  # not unrolled: narrow blocks take many turns
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
    at = tl.arange(0, block)
    ok = at < width
    value = tl.load(x + row + at, mask=ok, other=0.0).to(tl.float32) * scale
    value = value.to(out.dtype.element_ty).to(tl.float32) * tl.load(weight + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + row + at, value.to(out.dtype.element_ty), mask=ok)


@triton.jit
def rotate(
    q, k, cos, sin, q_out, k_out, q_heads, heads,
    q_row, q_head, k_row, k_head, q_out_row, q_out_head, k_out_row, k_out_head, cos_row, sin_row,
    width: tl.constexpr, table_width: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One head of one row, of the queries or, after those, of the keys."""
    row, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    at = tl.arange(0, block)
    cosine = tl.load(cos + row * cos_row + at % table_width).to(tl.float32)
    sine = tl.load(sin + row * sin_row + at % table_width).to(tl.float32)
    if head < q_heads:
        _rotate(q + row * q_row + head * q_head, q_out + row * q_out_row + head * q_out_head, cosine, sine, at, width)
    else:
        head -= q_heads
        _rotate(k + row * k_row + head * k_head, k_out + row * k_out_row + head * k_out_head, cosine, sine, at, width)


@triton.jit
def _rotate(x, out, cosine, sine, at, width: tl.constexpr):
    """Each product is rounded, as that of an operator of torch, and then their sum."""
    is_first = at < width // 2
    other = tl.where(is_first, at + width // 2, at - width // 2)
    kind = out.dtype.element_ty
    value = tl.load(x + at, mask=at < width, other=0.0).to(tl.float32)
    turned = tl.load(x + other, mask=at < width, other=0.0).to(tl.float32)
    straight = (value * cosine).to(kind).to(tl.float32)
    across = (tl.where(is_first, -turned, turned) * sine).to(kind).to(tl.float32)
    tl.store(out + at, (straight + across).to(kind), mask=at < width)
