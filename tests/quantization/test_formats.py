"""The formats' facts, held against the tensors that bitsandbytes makes."""

import bitsandbytes.functional as kernels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigload.hardware.layout import TensorSpec
from bigload.quantization.formats import FourBit, Int8, Plain, nbytes

SHAPES = st.tuples(st.integers(1, 60), st.integers(1, 80))


def facts(tensors):
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def tensors_of_4bit(weight, fmt):
    packed, state = kernels.quantize_4bit(
        weight,
        blocksize=fmt.blocksize,
        compress_statistics=fmt.double_quant,
        quant_type=fmt.quant_type,
        quant_storage=fmt.quant_storage,
    )
    tensors = {"weight": packed, "absmax": state.absmax, "quant_map": state.code}
    if fmt.double_quant:
        tensors |= {"nested_absmax": state.state2.absmax, "nested_offset": state.offset}
        tensors["nested_quant_map"] = state.state2.code
    return tensors


@settings(max_examples=40, deadline=None)
@given(
    shape=SHAPES,
    fmt=st.builds(
        FourBit,
        st.sampled_from(["nf4", "fp4"]),
        st.sampled_from([64, 128, 256]),
        st.booleans(),
        st.sampled_from([torch.uint8, torch.bfloat16]),
    ),
)
def test_4bit_parts_are_those_of_bitsandbytes(shape, fmt):
    if (shape[0] * shape[1] + 1) // 2 % fmt.quant_storage.itemsize:
        with pytest.raises(ValueError, match="bfloat16"):
            fmt.parts(shape)
        return
    tensors = tensors_of_4bit(torch.linspace(-1, 1, shape[0] * shape[1]).view(shape), fmt)
    assert fmt.parts(shape) == facts(tensors)
    assert nbytes(fmt, shape) == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("extra", [0, 1])
def test_scales_of_scales_are_counted_across_their_own_block_border(blocksize, extra):
    fmt = FourBit("nf4", blocksize, True, torch.uint8)
    shape = (256 + extra, blocksize)
    tensors = tensors_of_4bit(torch.linspace(-1, 1, shape[0] * shape[1]).view(shape), fmt)
    assert tensors["nested_absmax"].shape == (1 + extra,)
    assert fmt.parts(shape) == facts(tensors)


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES)
def test_int8_parts_are_those_of_bitsandbytes(shape):
    rows, scales, _ = kernels.int8_vectorwise_quant(torch.linspace(-1, 1, shape[0] * shape[1]).view(shape).half())
    assert Int8().parts(shape) == facts({"weight": rows, "SCB": scales})
    assert nbytes(Int8(), shape) == rows.nbytes + scales.nbytes


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 7), max_size=4).map(tuple),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]),
)
def test_plain_is_the_tensor_itself(shape, dtype):
    tensor = torch.zeros(shape, dtype=dtype)
    assert Plain(dtype).parts(shape) == facts({"weight": tensor})
    assert nbytes(Plain(dtype), shape) == tensor.nbytes


def test_packed_bytes_that_do_not_fill_the_storage_dtype_are_refused():
    with pytest.raises(ValueError, match="float64"):
        FourBit("nf4", 64, False, torch.float64).parts((3, 2))
