"""What quantized layers do with inputs that bitsandbytes refuses, crashes on, or computes without a word."""

import copy

import pytest
import torch
from streaming import engines_of
from torch import nn

from bigload import BnbQuantizationConfig, QuantizationError, load_and_quantize_model
from bigload.quantization.layers import move_int8
from bigload.quantization.own_forwards import forward_main_weights, own_forward
from bigload.quantization.quantized_weight import keep_row_scales, row_scales

MODES = ("nf4", "nf4-dq", "fp4", "int8", "int8-training")
# (in_features, out_features): a usual layer, and those that have a forward of their own on the CPU.
SIZES = [(64, 128), (96, 33), (1, 5)]
INTEGERS = [torch.uint8, torch.int8, torch.int64, torch.bool]


class Named(nn.Module):
    """Its middle layer has a path of two parts; the first and last are small."""

    def __init__(self, width=64, out=128):
        super().__init__()
        self.inner = nn.ModuleDict({"proj": nn.Linear(width, out)})
        self.act = nn.Identity()

    def forward(self, x):
        return self.act(self.inner["proj"](x))


def loaded(mode, device, width=64, out=128, rests=False, folder=None, **fields):
    """Load the model; its layer is streamed to the device if it rests elsewhere."""
    torch.manual_seed(0)
    where = {"": device}
    if rests:
        where["inner"] = "disk" if device.type == "cpu" else "cpu"

    return load_and_quantize_model(Named(width, out), mode, device_map=where, offload_folder=folder, **fields)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_an_input_of_integers_is_refused_and_the_layer_is_as_before(mode, size, training, device):
    model = loaded(mode, device, *size).train(training)
    layer = model.inner["proj"]
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(3, size[0], device=device)
    with torch.no_grad():
        expected = model(x)
        for dtype in INTEGERS:
            with pytest.raises(QuantizationError, match=rf"'inner\.proj' is quantized .* got {dtype}"):
                model((100 * x).to(dtype))
        assert torch.equal(model(x), expected)
    assert layer.bias.dtype == before["inner.proj.bias"].dtype
    assert torch.equal(layer.bias, before["inner.proj.bias"])


@pytest.mark.parametrize("mode", MODES[:4])
def test_a_streamed_layer_refuses_integers_with_and_without_gradients(mode, device, tmp_path, small_parts_stream):
    model = loaded(mode, device, rests=True, folder=tmp_path).eval()
    assert engines_of(model)
    x = torch.randn(3, 64, device=device)
    with torch.no_grad():
        expected = model(x)  # afterwards the layer is computed as a function of the slot's tensors
        expected_again = model(x)
        for dtype in INTEGERS:
            with pytest.raises(QuantizationError, match=r"'inner\.proj' is quantized"):
                model((100 * x).to(dtype))
    with pytest.raises(QuantizationError, match=r"'inner\.proj' is quantized"):
        model((100 * x).to(torch.int8))
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert torch.equal(expected_again, expected)
    assert model.inner["proj"].bias.is_floating_point()


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_both_remedies_for_an_input_of_integers_work(mode, device):
    x = (100 * torch.randn(3, 64, device=device)).to(torch.int8)
    torch.manual_seed(0)
    expected = Named().to(device)(x.float())
    skipped = load_and_quantize_model(
        Named(), {"load_in_8bit" if mode == "int8" else "load_in_4bit": True, "skip_modules": ["inner.proj"]},
        device_map=device,
    )  # fmt: skip
    assert type(skipped.inner["proj"]) is nn.Linear
    with torch.no_grad():
        cast = loaded(mode, device).eval()(x.float())
    assert (cast - expected).norm() < 0.2 * expected.norm()


def _bitsandbytes_output(layer, x):
    """Let bitsandbytes cast a copy's bias, and compute with it."""
    twin = copy.deepcopy(layer)
    twin.bias.data = twin.bias.data.to(x.dtype if hasattr(twin, "state") else twin.compute_dtype)
    return twin(x)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_bias_of_another_dtype_is_cast_for_the_product_only(mode, size, training, device):
    """bitsandbytes casts the layer's own to the dtype of an input, or in 4 bit to that of the product."""
    fields = {} if mode.startswith("int8") else {"bnb_4bit_compute_dtype": torch.bfloat16}
    config = BnbQuantizationConfig.from_mode(mode, torch_dtype=torch.float32, **fields)
    layer = loaded(config, device, *size).train(training).inner["proj"]
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_()
    assert not torch.equal(layer.bias, layer.bias.bfloat16().float())
    before = layer.bias.detach().clone()
    for x in (torch.randn(2, 3, size[0], device=device, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)):
        with torch.no_grad():
            assert torch.equal(layer(x), _bitsandbytes_output(layer, x))
        layer(x).sum().backward()
        assert layer.bias.dtype == layer.bias.grad.dtype == torch.float32
        assert torch.equal(layer.bias, before)


@pytest.mark.parametrize("mode", MODES[:4])
def test_a_layer_whose_bias_is_cast_is_compiled_in_one_graph(mode, device):
    fields = {} if mode == "int8" else {"bnb_4bit_compute_dtype": torch.bfloat16}
    model = loaded(BnbQuantizationConfig.from_mode(mode, torch_dtype=torch.float32, **fields), device).eval()
    x = torch.randn(3, 64, device=device).bfloat16()
    with torch.no_grad():
        found = torch.compile(model, backend="eager", fullgraph=True)(x)
        assert torch.allclose(found, model(x), rtol=0.02, atol=0.02)  # some CPUs use another kernel then


@pytest.mark.parametrize("mode", MODES[:4])
def test_a_streamed_layer_has_the_gradient_of_a_bias_that_is_cast(mode, device, tmp_path, small_parts_stream):
    fields = {} if mode == "int8" else {"bnb_4bit_compute_dtype": torch.bfloat16}
    config = BnbQuantizationConfig.from_mode(mode, torch_dtype=torch.float32, **fields)
    x = torch.randn(2, 30, 64, device=device).bfloat16()
    found = []
    for rests in (False, True):
        layer = loaded(config, device, rests=rests, folder=tmp_path).eval().inner["proj"]
        layer.bias.requires_grad_()
        out = layer(x)
        out.float().square().sum().backward()
        found.append((out, layer.bias.grad, layer.bias))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_an_input_on_another_device_is_refused_and_the_remedy_works(mode, size, training, device):
    """Inside a model nobody moves it: bitsandbytes' kernels would read it as if it were on their device."""
    layer = loaded(mode, device, *size).train(training).inner["proj"]
    x = torch.randn(3, size[0])
    elsewhere = x if device.type == "cuda" else x.to("meta")
    with torch.no_grad():
        expected = layer(x.to(device))
        with pytest.raises(
            QuantizationError, match=rf"'inner\.proj' .* on {device}, but .* on {elsewhere.device}: move"
        ):
            layer(elsewhere)
        assert torch.equal(layer(x.to(f"{device}")), expected)
        torch.zeros(1, device=device).item()  # the device can still be used
    if device.type == "cuda":
        with pytest.raises(QuantizationError, match=rf"on cpu, but its input is on {device}"):
            layer.to("cpu")(x.to(device))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mode", MODES[:4])
def test_a_streamed_layer_is_brought_its_input(mode, grad, device, tmp_path, moves, small_parts_stream):
    """An owner may send it to the device of the weight at rest."""
    layer = loaded(mode, device, rests=True, folder=tmp_path).eval().inner["proj"]
    elsewhere = torch.zeros(3, 64, device="cpu" if device.type == "cuda" else "meta")
    with torch.set_grad_enabled(grad):
        first, again = layer(elsewhere), layer(elsewhere)
        expected = layer(torch.zeros(3, 64, device=device))
    assert [where for _, where in moves] == [device, device]
    assert torch.equal(first, expected)
    assert torch.equal(again, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("mode", MODES[:4])
def test_gradients_of_a_streamed_layer_go_back_to_where_its_input_was(mode, tmp_path, small_parts_stream):
    layer = loaded(mode, torch.device("cuda", 0), rests=True, folder=tmp_path).eval().inner["proj"]
    found = []
    for where in ("cpu", "cuda:0"):
        x = torch.ones(3, 64, device=where, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.device == x.device
        found.append(x.grad.cpu())
    assert found[0].abs().sum() > 0
    assert torch.equal(*found)


# Inputs of 1 to 5 dimensions, and without rows. The last two are views that are not contiguous.
SHAPES = [(64,), (1, 64), (5, 64), (2, 3, 64), (2, 3, 2, 64), (2, 1, 3, 2, 64), (0, 64), (2, 0, 64), (2, 0, 3, 64)]


def inputs(device, dtype):
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(shape, generator=generator) for shape in SHAPES]
    made += [
        torch.randn((64, 5), generator=generator).t(),
        torch.randn((3, 64, 2), generator=generator).transpose(1, 2),
        torch.randn((2, 64, 3, 2), generator=generator).permute(0, 2, 3, 1),
        torch.randn((4, 128), generator=generator)[:, ::2],
    ]
    for x in made:
        if x.numel() > 64:
            x[..., 7] *= 20  # beyond the threshold of 6: an outlier
    return [x.to(device, dtype) for x in made]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("mode", "rests"),
    [("int8", False), ("int8", True), ("int8-training", False)],  # main weights are not offloaded
    ids=["resident", "streamed", "main weights"],
)
def test_int8_takes_inputs_of_any_dimensions_as_the_matrix_of_their_rows(
    mode, rests, training, dtype, device, tmp_path, small_parts_stream
):
    model = loaded(mode, device, rests=rests, folder=tmp_path).train(training)
    for x in inputs(device, dtype):
        matrix = x.reshape(-1, 64)
        with torch.no_grad():
            out = model(x)
            assert out.shape == (*x.shape[:-1], 128)
            assert out.dtype == dtype
            assert torch.equal(out, model(matrix).view(out.shape))
        gradients = []
        for each in (x, matrix):
            entry = each.detach().clone().requires_grad_()
            out = model(entry)
            (out.float() ** 2).sum().backward()
            gradients.append(entry.grad)
        assert gradients[0].shape == x.shape
        assert torch.equal(gradients[0].reshape(matrix.shape), gradients[1])
        assert x.numel() == 0 or gradients[0].abs().sum() > 0


class Turned(nn.Module):
    """Uses each layer's output transposed, so that the gradients that come back are not contiguous."""

    def __init__(self, dims):
        super().__init__()
        self.dims = dims
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64)) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x).transpose(*self.dims)
            x = (x * torch.arange(x.shape[-1], device=x.device).to(x.dtype)).transpose(*self.dims).sin()
        return x


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "with biases"])
@pytest.mark.parametrize("shape", [(4, 64), (2, 24, 64), (1, 24, 64), (2, 3, 5, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_gradients_through_streamed_layers_have_the_bits_of_resident_ones(
    mode, dtype, shape, trained, device, tmp_path, small_parts_stream
):
    found = []
    for rests in (False, True):
        torch.manual_seed(0)
        off = {f"blocks.{i}": "disk" if device.type == "cpu" else "cpu" for i in range(2)} if rests else {}
        model = load_and_quantize_model(
            Turned((-1, -2)), BnbQuantizationConfig.from_mode(mode, torch_dtype=dtype, skip_modules=[]),
            device_map={"": device, **off}, offload_folder=tmp_path,
        ).eval()  # fmt: skip
        for block in model.blocks:
            block[0].bias.requires_grad_(trained)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device, dtype).requires_grad_()
        out = model(x)
        (out.float() ** 2).sum().backward()
        found.append([out, x.grad, *(block[0].bias.grad for block in model.blocks if trained)])
    assert engines_of(model)
    assert found[0][1].abs().sum() > 0
    for resident, streamed in zip(*found, strict=True):
        assert torch.equal(resident, streamed)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("size", [*SIZES, (128, 64)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_an_input_of_another_width_is_refused_as_by_a_plain_layer(mode, size, training, device):
    model = loaded(mode, device, *size).train(training)
    for shape in [(size[0] + 1,), (1, size[0] - 1), (3, 2 * size[0]), (2, 3, size[1]), (0,), (2, 0)]:
        for grad in (False, True):
            with torch.set_grad_enabled(grad), pytest.raises(QuantizationError, match=r"'inner\.proj' .* takes inputs"):
                model(torch.randn(shape, device=device, requires_grad=grad))
    with torch.no_grad(), pytest.raises(QuantizationError, match=r"got \(\)"):
        model(torch.tensor(1.0, device=device))


@pytest.mark.parametrize("mode", MODES[:4])
def test_a_streamed_layer_refuses_an_input_of_another_width(mode, device, tmp_path, small_parts_stream):
    model = loaded(mode, device, rests=True, folder=tmp_path).eval()
    with torch.no_grad():
        model(torch.randn(3, 64, device=device))
        for width in (63, 65, 128):
            for _ in range(2):
                with pytest.raises(QuantizationError, match=r"takes inputs of shape \(\.\.\., 64\)"):
                    model(torch.randn(1, width, device=device))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("has_run", [False, True], ids=["new", "has run"])
def test_an_int8_layer_keeps_its_scales_when_its_weight_is_exchanged_by_one_that_was_moved(size, has_run, device):
    model = loaded("int8", device, *size).eval()
    layer, x = model.inner["proj"], torch.randn(3, size[0], device=device)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
        if has_run:
            model(x)
        layer.weight = layer.weight.to(device)  # as PEFT does
        assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
    assert model.state_dict()["inner.proj.SCB"].shape == size[1:]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("mode", "rests"), [*((mode, False) for mode in MODES), *((mode, True) for mode in MODES[:4])])
def test_an_input_may_be_given_by_the_name_that_a_plain_layer_gives_it(
    mode, size, rests, device, tmp_path, small_parts_stream
):
    model = loaded(mode, device, *size, rests=rests, folder=tmp_path).eval()
    layer, x = model.inner["proj"], torch.randn(3, size[0], device=device)
    with torch.no_grad():
        assert torch.equal(layer(input=x), layer(x))
    assert torch.equal(layer(input=x), layer(x))


@pytest.mark.parametrize("has_run", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("size", [(64, 32), (1, 5)], ids=str)
@pytest.mark.parametrize("mode", ["nf4", "int8", "int8-training"])
def test_layers_that_come_to_share_a_weight_compute_the_same(mode, size, has_run, device):
    """As PEFT's `layer_replication` makes them. In int8 the first that runs takes the scales off the weight."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(*size, bias=False), nn.Identity())
    one = load_and_quantize_model(plain, mode, device_map=device)[0]
    x = torch.randn(3, size[0], device=device)
    expected = copy.deepcopy(one)(x).detach()
    if has_run:
        one(x)
    others = [copy.deepcopy(one), copy.deepcopy(one)]
    for other in others:
        other.register_parameter("weight", one.weight)
    for each in (*others, one, *others):
        assert torch.equal(each(x), expected)


def shared_int8(device):
    """Two layers that share a weight, of which the first has run, as on a GPU: it has taken the scales off it."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Identity())
    one = load_and_quantize_model(plain, "int8", device_map=device)[0]
    other = copy.deepcopy(one)
    other.register_parameter("weight", one.weight)
    keep_row_scales(one)
    one.init_8bit_state()
    return one, other


def test_the_scales_that_a_shared_weight_keeps_are_moved_with_its_layers():
    """To meta, which takes no Int8Params: so the weight is told where it is."""
    one, other = shared_int8("cpu")
    weight = nn.Parameter(torch.empty(32, 64, device="meta"))
    weight.row_scales, weight.SCB = row_scales(other), None
    other._parameters["weight"] = weight
    move_int8(other, nn.Identity())
    assert (row_scales(other).device.type, row_scales(one).device.type) == ("meta", "cpu")


@pytest.mark.cuda
def test_layers_that_share_a_weight_compute_where_they_are_moved_to():
    one, other = shared_int8("cuda")
    x = torch.randn(3, 64, dtype=torch.float16)
    expected = one(x.cuda()).cpu()
    nn.ModuleList([one, other]).cpu()
    for layer in (one, other):
        torch.testing.assert_close(layer(x), expected, rtol=0.02, atol=0.02)
    nn.ModuleList([one, other]).cuda()
    for layer in (one, other):
        assert torch.equal(layer(x.cuda()).cpu(), expected)


def test_main_weights_are_computed_with_as_they_are_now_by_bitsandbytes_own_forward_too():
    """The forward that a GPU takes: here in train mode, where bitsandbytes has a kernel for the CPU."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Identity())
    layer = load_and_quantize_model(plain, "int8-training", device_map="cpu").train()[0]
    x = torch.randn(4, 64, dtype=torch.float16)
    before = forward_main_weights(layer, x)
    before.float().sum().backward()  # while there is a gradient, bitsandbytes keeps the rows that it has
    with torch.no_grad():
        layer.weight.mul_(2)
    torch.testing.assert_close(forward_main_weights(layer, x), before * 2, rtol=1e-3, atol=1e-3)
    assert own_forward(layer) is forward_main_weights
