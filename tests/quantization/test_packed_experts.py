"""Packed weights of which only some experts are in memory: they have the values of all, whatever lies beside them."""

import pytest
import torch
from experts import in_places, packed

from bigload.quantization.bnb import dequantize_4bit
from bigload.quantization.formats import FourBit
from bigload.quantization.packed_experts import PackedExperts, cache_layout

# Of the last, the scales of an expert begin anywhere in a block of scales, and those of the seventh end in the next.
SHAPES = [((5, 96, 192), 64), ((6, 64, 256), 64), ((7, 48, 64), 32), ((9, 40, 64), 64)]


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4", "fp4-dq"])
@pytest.mark.parametrize(("shape", "blocksize"), SHAPES, ids=str)
def test_an_expert_has_its_values_in_any_slot(shape, blocksize, mode, device):
    parameter = packed(torch.randn(shape, device=device), mode, blocksize=blocksize)
    weight = PackedExperts.of(parameter)
    wanted = sorted({0, 3, shape[0] - 3, shape[0] - 1})
    some = in_places(weight, wanted, 5)
    assert some.shape == shape
    for expert in wanted:
        assert torch.equal(some.plain_scales(expert), weight.plain_scales(expert))
        for dtype in (torch.float32, torch.bfloat16):
            values = dequantize_4bit(parameter.data, parameter.quant_state, dtype)  # by bitsandbytes, all at once
            assert torch.equal(some.dequantize(expert, dtype), values[expert])
            assert torch.equal(weight.dequantize(expert, dtype), values[expert])
    with pytest.raises(KeyError):
        some.dequantize(1, torch.float32)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq"])
def test_a_layout_has_room_for_what_an_expert_is_and_no_more(mode, storage):
    fmt = FourBit("nf4", 64, mode == "nf4-dq", storage)
    weights = {"up": (fmt, (8, 96, 64)), "down": (fmt, (8, 64, 96))}
    whole = sum(part.nbytes for _, shape in weights.values() for part in fmt.parts(shape).values()) + 4 * 8
    whole += 8 * (4 + 4 * 8 + 3 * 4)  # in which a GPU keeps the book
    parts = cache_layout(weights, 8).parts
    assert sum(part.nbytes for part in parts.values()) == whole
