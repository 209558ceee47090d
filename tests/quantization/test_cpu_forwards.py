"""On the CPU every layer computes what its weight says, whatever its shape, and says the same after it ran."""

import copy
import io

import bitsandbytes as bnb
import pytest
import torch
from comparisons import assert_same_bits, relative_error, state_of
from references import FOUR_BIT, dequantize_by_hand, quantize_as_bitsandbytes
from torch import nn

from bigload import BnbQuantizationConfig, load_and_quantize_model
from bigload.quantization.bnb import dequantize_4bit

# (out_features, in_features): whole and broken rows of 32, whole and broken blocks, multiples of 16 that
# bitsandbytes' own kernel gets wrong without a word, odd sizes, single features.
SHAPES = [(64, 128), (2, 64), (33, 65), (64, 96), (32, 160), (64, 100), (7, 3), (1, 1), (5, 1), (64, 63), (32, 130)]


def quantized(shape, mode, bias=True, **fields):
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=bias), nn.Identity())
    plain = copy.deepcopy(model[0])
    fields = {"torch_dtype": "fp32", "bnb_4bit_compute_dtype": "fp32", **fields}
    model = load_and_quantize_model(model, BnbQuantizationConfig.from_mode(mode, **fields), device_map="cpu")
    return plain, model[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("mode", FOUR_BIT)
def test_4bit_layer_of_any_shape_computes_with_its_own_weight(shape, mode, blocksize):
    plain, layer = quantized(shape, mode, bnb_4bit_blocksize=blocksize)
    assert isinstance(layer, bnb.nn.Linear4bit)
    parts = quantize_as_bitsandbytes(plain.weight.detach(), mode, blocksize)
    expected_weight = dequantize_by_hand(parts, shape, blocksize)
    assert torch.equal(dequantize_4bit(layer.weight.data, layer.weight.quant_state, torch.float32), expected_weight)
    for x in (torch.randn(3, shape[1]), torch.randn(2, 3, shape[1]), torch.randn(1, shape[1])):
        expected = nn.functional.linear(x, expected_weight, plain.bias)
        # Training mode multiplies in float32; eval mode may in bfloat16, which has 8 bits.
        assert relative_error(layer.train()(x), expected) < 1e-5
        with torch.no_grad():
            assert relative_error(layer.eval()(x), expected) < 2e-2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_layer_of_any_shape_computes_with_its_own_weight(shape):
    plain, layer = quantized(shape, "int8")
    assert isinstance(layer, bnb.nn.Linear8bitLt)
    expected_weight = dequantize_by_hand(quantize_as_bitsandbytes(plain.weight.detach(), "int8"), shape)
    for x in (torch.randn(3, shape[1]), torch.randn(2, 3, shape[1])):
        expected = nn.functional.linear(x, expected_weight, plain.bias)
        with torch.no_grad():
            # Activations are rounded to int8, one scale a row: 1/127 of the largest at most.
            assert relative_error(layer.eval()(x), expected) < 2e-2


@pytest.mark.parametrize("shape", [(64, 128), (64, 96), (33, 65)], ids=str)
@pytest.mark.parametrize("mode", FOUR_BIT)
def test_gradients_after_an_eval_forward_equal_those_of_a_layer_that_never_ran(shape, mode):
    _, layer = quantized(shape, mode)
    _, fresh = quantized(shape, mode)
    fresh.load_state_dict({"bias": layer.bias}, strict=False)
    fresh.weight, fresh.quant_state = copy.deepcopy(layer.weight), None
    fresh.quant_state = fresh.weight.quant_state
    x = torch.randn(4, shape[1])
    with torch.no_grad():
        layer.eval()(x)
    gradients = []
    for each in (layer.eval(), layer.train(), fresh.train()):
        entry = x.clone().requires_grad_()
        each(entry).square().sum().backward()
        gradients.append(entry.grad)
    assert gradients[0].abs().sum() > 0
    assert torch.equal(gradients[0], gradients[2])
    assert torch.equal(gradients[1], gradients[2])


@pytest.mark.parametrize("shape", [(64, 128), (64, 96)], ids=str)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", FOUR_BIT)
def test_state_dict_is_the_same_before_and_after_an_eval_forward(shape, mode, storage):
    _, layer = quantized(shape, mode, bnb_4bit_quant_storage=storage)

    before = state_of(layer)
    for _ in range(2):
        with torch.no_grad():
            layer.eval()(torch.randn(3, shape[1]))
        assert_same_bits(layer.state_dict(), before)


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq"])
def test_weight_after_a_move_and_an_eval_forward_is_the_one_that_was_loaded(mode):
    plain, layer = quantized((64, 128), mode)
    expected = quantize_as_bitsandbytes(plain.weight.detach(), mode)
    with torch.no_grad():
        layer.eval()(torch.randn(3, 128))
    layer.to("cpu")
    assert torch.equal(layer.weight.data, expected["weight"])
    assert torch.equal(layer.weight.quant_state.absmax, expected["absmax"])
    assert layer.weight.quant_state.nested == mode.endswith("-dq")


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_a_copy_and_a_pickle_of_a_layer_that_ran_compute_the_same(mode):
    for shape in [(64, 128), (64, 96), (5, 1)]:
        _, layer = quantized(shape, mode)
        x = torch.randn(3, shape[1])
        with torch.no_grad():
            expected = layer.eval()(x)
            file = io.BytesIO()
            torch.save(layer, file)
            file.seek(0)
            for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
                assert torch.equal(twin(x), expected)
                layer_parameters = {id(parameter) for parameter in layer.parameters()}
                assert not layer_parameters & {id(parameter) for parameter in twin.parameters()}


@pytest.mark.parametrize("mode", FOUR_BIT)
def test_no_rows_give_no_rows(mode):
    for shape in SHAPES:
        _, layer = quantized(shape, mode)
        with torch.no_grad():
            assert layer.eval()(torch.empty(0, shape[1])).shape == (0, shape[0])
            assert layer(torch.empty(2, 0, shape[1])).shape == (2, 0, shape[0])


@pytest.mark.parametrize("mode", FOUR_BIT)
def test_what_others_read_of_a_weight_after_an_eval_forward_is_what_was_loaded(mode):
    """PEFT's merge and transformers' dequantize read the weight and its state, not through us."""
    plain, layer = quantized((64, 128), mode)
    with torch.no_grad():
        layer.eval()(torch.randn(3, 128))
    found = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    expected = dequantize_by_hand(quantize_as_bitsandbytes(plain.weight.detach(), mode), (64, 128))
    assert torch.equal(found, expected)


def test_a_weight_that_is_exchanged_is_packed_anew():
    _, layer = quantized((64, 128), "nf4")
    other_plain, other = quantized((64, 128), "nf4")
    x = torch.randn(3, 128)
    with torch.no_grad():
        layer.eval()(x)
        layer.weight, layer.bias = other.weight, other.bias
        assert torch.equal(layer(x), other.eval()(x))
        assert relative_error(layer(x), other_plain(x)) < 0.2


def test_weights_written_in_place_are_packed_anew():
    _, layer = quantized((64, 128), "nf4")
    _, other = quantized((64, 128), "nf4")
    x = torch.randn(3, 128)
    with torch.no_grad():
        layer.eval()(x)
        layer.weight.copy_(other.weight)
        layer.weight.quant_state.absmax.copy_(other.weight.quant_state.absmax)
        layer.bias.copy_(other.bias)
        assert torch.equal(layer(x), other.eval()(x))


@pytest.mark.parametrize("way", ["exchanged", "written"])
@pytest.mark.parametrize(
    ("mode", "part"), [("nf4", "absmax"), ("nf4-dq", "absmax"), ("nf4-dq", "offset"), ("nf4-dq", "2")]
)
def test_scales_that_are_changed_count_in_the_next_forward(mode, part, way):
    """Each alone, the packed bytes left as they are."""
    _, layer = quantized((64, 128), mode)
    x, state = torch.randn(3, 128), layer.weight.quant_state
    owner, name = (state.state2, "absmax") if part == "2" else (state, part)
    with torch.no_grad():
        before = layer.eval()(x)
        changed = getattr(owner, name).flip(0) if part == "absmax" else getattr(owner, name) * 2
        if way == "written":
            getattr(owner, name).copy_(changed)
        else:
            setattr(owner, name, changed)
        weight = bnb.functional.dequantize_4bit(layer.weight.data, state)
        found = layer(x)
        assert relative_error(found, nn.functional.linear(x, weight.float(), layer.bias.float())) < 0.02
        assert not torch.equal(found, before)


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "int8"])
def test_compiled_layers_compute_the_same(mode):
    for shape in [(64, 128), (64, 96)]:
        _, layer = quantized(shape, mode)
        x = torch.randn(3, shape[1])
        with torch.no_grad():
            expected = layer.eval()(x)
            # Compiled, the packed kernel is not used: its bfloat16 rounding is the difference.
            assert relative_error(torch.compile(layer, backend="eager")(x), expected) < 2e-2


def test_threads_that_run_a_layer_first_at_once_all_get_its_output(usual_threads):
    import sys
    from concurrent.futures import ThreadPoolExecutor

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            for _ in range(20):
                _, layer = quantized((64, 128), "nf4-dq")
                x = torch.randn(3, 128)
                layer.eval()

                def run(layer=layer, x=x):
                    with torch.no_grad():
                        return layer(x)

                outputs = [task.result() for task in [pool.submit(run) for _ in range(8)]]
                assert all(torch.equal(output, outputs[0]) for output in outputs)
    finally:
        sys.setswitchinterval(interval)


def test_int8_training_layer_takes_inputs_of_any_dimensions():
    _, layer = quantized((32, 64), "int8-training")
    for shape in [(64,), (3, 64), (2, 3, 64), (2, 2, 3, 64)]:
        x = torch.randn(shape, requires_grad=True)
        out = layer.train()(x)
        assert out.shape == (*shape[:-1], 32)
        out.sum().backward()
        assert x.grad.shape == x.shape
        assert layer.weight.grad.shape == (32, 64)


def test_int8_training_layer_evaluates_with_the_weights_of_the_last_step():
    _, layer = quantized((32, 64), "int8-training")
    x = torch.randn(2, 3, 64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(2):
        layer.train()(x).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            expected = nn.functional.linear(x, layer.weight.float(), layer.bias.float())
            assert relative_error(layer.eval()(x), expected) < 0.02  # the weight's own int8 rounding


@pytest.mark.cuda
@pytest.mark.parametrize("mode", FOUR_BIT)
def test_layer_that_ran_on_the_cpu_moves_to_a_gpu_with_its_exact_weight(mode):
    for shape in [(64, 128), (64, 96)]:
        plain, layer = quantized(shape, mode)
        x = torch.randn(3, shape[1])
        expected_weight = dequantize_by_hand(quantize_as_bitsandbytes(plain.weight.detach(), mode), shape)
        expected = nn.functional.linear(x, expected_weight, plain.bias)
        with torch.no_grad():
            layer.eval()(x)
            moved = layer.to("cuda")
            assert relative_error(moved(x.cuda()), expected) < 1e-2


LAYOUTS = {
    "transposed": lambda rows: rows.T.contiguous().T,
    "transposed in a batch": lambda rows: rows.expand(2, *rows.shape).transpose(1, 2).contiguous().transpose(1, 2),
    "every second row": lambda rows: rows.repeat_interleave(2, 0)[::2],
    "every second feature": lambda rows: rows.repeat_interleave(2, 1)[:, ::2],
    "one row for all": lambda rows: rows[:1].expand(4, -1),
    "one feature for all": lambda rows: rows[:, :1].expand(-1, rows.shape[1]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", [*FOUR_BIT, "int8"])
def test_how_an_input_lies_in_memory_does_not_matter(device, layout, mode):
    """A picture's patches come transposed, from `flatten(2).transpose(1, 2)`: the packed kernel read them in order."""
    for shape in SHAPES:
        model = nn.Sequential(nn.Linear(shape[1], shape[0]), nn.Identity())
        config = BnbQuantizationConfig.from_mode(mode, torch_dtype="fp16")
        layer = load_and_quantize_model(model, config, device_map=device)[0].eval()
        x = LAYOUTS[layout](torch.randn(6, shape[1], dtype=torch.float16, device=device))
        with torch.no_grad():
            expected = layer(x.clone(memory_format=torch.contiguous_format))
            assert relative_error(layer(x), expected) < 2e-3  # other kernels sum in another order
