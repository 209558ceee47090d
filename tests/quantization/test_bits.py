"""What is loaded equals, bit for bit, what bitsandbytes makes of the same tensor cast to torch_dtype."""

import itertools

import pytest
import torch
from checkpoints import empty, save
from comparisons import equal
from references import FOUR_BIT, quantize_as_bitsandbytes
from torch import nn

from bigload import BnbQuantizationConfig, load_and_quantize_model
from bigload.quantization import bnb, quantizer

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class TwoLayers(nn.Module):
    """Sizes that fill blocks and sizes that do not; 300 blocks, so that nested scales take more than one block."""

    def __init__(self):
        super().__init__()
        self.even = nn.Linear(160, 128)
        self.odd = nn.Linear(70, 6, bias=False)
        self.head = nn.Linear(6, 3)


def load(tmp_path, device, checkpoint_dtype, config):
    full = TwoLayers().to(checkpoint_dtype)
    save(full.state_dict(), tmp_path)
    model = empty(TwoLayers)
    return full, load_and_quantize_model(model, config, tmp_path, device_map=device)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("mode", FOUR_BIT)
def test_4bit_parts_equal_bitsandbytes_own(tmp_path, device, mode, blocksize, storage):
    for checkpoint_dtype, torch_dtype in itertools.product(DTYPES, DTYPES):
        config = BnbQuantizationConfig.from_mode(
            mode, bnb_4bit_blocksize=blocksize, bnb_4bit_quant_storage=storage, torch_dtype=torch_dtype
        )
        full, model = load(tmp_path, device, checkpoint_dtype, config)
        for name in ("even", "odd"):
            source = getattr(full, name).weight.detach().to(device).to(torch_dtype)
            expected = quantize_as_bitsandbytes(source, mode, blocksize, storage)
            weight = getattr(model, name).weight
            state = weight.quant_state
            assert equal(weight.data, expected["weight"])
            assert equal(state.absmax, expected["absmax"])
            assert equal(state.code, expected["code"])
            assert (state.dtype, state.blocksize, state.quant_type) == (torch_dtype, blocksize, mode[:3])
            assert state.shape == source.shape
            assert state.nested == mode.endswith("-dq")
            if state.nested:
                assert equal(state.offset, expected["offset"])
                assert equal(state.state2.absmax, expected["nested_absmax"])
                assert equal(state.state2.code, expected["nested_code"])
                assert state.state2.blocksize == 256


@pytest.mark.parametrize("checkpoint_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("torch_dtype", DTYPES, ids=str)
def test_int8_rows_and_scales_equal_bitsandbytes_own(tmp_path, device, checkpoint_dtype, torch_dtype):
    config = BnbQuantizationConfig.from_mode("int8", torch_dtype=torch_dtype)
    full, model = load(tmp_path, device, checkpoint_dtype, config)
    for name in ("even", "odd"):
        source = getattr(full, name).weight.detach().to(device).to(torch_dtype)
        expected = quantize_as_bitsandbytes(source, "int8")
        weight = getattr(model, name).weight
        assert equal(weight.data, expected["weight"])
        assert weight.CB.data_ptr() == weight.data_ptr()
        assert equal(weight.SCB, expected["SCB"])


def test_weight_is_cast_to_torch_dtype_before_it_is_quantized(tmp_path, device):
    """The order changes the bits: quantized from float32, this weight's scales are others."""
    full, model = load(tmp_path, device, torch.float32, BnbQuantizationConfig.from_mode("nf4", torch_dtype="bf16"))
    uncast = quantize_as_bitsandbytes(full.even.weight.detach().to(device), "nf4")
    assert not equal(model.even.weight.quant_state.absmax, uncast["absmax"])


@pytest.mark.parametrize("mode", [*FOUR_BIT, "int8"])
def test_bits_do_not_depend_on_how_the_weight_was_cut_while_it_was_read(tmp_path, device, mode, monkeypatch):
    _, whole = load(tmp_path, device, torch.bfloat16, mode)
    monkeypatch.setenv("BIGLOAD_RING_BYTES", "1KiB")  # slots of 256 elements: less than two rows
    model = empty(TwoLayers)
    cut = load_and_quantize_model(model, mode, tmp_path, device_map=device)
    assert equal(cut.even.weight.data, whole.even.weight.data)
    assert equal(cut.odd.weight.data, whole.odd.weight.data)
    assert equal(cut.even.bias.data, whole.even.bias.data)


@pytest.mark.parametrize(
    "changed", [(bnb, "_exported", lambda *names: None), (quantizer, "_MAX_VALUES", 4096)], ids=["operators", "pieces"]
)
@pytest.mark.parametrize("mode", [*FOUR_BIT, "int8"])
def test_bits_do_not_depend_on_which_of_bitsandbytes_functions_is_called(tmp_path, device, mode, monkeypatch, changed):
    """Its operators where its library's functions are not known to be the same, and in pieces what is too long."""
    _, usual = load(tmp_path, device, torch.bfloat16, mode)
    monkeypatch.setattr(*changed)
    model = empty(TwoLayers)
    model = load_and_quantize_model(model, mode, tmp_path, device_map=device)
    for name in ("even", "odd"):
        found, expected = getattr(model, name).weight, getattr(usual, name).weight
        assert equal(found.data, expected.data)
        if mode == "int8":
            assert equal(found.SCB, expected.SCB)
        else:
            assert equal(found.quant_state.absmax, expected.quant_state.absmax)


@pytest.mark.parametrize("mode", FOUR_BIT)
def test_bits_do_not_depend_on_torchs_default_dtype(tmp_path, device, mode):
    _, usual = load(tmp_path, device, torch.float32, mode)
    model = empty(TwoLayers)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = load_and_quantize_model(model, mode, tmp_path, device_map=device)
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    for name in ("even", "odd"):
        found, expected = getattr(model, name).weight, getattr(usual, name).weight
        assert equal(found.data, expected.data)
        assert equal(found.quant_state.absmax, expected.quant_state.absmax)
        assert equal(found.quant_state.code, expected.quant_state.code)


@pytest.mark.cuda
def test_race_a_callers_own_busy_stream_does_not_change_the_bits(tmp_path):
    device = torch.device("cuda", 0)
    _, quiet = load(tmp_path, device, torch.bfloat16, "nf4")
    for _ in range(10):
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(20_000_000)
            model = empty(TwoLayers)
            model = load_and_quantize_model(model, "nf4", tmp_path, device_map=device)
            copied = model.even.weight.data.clone()  # on the caller's stream
        torch.cuda.synchronize()
        assert equal(copied, quiet.even.weight.data)
