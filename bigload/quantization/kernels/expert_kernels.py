"""Triton kernels that compute with packed experts; imported where there is a GPU, on the first call.

The values of a 4-bit weight are `code[index] * scale`, two of them in a byte: first the high half, then the low one.
Inputs of 16 bit are read two at a time as int32, so that a thread reads bytes and inputs that belong together. Rows are
whole blocks. `nested` stands for double quantization, whose scales are themselves `nested_code[index] * nested_scale +
offset`, with blocks of 256 that run through all experts.

A loop over blocks is not pipelined (`num_stages=1` where they are launched): Triton would fetch each value of the code
table by an asynchronous copy of its own.

Triton chooses for each `tl.load` which thread reads what, and moves what is read between threads, through shared
memory, where another load was given another order. So the code table and the inputs of `row_products` are read by
instructions in PTX, for which the order of the packed words is kept: half of all instructions were such moves.
"""
# mypy: ignore-errors
# ruff: noqa: D103 - what a kernel computes is said by the function that launches it, in expert_launches.py

import triton
import triton.language as tl


@triton.jit
def block_scales(scales, nested_scales, nested_code, offset, index, block_index, mask, nested: tl.constexpr):
    """Scales at `index` of those in memory; `block_index` counts those of all experts."""
    if nested:
        inner = tl.load(nested_scales + block_index // 256, mask=mask, other=0.0)
        return tl.load(nested_code + tl.load(scales + index, mask=mask, other=0).to(tl.int32)) * inner + offset
    else:  # noqa: RET505 - Triton must see two branches
        return tl.load(scales + index, mask=mask, other=0.0)


@triton.jit
def two_inputs(pairs, dtype: tl.constexpr):
    first = (pairs & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    second = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True)
    return first, second


@triton.jit
def looked_up(code, index):
    """Values of a table of float32, read by the threads that have their indices."""
    return tl.inline_asm_elementwise(
        "{ .reg .u64 at; mad.wide.u32 at, $1, 4, $2; ld.global.nc.f32 $0, [at]; }",
        "=f,r,l", [index, code.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def eight_inputs(pointer, ok):
    """Four pairs of inputs from a multiple of 16 bytes on, as int32; 0 where not `ok`."""
    return tl.inline_asm_elementwise(
        """{ .reg .pred there; setp.ne.b32 there, $5, 0;
        mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
        @there ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4]; }""",
        "=&r,=&r,=&r,=&r,l,r", [pointer.to(tl.int64), ok.to(tl.int32)], dtype=(tl.int32,) * 4, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def expert_at(ids, pair, ok, num_experts):
    """The expert of each pair, E for none, which ids below 0 and from E on stand for."""
    expert = tl.load(ids + pair, mask=ok, other=num_experts).to(tl.int64)
    return tl.where((expert < 0) | (expert > num_experts), num_experts, expert)


@triton.jit
def place_of(places, expert, ok, has_places: tl.constexpr):
    """Where an expert is in memory."""
    if has_places:
        return tl.load(places + expert, mask=ok, other=0).to(tl.int64)
    else:  # noqa: RET505 - Triton must see two branches
        return expert


@triton.jit
def row_products(
    x, data, scales, code, nested_scales, nested_code, offsets, bias,
    input_row, expert, place, row, row_ok,
    rows: tl.constexpr, columns: tl.constexpr, blocksize: tl.constexpr, block_columns: tl.constexpr,
    tile_rows: tl.constexpr, dtype: tl.constexpr, has_bias: tl.constexpr, nested: tl.constexpr,
):  # fmt: skip
    """Rows of weights times rows of x, (tile_rows,): `input_row`, `expert` and `place` are one number, or one each."""
    offset = 0.0
    if nested:
        offset = tl.load(offsets)
    words: tl.constexpr = block_columns // 8  # of four bytes
    parts: tl.constexpr = words // 4  # of four words, which lie in one block
    weight_row, stored_row = expert * rows + row, place * rows + row
    first_word, first_scale = stored_row * (columns // 8), stored_row * (columns // blocksize)
    first_block = weight_row * (columns // blocksize)
    data = data.to(tl.pointer_type(tl.int32), bitcast=True)
    word, part = tl.arange(0, words), tl.arange(0, parts)
    total = tl.zeros([tile_rows, parts], tl.float32)
    for begin in range(0, columns // 8, words):
        at = begin + word
        at_ok = at < columns // 8
        packed = tl.load(data + first_word[:, None] + at[None, :], mask=row_ok[:, None] & at_ok[None, :], other=0)
        pairs = eight_inputs(x + input_row[:, None] * (columns // 2) + at[None, :] * 4, at_ok[None, :])
        products = tl.zeros([tile_rows, words], tl.float32)
        for byte in tl.static_range(4):
            first, second = two_inputs(pairs[byte], dtype)
            products += looked_up(code, (packed >> (8 * byte + 4)) & 15) * first.to(tl.float32)
            products += looked_up(code, (packed >> (8 * byte)) & 15) * second.to(tl.float32)
        number = (begin + part * 4) * 8 // blocksize
        mask = row_ok[:, None] & (number < columns // blocksize)[None, :]
        index, block_index = first_scale[:, None] + number[None, :], first_block[:, None] + number[None, :]
        scale = block_scales(scales, nested_scales, nested_code, offset, index, block_index, mask, nested)
        total += tl.sum(tl.reshape(products, [tile_rows, parts, 4]), 2) * scale
    total = tl.sum(total, 1)
    if has_bias:
        total += tl.load(bias + weight_row, mask=row_ok, other=0.0).to(tl.float32)
    return total


@triton.jit
def gemv(
    x, data, scales, code, nested_scales, nested_code, offsets, places, ids, bias, out,
    pairs_per_row, num_experts,
    rows: tl.constexpr, columns: tl.constexpr, blocksize: tl.constexpr,
    block_rows: tl.constexpr, block_columns: tl.constexpr,
    has_bias: tl.constexpr, gated: tl.constexpr, nested: tl.constexpr, has_places: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1)
    expert = expert_at(ids, pair, True, num_experts)
    dtype: tl.constexpr = out.dtype.element_ty
    tile = tl.arange(0, block_rows)
    if gated:  # a row of the gates and its row of the ups, in turns
        limit: tl.constexpr = rows // 2
        row = tl.program_id(0) * (block_rows // 2) + tile // 2
        weight_row = row + tile % 2 * limit
    else:
        limit: tl.constexpr = rows
        row = tl.program_id(0) * block_rows + tile
        weight_row = row
    total = tl.zeros([block_rows], tl.float32)
    if expert < num_experts:
        total = row_products(
            x, data, scales, code, nested_scales, nested_code, offsets, bias,
            tl.full([1], pair // pairs_per_row, tl.int64), expert, place_of(places, expert, True, has_places),
            weight_row, row < limit,
            rows, columns, blocksize, block_columns, block_rows, dtype, has_bias, nested,
        )  # fmt: skip
    if gated:  # rounded where the operators of torch round
        gate, up = tl.split(tl.reshape(total.to(dtype).to(tl.float32), [block_rows // 2, 2]))
        row = tl.program_id(0) * (block_rows // 2) + tl.arange(0, block_rows // 2)
        total = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up
    tl.store(out + pair.to(tl.int64) * limit + row, total.to(dtype), mask=row < limit)


@triton.jit
def gemv_combined(
    x, data, scales, code, nested_scales, nested_code, offsets, places, ids, bias, weights, out,
    top_k, num_experts,
    rows: tl.constexpr, columns: tl.constexpr, blocksize: tl.constexpr,
    choices: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr,
    has_bias: tl.constexpr, nested: tl.constexpr, has_places: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1).to(tl.int64)
    dtype: tl.constexpr = out.dtype.element_ty
    tile_rows: tl.constexpr = choices * block_rows
    tile = tl.arange(0, tile_rows)
    chosen = tile // block_rows < top_k
    pair = tl.where(chosen, token * top_k + tile // block_rows, 0)
    row = tl.program_id(0) * block_rows + tile % block_rows
    expert = expert_at(ids, pair, chosen, num_experts)
    there = (expert < num_experts) & (row < rows)
    total = row_products(
        x, data, scales, code, nested_scales, nested_code, offsets, bias,
        pair, expert, place_of(places, expert, there, has_places), row, there,
        rows, columns, blocksize, block_columns, tile_rows, dtype, has_bias, nested,
    )  # fmt: skip
    weight = tl.load(weights + pair, mask=there, other=0.0).to(tl.float32)
    total = tl.where(there, total.to(dtype).to(tl.float32) * weight, 0.0)
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    total = tl.sum(tl.reshape(total, [choices, block_rows]), 0)
    tl.store(out + token * rows + row, total.to(dtype), mask=row < rows)


@triton.jit
def pairs_of_block(
    order, ends, num_experts, block, experts_padded: tl.constexpr, block_pairs: tl.constexpr
):  # fmt: skip
    """The expert of the block-th block of pairs, when each expert's pairs are cut into blocks; E if there are fewer."""
    number = tl.arange(0, experts_padded)
    known = number < num_experts
    end = tl.load(ends + number, mask=known, other=0)
    begin = tl.load(ends + number - 1, mask=(number > 0) & known, other=0)
    blocks = (tl.where(known, end - begin, 0) + block_pairs - 1) // block_pairs
    upto = tl.cumsum(blocks, 0)
    expert = tl.sum((upto <= block).to(tl.int32), 0)
    is_it = number == expert
    first = tl.sum(tl.where(is_it, begin + (block - upto + blocks) * block_pairs, 0), 0)
    last = tl.sum(tl.where(is_it, end, 0), 0)
    place = first + tl.arange(0, block_pairs)
    pair_ok = place < last
    pair = tl.load(order + place, mask=pair_ok, other=0).to(tl.int64)
    return expert, pair, pair_ok


@triton.jit
def grouped(
    x, data, scales, code, nested_scales, nested_code, offsets, places, order, ends, bias, out,
    pairs_per_row, num_experts,
    rows: tl.constexpr, columns: tl.constexpr, blocksize: tl.constexpr, experts_padded: tl.constexpr,
    block_pairs: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr,
    has_bias: tl.constexpr, nested: tl.constexpr, has_places: tl.constexpr,
):  # fmt: skip
    expert, pair, pair_ok = pairs_of_block(order, ends, num_experts, tl.program_id(1), experts_padded, block_pairs)
    if expert >= num_experts:
        return
    expert = expert.to(tl.int64)
    offset = 0.0
    if nested:
        offset = tl.load(offsets)
    dtype = out.dtype.element_ty
    half: tl.constexpr = block_columns // 2
    blocks: tl.constexpr = block_columns // blocksize
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    row_ok = row < rows
    place = place_of(places, expert, True, has_places)
    data += place * (rows * columns // 2)
    first_scale, first_block = place * (rows * columns // blocksize), expert * (rows * columns // blocksize)
    x += (pair // pairs_per_row) * (columns // 2)
    byte, block = tl.arange(0, half), tl.arange(0, blocks)
    total = tl.zeros([block_rows, block_pairs], tl.float32)
    for begin in range(0, columns // 2, half):
        at = begin + byte
        at_ok = at < columns // 2
        packed = tl.load(
            data + row[:, None] * (columns // 2) + at[None, :], mask=row_ok[:, None] & at_ok[None, :], other=0
        ).to(tl.int32)
        both = tl.load(x[:, None] + at[None, :], mask=pair_ok[:, None] & at_ok[None, :], other=0)
        first, second = two_inputs(both, dtype)
        number = begin * 2 // blocksize + block
        within = row[:, None] * (columns // blocksize) + number[None, :]
        index, block_index = first_scale + within, first_block + within
        mask = row_ok[:, None] & (number < columns // blocksize)[None, :]
        scale = block_scales(scales, nested_scales, nested_code, offset, index, block_index, mask, nested)
        if blocks == 1:
            scale = tl.reshape(scale, [block_rows, 1])
        else:
            scale = tl.broadcast_to(scale[:, :, None], [block_rows, blocks, blocksize // 2])
            scale = tl.reshape(scale, [block_rows, half])
        high = (looked_up(code, packed >> 4) * scale).to(dtype)
        low = (looked_up(code, packed & 15) * scale).to(dtype)
        total = tl.dot(high, tl.trans(first), total)
        total = tl.dot(low, tl.trans(second), total)
    if has_bias:
        total += tl.load(bias + expert * rows + row, mask=row_ok, other=0.0).to(tl.float32)[:, None]
    mask = row_ok[:, None] & pair_ok[None, :]
    tl.store(out + pair[None, :] * rows + row[:, None], total.to(dtype), mask=mask)


@triton.jit
def dequantize_visited(
    data, scales, code, nested_scales, nested_code, offsets, places, ends, out,
    first_row, first_column, num_rows,
    rows: tl.constexpr, columns: tl.constexpr, blocksize: tl.constexpr, width: tl.constexpr, block: tl.constexpr,
    nested: tl.constexpr, has_places: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    if begin == tl.load(ends + expert):
        return
    expert = expert.to(tl.int64)
    place = place_of(places, expert, True, has_places)
    offset = 0.0
    if nested:
        offset = tl.load(offsets)
    byte = tl.program_id(0) * (block // 2) + tl.arange(0, block // 2)
    ok = byte < num_rows * (width // 2)
    row = first_row + byte // (width // 2)
    column = first_column + byte % (width // 2) * 2
    value = row * columns + column
    packed = tl.load(data + place * (rows * columns // 2) + value // 2, mask=ok, other=0).to(tl.int32)
    index = place * (rows * columns // blocksize) + value // blocksize
    block_index = expert * (rows * columns // blocksize) + value // blocksize
    scale = block_scales(scales, nested_scales, nested_code, offset, index, block_index, ok, nested)
    values = tl.interleave(looked_up(code, packed >> 4) * scale, looked_up(code, packed & 15) * scale)
    at = tl.program_id(0) * block + tl.arange(0, block)
    out += expert * num_rows * width
    tl.store(out + at, values.to(out.dtype.element_ty), mask=at < num_rows * width)


@triton.jit(do_not_specialize=["num_pairs"])  # it differs from call to call
def route(
    ids, order, ends, num_pairs, num_experts,
    pairs_padded: tl.constexpr, experts_padded: tl.constexpr, step: tl.constexpr,
):  # fmt: skip
    pair = tl.arange(0, pairs_padded)
    mine = expert_at(ids, pair, pair < num_pairs, num_experts)
    rank = tl.zeros([pairs_padded], tl.int32)
    expert = tl.arange(0, experts_padded)
    end = tl.zeros([experts_padded], tl.int32)
    for begin in range(0, pairs_padded, step):
        other = begin + tl.arange(0, step)
        its = expert_at(ids, other, other < num_pairs, num_experts)
        is_first = (its[None, :] < mine[:, None]) | ((its[None, :] == mine[:, None]) & (other[None, :] < pair[:, None]))
        there = (other < num_pairs)[None, :]
        rank += tl.sum((is_first & there).to(tl.int32), 1)
        end += tl.sum(((its[None, :] <= expert[:, None]) & there).to(tl.int32), 1)
    tl.store(order + rank, pair, mask=pair < num_pairs)
    tl.store(ends + expert, end, mask=expert < num_experts)


@triton.jit
def combine(
    y, places, ids, weights, out,
    num_experts, features: tl.constexpr, top_k: tl.constexpr, block: tl.constexpr,
    has_places: tl.constexpr, has_weights: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)  # the second dimension of a grid ends at 65,535
    feature = tl.program_id(1) * block + tl.arange(0, block)
    ok = feature < features
    total = tl.zeros([block], tl.float32)
    for choice in range(0, top_k):
        pair = token * top_k + choice
        there = tl.where(expert_at(ids, pair, True, num_experts) < num_experts, features, 0)  # what of the row is read
        place = pair
        if has_places:
            place = tl.load(places + pair).to(tl.int64)
        value = tl.load(y + place * features + feature, mask=feature < there, other=0.0).to(tl.float32)
        if has_weights:
            value *= tl.load(weights + pair).to(tl.float32)
        total += value
    tl.store(out + token * features + feature, total.to(out.dtype.element_ty), mask=ok)


@triton.jit
def combine_backward(
    grad, y, order, ids, weights, grad_y, grad_weights,
    num_experts, features: tl.constexpr, top_k: tl.constexpr, block: tl.constexpr, has_weights: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    pair = tl.load(order + place).to(tl.int64)
    there = tl.where(expert_at(ids, pair, True, num_experts) < num_experts, features, 0)
    weight = 1.0
    if has_weights:
        weight = tl.load(weights + pair).to(tl.float32)
    total = tl.zeros([block], tl.float32)
    for begin in range(0, features, block):
        feature = begin + tl.arange(0, block)
        ok = feature < there
        value = tl.load(grad + pair // top_k * features + feature, mask=ok, other=0.0).to(tl.float32)
        total += value * tl.load(y + place * features + feature, mask=ok, other=0.0).to(tl.float32)
        tl.store(
            grad_y + place * features + feature, (value * weight).to(grad_y.dtype.element_ty), mask=feature < features
        )
    if has_weights:
        tl.store(grad_weights + pair, tl.sum(total, 0).to(grad_weights.dtype.element_ty))
