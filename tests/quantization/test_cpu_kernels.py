"""Blocks and pieces of a weight give, bit for bit, what bitsandbytes' own operation makes of the whole."""

import itertools
import math
import warnings

import bitsandbytes.functional as kernels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bigload.quantization.cpu_kernels as room
from bigload.quantization.cpu_kernels import quantize_blocks

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TYPES = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 4096)


def blocks_of(values, blocksize, quant_type):
    """What bigload makes of the values: packed bytes and scales, in memory that held something else."""
    packed = torch.full((len(values) // 2,), 0xA5, dtype=torch.uint8)
    absmax = torch.full((len(values) // blocksize,), math.nan)
    table = kernels.get_4bit_type(quant_type, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_blocks(values, blocksize, table, packed, absmax)
    return packed, absmax


def bits(tensor):
    return tensor.detach().reshape(-1).view(torch.uint8)


def check_blocks(values, blocksize=64, types=TYPES):
    for quant_type in types:
        packed, absmax = blocks_of(values, blocksize, quant_type)
        own = torch.ops.bitsandbytes.quantize_4bit.default(values, blocksize, quant_type, torch.uint8)
        assert torch.equal(packed, own[0].view(-1)), quant_type
        assert torch.equal(bits(absmax), bits(own[1])), quant_type


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_random_values(dtype, blocksize):
    check_blocks(torch.randn(4096 * 5).to(dtype), blocksize)
    check_blocks((torch.randn(4096 * 3) ** 5).to(dtype), blocksize)


@pytest.mark.parametrize("numel", [4096, 8192 - 4096, 8192, 8192 + 4096, 3 * 8192, 5 * 8192 + 4096])
@pytest.mark.parametrize("blocksize", [64, 4096])
def test_sizes_around_the_pieces_that_it_works_in(monkeypatch, threads, blocksize, numel):
    monkeypatch.setattr(room, "_PIECE", 8192)
    for dtype in DTYPES:
        check_blocks(torch.randn(numel).to(dtype), blocksize)


@pytest.mark.parametrize("numel", [2**18 - 64, 2**18, 2**18 + 64, 2**19 + 64])
def test_sizes_around_the_piece_that_is_set(threads, numel):
    check_blocks(torch.randn(numel).bfloat16(), types=["nf4"])


def test_no_values_are_no_blocks():
    packed, absmax = blocks_of(torch.empty(0), 64, "nf4")
    assert (len(packed), len(absmax)) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_finite_value_of_16_bits(dtype):
    """Sorted, so that each block holds values of a size; and shuffled, so that all are small beside the largest."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite()]
    whole = finite[: len(finite) - len(finite) % 128].clone()
    for blocksize in (32, 64, 128):
        check_blocks(whole, blocksize)
        check_blocks(whole[torch.randperm(len(whole))], blocksize)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=64),
    st.integers(1, 200),
)
def test_any_finite_float32(values, repeats):
    count = 32 * (-(-len(values) * repeats // 32))
    repeated = list(itertools.islice(itertools.cycle(values), count))
    check_blocks(torch.tensor(repeated), 32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1.0, -1.0, 3e-39, 1e-40, 5e-324, 1e-38, 1.2e-38, 6e-8, 65504.0, -3e38, math.pi]
)
def test_constant_blocks_among_others(dtype, value):
    """In dtypes that do not hold the value it is zero or refused, as infinity is."""
    constant = torch.full((128,), value).to(dtype)
    if constant.isfinite().all():
        check_blocks(torch.cat([torch.randn(64).to(dtype), constant, torch.randn(64).to(dtype)]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("others", [0.0, -0.0, 1e-45, 1e-38, 1.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_one_huge_value_in_a_block_of_small_ones(dtype, others, sign):
    values = torch.full((256,), others).to(dtype)
    for begin, huge in zip((0, 127, 170), (1.0, torch.finfo(dtype).max, torch.finfo(dtype).tiny), strict=True):
        values[begin] = sign * huge
    check_blocks(values)


def test_denormal_blocks():
    denormals = torch.randint(-(2**23) + 1, 2**23, (4096,), dtype=torch.int32)
    values = (denormals.abs() | (denormals < 0).int() * -(2**31)).view(torch.float32)
    assert values.abs().max() < torch.finfo(torch.float32).tiny
    check_blocks(values)
    check_blocks(values[:64].repeat(64) * torch.linspace(0, 1, 4096))
    check_blocks((torch.arange(-2048, 2048, dtype=torch.int16) & -32641).view(torch.bfloat16))


def test_negative_zeros_are_packed_as_bitsandbytes_packs_them():
    """fp4 has two codes for zero."""
    signs = torch.tensor([0.0, -0.0, 1.0, -1.0]).repeat(32)
    check_blocks(signs)
    check_blocks(torch.tensor([0.0, -0.0]).repeat(64))


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("scale", [1.0, -1.0, 0.1, 3.7, 1e-30, 1e30])
def test_values_at_and_beside_the_bounds_between_two_codes(quant_type, scale):
    code = kernels.get_4bit_type(quant_type, device="cpu").sort().values
    bounds = (code[:-1] + code[1:]) / 2 * scale
    near = [bounds, code * scale]
    for direction in (math.inf, -math.inf):
        step = bounds
        for _ in range(4):
            step = torch.nextafter(step, torch.tensor(direction))
            near.append(step)
    values = torch.cat(near)
    blocks = torch.zeros(len(values), 64)
    blocks[:, 0] = scale  # the largest of its block
    blocks[:, 1:63] = values[torch.randint(len(values), (len(values), 62))]
    blocks[:, 63] = values.flip(0)
    check_blocks(blocks.view(-1), types=[quant_type])
    check_blocks(blocks.bfloat16().view(-1), types=[quant_type])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_values_that_are_not_finite_show_in_their_scale_only_and_numpy_is_silent(dtype, value):
    """A load refuses them by their scales, with an error that says what to do."""
    values = torch.randn(192).to(dtype)
    values[100] = value
    _, absmax = blocks_of(values, 64, "nf4")
    assert absmax.isfinite().tolist() == [True, False, True]


def test_values_are_not_changed():
    values = torch.randn(2, 4096)[1]
    before = values.clone()
    blocks_of(values, 64, "nf4")
    assert torch.equal(values, before)


def test_only_its_own_part_of_the_memory_is_filled():
    values = torch.randn(256)
    packed, absmax = torch.full((256,), 7, dtype=torch.uint8), torch.full((8,), 7.0)
    table = kernels.get_4bit_type("nf4", device="cpu")
    quantize_blocks(values, 64, table, packed[64 : 64 + 128], absmax[2:6])
    own = torch.ops.bitsandbytes.quantize_4bit.default(values, 64, "nf4", torch.uint8)
    assert torch.equal(packed[64:192], own[0].view(-1))
    assert torch.equal(absmax[2:6], own[1])
    assert (packed[:64] == 7).all()
    assert (packed[192:] == 7).all()
    assert (absmax[:2] == 7).all()
    assert (absmax[6:] == 7).all()
