"""Blocks and pieces of a weight give, bit for bit, what bitsandbytes' own operation makes of the whole."""

import itertools
import math
import random
import warnings

import bitsandbytes.functional as kernels
import pytest
import torch
from comparisons import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from references import FOUR_BIT, parts_of_4bit, quantize_as_bitsandbytes

import bigload.quantization.cpu_kernels as room
import bigload.quantization.quantizer as quantizing
from bigload.quantization.cpu_kernels import quantize_blocks
from bigload.quantization.formats import FourBit, Int8
from bigload.quantization.quantizer import Quantizer, quantize

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TYPES = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 4096)
MODES = (*FOUR_BIT, "int8")


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


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


# The Quantizer


def format_of(mode, blocksize=64, storage=torch.uint8):
    return Int8() if mode == "int8" else FourBit(mode[:3], blocksize, mode.endswith("-dq"), storage)


def parts_of(weight):
    """A weight's tensors by the names that `quantize_as_bitsandbytes` gives them."""
    if weight.row_scales is not None:
        return {"weight": weight.data, "SCB": weight.row_scales}
    return parts_of_4bit(weight.data, weight.quant_state)


def check_parts(weight, expected):
    assert_same_bits(parts_of(weight), expected)


def pieces_of(numel, values_per_scale, rng):
    """Cut at random multiples of the values_per_scale, in random order."""
    places = range(values_per_scale, numel, values_per_scale)
    cuts = sorted(rng.sample(places, min(len(places), rng.randint(0, 6))))
    pieces = list(itertools.pairwise([0, *cuts, numel]))
    rng.shuffle(pieces)
    return pieces


def quantized_in_pieces(weight, mode, rng, blocksize=64, storage=torch.uint8):
    quantizer = Quantizer(tuple(weight.shape), format_of(mode, blocksize, storage), weight.dtype, weight.device)
    flat = weight.contiguous().view(-1)
    for begin, end in pieces_of(weight.numel(), quantizer.values_per_scale, rng):
        piece = flat[begin:end].clone()
        quantizer.add(piece, begin)
        piece.zero_()  # it is read by then, in the order of the stream, and not kept
    return quantizer.finish()


@pytest.mark.parametrize(
    "shape", [(160, 128), (6, 70), (5, 13), (1, 64), (3, 1), (1, 1), (301, 64), (33, 127)], ids=str
)
@pytest.mark.parametrize("mode", MODES)
def test_pieces_of_any_size_in_any_order_give_the_bits_of_the_whole(device, mode, shape, monkeypatch):
    monkeypatch.setattr(quantizing, "_CPU_PIECE", 300)
    rng = random.Random(f"{mode} {shape}")
    for dtype in DTYPES:
        weight = torch.randn(shape).to(device, dtype)
        expected = quantize_as_bitsandbytes(weight, mode)
        for _ in range(3):
            check_parts(quantized_in_pieces(weight, mode, rng), expected)
        check_parts(quantize(weight, format_of(mode)), expected)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("mode", FOUR_BIT)
def test_pieces_of_blocks_of_any_size(device, mode, blocksize):
    rng = random.Random(blocksize)
    weight = torch.randn(150, 128).to(device, torch.bfloat16)  # 4.7 of the largest blocks
    expected = quantize_as_bitsandbytes(weight, mode, blocksize)
    for _ in range(3):
        check_parts(quantized_in_pieces(weight, mode, rng, blocksize), expected)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("mode", FOUR_BIT)
def test_pieces_in_other_storage(device, mode, storage):
    rng = random.Random(0)
    weight = torch.randn(40, 72).to(device)
    expected = quantize_as_bitsandbytes(weight, mode, storage=storage)
    for _ in range(3):
        check_parts(quantized_in_pieces(weight, mode, rng, storage=storage), expected)


def weights_with_odd_rows():
    """Rows and blocks of zeros, of one value, with one huge value, and negative zeros."""
    weight = torch.randn(24, 64)
    weight[3] = 0.0
    weight[4] = -0.0
    weight[7] = 2.5
    weight[8] = 0
    weight[8, 5] = -6e4
    weight[23] = 0
    return weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_rows_of_zeros_and_other_odd_ones(device, mode, dtype, monkeypatch):
    monkeypatch.setattr(quantizing, "_CPU_PIECE", 128)
    rng = random.Random(1)
    weight = weights_with_odd_rows().to(device, dtype)
    for shape in ((24, 64), (64, 24), (1536, 1), (1, 1536)):
        reshaped = weight.reshape(shape)
        expected = quantize_as_bitsandbytes(reshaped, mode)
        for _ in range(3):
            check_parts(quantized_in_pieces(reshaped, mode, rng), expected)


def test_pieces_over_many_threads(threads, monkeypatch):
    monkeypatch.setattr(room, "_PIECE", 4096)
    rng = random.Random(2)
    weight = torch.randn(257, 129).bfloat16()
    for mode in FOUR_BIT:
        check_parts(quantized_in_pieces(weight, mode, rng), quantize_as_bitsandbytes(weight, mode))


@pytest.mark.parametrize("mode", MODES)
def test_weight_without_values_has_the_parts_that_its_format_says(mode):
    for shape in ((0, 64), (0, 1)):
        made = quantize(torch.empty(shape), format_of(mode))
        assert made.data.shape == format_of(mode).parts(shape)["weight"].shape


@pytest.mark.parametrize("mode", MODES)
def test_each_weight_has_memory_of_its_own(device, mode):
    """Tensors that share memory cannot be saved as safetensors."""
    weight = torch.randn(8, 64, device=device)
    first, second = (parts_of(quantize(weight, format_of(mode))) for _ in range(2))
    places = [tensor.untyped_storage().data_ptr() for parts in (first, second) for tensor in parts.values()]
    assert len(places) == len(set(places))


def test_the_states_dtype_is_the_weights_and_its_shape_too(device):
    for dtype in DTYPES:
        state = quantize(torch.randn(6, 70).to(device, dtype), format_of("nf4-dq", 128)).quant_state
        assert (state.dtype, tuple(state.shape), state.blocksize, state.quant_type) == (dtype, (6, 70), 128, "nf4")
