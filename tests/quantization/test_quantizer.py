"""A weight that comes in pieces, of any size and in any order, has the bits of one quantized whole."""

import itertools
import random

import pytest
import torch
from comparisons import assert_same_bits
from references import FOUR_BIT, parts_of_4bit, quantize_as_bitsandbytes

import bigload.quantization.cpu_kernels as room
import bigload.quantization.quantizer as quantizing
from bigload.quantization.formats import FourBit, Int8
from bigload.quantization.quantizer import Quantizer, quantize

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCKSIZES = (32, 64, 128, 4096)
MODES = (*FOUR_BIT, "int8")


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


# Kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_kernels_that_are_loaded_ahead_are_those_of_the_format_and_change_no_bit(device, mode, dtype, monkeypatch):
    quantizing.load_kernels.cache_clear()
    weight, fmt, seen = torch.randn(8, 128, dtype=dtype, device=device), format_of(mode), []
    expected = parts_of(quantize(weight, fmt))
    own = quantizing.Quantizer.__init__

    def noted(self, shape, *rest):
        seen.append(rest)
        own(self, shape, *rest)

    monkeypatch.setattr(quantizing.Quantizer, "__init__", noted)
    for _ in range(2):
        quantizing.load_kernels(fmt, dtype, weight.device)
    assert seen == [(fmt, dtype, weight.device)]  # once
    check_parts(quantize(weight, fmt), expected)


def test_largest_values_are_those_of_each_tensor(device):
    tensors = [torch.tensor(values, device=device) for values in ([1.0, -3.0], [2.0], [0.0, float("nan")])]
    found = quantizing.largest(tensors)
    assert found[:2] == [3.0, 2.0]
    assert found[2] != found[2]
    assert quantizing.largest([torch.tensor([3, 200], dtype=torch.float16, device=device)]) == [200.0]


@pytest.mark.cuda
@pytest.mark.multi_gpu
def test_kernels_are_loaded_on_a_gpu_that_is_not_the_current_one():
    gpu = torch.device("cuda", 1)
    quantizing.load_kernels.cache_clear()
    with torch.cuda.device(0):
        for mode in MODES:
            quantizing.load_kernels(format_of(mode), torch.bfloat16, gpu)
        assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(gpu)
    weight = torch.randn(8, 128, dtype=torch.bfloat16, device=gpu)
    with torch.cuda.device(gpu):
        for mode in MODES:
            check_parts(quantize(weight, format_of(mode)), quantize_as_bitsandbytes(weight, mode))
