"""Triton kernels that keep a cache of experts; imported where there is a GPU that runs them.

`book`, int64, holds: the number of calls, the hits, the misses, how many experts are missing; then of each slot its
expert plus one, 0 for none; of each slot the call that used it last; pairs of a missing expert and its slot, as many as
there are slots; and of each part that experts have of their own where it begins in the source, its size in each expert,
and where it goes, in words.
"""
# mypy: ignore-errors
# ruff: noqa: D103 - what a kernel does is said by what launches it, in gpu_book.py

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["pairs", "is_first"])
def admit(
    ids, table, book, pairs, is_first, num_experts, slots,
    block_pairs: tl.constexpr, block_experts: tl.constexpr, block_slots: tl.constexpr,
):  # fmt: skip
    owners, uses, missing = book + 4, book + 4 + slots, book + 4 + 2 * slots
    call = tl.load(book) + is_first  # a call comes in turns, and counts an expert once
    pair = tl.arange(0, block_pairs)
    given = tl.load(ids + pair, mask=pair < pairs, other=-1).to(tl.int64)
    expert = tl.arange(0, block_experts).to(tl.int64)
    is_given = tl.max((given[None, :] == expert[:, None]).to(tl.int32), 1) > 0
    is_wanted = is_given & (expert < num_experts)
    slot = tl.load(table + expert, mask=is_wanted, other=-1)
    is_there, lacks = is_wanted & (slot >= 0), is_wanted & (slot < 0)
    is_hit = is_there & (tl.load(uses + slot, mask=is_there, other=0) != call)
    tl.store(uses + slot, call, mask=is_there)
    tl.debug_barrier()
    each = tl.arange(0, block_slots)
    used = tl.load(uses + each, mask=each < slots, other=0x7FFFFFFFFFFFFFFF)
    number, count = tl.cumsum(lacks.to(tl.int32), 0) - 1, tl.sum(lacks.to(tl.int32), 0)
    for at in range(count):
        new = tl.sum(tl.where(lacks & (number == at), expert, 0), 0)
        free = tl.argmin(used, 0).to(tl.int64)
        used = tl.where(each == free, call, used)
        old = tl.load(owners + free) - 1
        tl.store(table + old, -1, mask=old >= 0)
        tl.store(table + new, free.to(tl.int32))
        tl.store(owners + free, new + 1)
        tl.store(uses + free, call)
        tl.store(missing + 2 * at, new)
        tl.store(missing + 2 * at + 1, free)
    tl.store(book, call)
    tl.store(book + 1, tl.load(book + 1) + tl.sum(is_hit.to(tl.int64), 0))
    tl.store(book + 2, tl.load(book + 2) + count)
    tl.store(book + 3, count.to(tl.int64))


@triton.jit
def fetch(source, memory, book, slots, num_parts: tl.constexpr, block: tl.constexpr):
    at = tl.program_id(1)
    if at < tl.load(book + 3):
        missing, parts = book + 4 + 2 * slots + 2 * at, book + 4 + 4 * slots
        expert, slot = tl.load(missing), tl.load(missing + 1)
        index = tl.arange(0, block)
        for part in range(num_parts):
            own = parts + 3 * part
            begin, words, target = tl.load(own), tl.load(own + 1), tl.load(own + 2)
            # Whole 16 bytes, so that each thread reads as many at once.
            start = tl.multiple_of(begin + expert * words, 4)
            to = tl.multiple_of(target + slot * words, 4)
            for first in range(tl.program_id(0) * block, words, tl.num_programs(0) * block):
                inside = first + index
                values = tl.load(source + start + inside, mask=inside < tl.multiple_of(words, 4))
                tl.store(memory + to + inside, values, mask=inside < tl.multiple_of(words, 4))
