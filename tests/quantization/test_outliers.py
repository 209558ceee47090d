"""int8 with a threshold, computed without waiting for the GPU: bitsandbytes' own result, up to its last rounding."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bigload import BnbQuantizationConfig, load_and_quantize_model
from bigload.quantization import own_forwards
from bigload.quantization.bnb import library
from bigload.quantization.kernels import outliers

THRESHOLD = 6.0


class Launched:
    """A kernel that is written in torch, for the CPU."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.kernel


def split(x, kept, flags, columns, counts, threshold, rows, width, block):
    assert x.shape == (rows, width)
    is_outlier = x.abs() >= threshold
    kept.copy_(x.masked_fill(is_outlier, 0))
    flags.copy_(is_outlier.any(0))
    columns.fill_(-1)
    for number, inside in enumerate(is_outlier.any(0).split(block)):
        found = inside.nonzero().view(-1) + number * block
        counts[number] = len(found)
        columns[number * block :][: len(found)] = found


def add_outliers(out, x, data, scales, columns, counts, width, outputs, blocks, block, *shape):
    assert (outputs, width, blocks) == (*data.shape, len(counts))
    lists = [columns[number * block :][: counts[number]] for number in range(blocks)]
    chosen = torch.cat(lists).long()
    weight = (data[:, chosen] * scales.view(-1, 1) * 7.874015718698502e-3).to(out.dtype)
    out.copy_((out.float() + x[:, chosen].float() @ weight.float().t()).to(out.dtype))


@pytest.fixture
def kernels(device, monkeypatch):
    """On the CPU, the kernels in torch."""
    if device.type == "cpu":
        own = SimpleNamespace(split=Launched(split), add_outliers=Launched(add_outliers))
        monkeypatch.setattr(outliers, "_kernels", lambda: own)
        monkeypatch.setattr(outliers, "_runs_kernels", lambda device: True)
    elif not outliers._runs_kernels(torch.device("cuda", 0)):
        pytest.fail("Triton's kernels do not run on this GPU")


def case(number, device):
    """Return rows with some outliers, an int8 weight, and a bias or none."""
    draw = torch.Generator().manual_seed(number)
    rows = (1, 1, 2, 5, outliers.MAX_ROWS)[number % 5]
    width, outputs = (64, 516, 1536, 1000)[number % 4], (96, 8, 200)[number % 3]
    dtype = (torch.float16, torch.bfloat16)[number % 2]
    x = torch.randn(rows, width, generator=draw)
    for _ in range((0, 1, 4, 60, width)[number // 2 % 5]):
        row, column = (int(torch.randint(size, (), generator=draw)) for size in x.shape)
        x[row, column] = 40 * float(torch.randn((), generator=draw))
    weight = (torch.randn(outputs, width, generator=draw) / 20).half().to(device)
    data, scales, _ = library().functional.int8_vectorwise_quant(weight)
    bias = torch.randn(outputs, generator=draw).to(device, dtype) if number % 3 else None
    return x.to(device, dtype), data, scales, bias


def own_product(x, data, scales, bias, threshold=THRESHOLD):
    state = library().MatmulLtState()
    state.CB, state.SCB, state.threshold = data, scales, threshold
    state.has_fp16_weights = state.is_training = False
    return library().matmul(x.clone(), data, bias=bias, state=state)


def magnitude(x, data, scales, bias):
    """Return the sum of the absolute values of all that is added up in each number of the result."""
    weight = (data.float() * scales.view(-1, 1) / 127).abs()
    return x.float().abs() @ weight.t() + (0 if bias is None else bias.float().abs())


@pytest.mark.parametrize("number", range(60))
def test_products_are_those_of_bitsandbytes(number, device, kernels):
    x, data, scales, bias = case(number, device)
    expected, before = own_product(x, data, scales, bias), x.clone()
    found = outliers.outlier_product(x, data, scales, THRESHOLD, bias)
    assert torch.equal(x, before)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    if not (x.abs() >= THRESHOLD).any():
        assert torch.equal(found, expected)
    # One rounding to 16 bit of the result, and of sums in float32, in whatever order.
    error = (found.float() - expected.float()).abs()
    allowed = expected.float().abs() * torch.finfo(x.dtype).eps + magnitude(x, data, scales, bias) * 2.0**-20
    assert (error <= allowed).all()


def test_the_cases_tell_outliers_from_none(device, kernels):
    """What a product without the threshold gives is far off, so that the test above can fail."""
    far = 0
    for number in range(60):
        x, data, scales, bias = case(number, device)
        if (x.abs() >= THRESHOLD).any():
            expected = own_product(x, data, scales, bias)
            error = (own_product(x, data, scales, bias, 0.0).float() - expected.float()).abs()
            far += bool((error > 4 * expected.float().abs() * torch.finfo(x.dtype).eps).any())
    assert far > 20


def test_a_threshold_is_compared_as_torch_compares_it(device, kernels):
    weight = torch.eye(64, device=device).half()
    data, scales, _ = library().functional.int8_vectorwise_quant(weight)
    for threshold in (6.1, 5.9999):
        edge = torch.tensor(threshold).half()
        around = torch.stack([edge.nextafter(torch.tensor(0.0).half()), edge, edge.nextafter(torch.tensor(9.0).half())])
        x = around.to(device).repeat(2, 22)[:, :64].contiguous()
        found = outliers.outlier_product(x, data, scales, threshold, None)
        assert torch.equal(found, own_product(x, data, scales, None, threshold))


def layer(device, threshold=THRESHOLD):
    torch.manual_seed(0)
    config = BnbQuantizationConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)).half()
    return load_and_quantize_model(model, config, None, device_map={"": device}).eval()[0]


INPUTS = {
    "a few rows": (lambda x: x, True),
    "three dimensions, not contiguous": (lambda x: x.view(2, 2, 64).transpose(0, 1), True),
    "one dimension": (lambda x: x[0], True),
    "many rows": (lambda x: x.repeat(outliers.MAX_ROWS, 1), False),
    "no rows": (lambda x: x[:0], False),
    "gradients": (lambda x: x.clone().requires_grad_(), False),
}


@pytest.mark.parametrize("name", INPUTS)
def test_a_layer_gives_few_rows_to_the_gpu_alone(name, device, kernels, monkeypatch):
    made, is_for = INPUTS[name]
    linear, calls = layer(device), []
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).to(device).half()
    x[1, 3] = 20.0
    expected = library().nn.Linear8bitLt.forward(linear, made(x).reshape(-1, 64)).view(*made(x).shape[:-1], 32)

    def product(*given):
        calls.append(given)
        return outliers.outlier_product(*given)

    monkeypatch.setattr(own_forwards, "outlier_product", product)
    if device.type == "cpu":
        monkeypatch.setattr(own_forwards, "suits", lambda state, x, bias: outliers.suits(state, as_on_gpu(x), bias))
    found = linear(made(x))
    assert len(calls) == is_for
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, rtol=2e-3, atol=2e-3)


def test_a_bias_that_is_trained_gets_its_gradient(device, kernels, monkeypatch):
    linear = layer(device)
    linear.bias.requires_grad_()
    if device.type == "cpu":
        monkeypatch.setattr(own_forwards, "suits", lambda state, x, bias: outliers.suits(state, as_on_gpu(x), bias))
    linear(torch.randn(4, 64, device=device).half()).sum().backward()
    assert torch.equal(linear.bias.grad, torch.full_like(linear.bias, 4))


def as_on_gpu(x):
    """Return of a tensor on the CPU what is asked of one on a GPU."""
    return SimpleNamespace(device=torch.device("cuda", 0), numel=x.numel, shape=x.shape, requires_grad=x.requires_grad)


def test_what_waits_for_the_host():
    state = SimpleNamespace(threshold=0.0, has_fp16_weights=False)
    assert outliers.is_on_gpu_alone(state, torch.device("cpu"))
    state.threshold = 6.0
    assert not outliers.is_on_gpu_alone(state, torch.device("cpu"))
    assert not outliers.is_on_gpu_alone(SimpleNamespace(threshold=6.0, has_fp16_weights=True), torch.device("cuda"))


@pytest.mark.cuda
def test_the_host_does_not_wait_and_a_graph_finds_other_outliers():
    device = torch.device("cuda", 0)
    linear = layer(device)
    rows = [torch.randn(2, 64, device=device).half() for _ in range(3)]
    rows[1][0, 5] = rows[1][1, 9] = 25.0
    rows[2][1, 60] = -7.0
    with torch.no_grad():
        expected = [linear(x) for x in rows]
        given = rows[0].clone()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            linear(given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            linear(given)
            torch.cuda.synchronize(device)
            with torch.cuda.graph(graph, stream=stream):
                out = linear(given)
        for x, each in zip(rows, expected, strict=True):
            given.copy_(x)
            graph.replay()
            torch.cuda.synchronize(device)
            assert torch.equal(out, each)
