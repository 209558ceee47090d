"""Streams of a GPU that are slowed at random change no bit of what is loaded, nor of anything else there."""

import contextlib
import functools
import gc
import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from checkpoints import empty, save
from comparisons import assert_same_bits
from executors import EXECUTORS, read_by
from failures import fail_at
from references import parts_of_4bit, quantize_as_bitsandbytes
from safetensors.torch import load_file
from torch import nn

from bigload import BnbQuantizationConfig, load_and_quantize_model, release_buffers
from bigload.io import native_feed, threaded_feed, transfer
from bigload.quantization.quantizer import Quantizer

pytestmark = pytest.mark.cuda

GPU = torch.device("cuda", 0)
MODES = ("nf4", "nf4-dq", "int8", "bf16")
REPEATS = 6
CYCLES = 2_000_000  # a millisecond, in which several MiB are copied


class Stack(nn.Module):
    """A dozen Linears, two of them larger than a place of the window, with norms and biases between them."""

    def __init__(self) -> None:
        super().__init__()
        widths = [1024] * 5 + [2048] + [1024] * 7
        self.layers = nn.ModuleList()
        for before, after in itertools.pairwise(widths):
            self.layers += [nn.Linear(before, after), nn.LayerNorm(after)]
        self.head = nn.Linear(1024, 8)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture(autouse=True, params=EXECUTORS)
def executor(monkeypatch, request):
    """Each way to read, with a ring of 2 MiB and a window of 9: all of it is used many times in one load."""
    release_buffers()
    monkeypatch.setenv("BIGLOAD_RING_BYTES", "2MiB")
    monkeypatch.setattr(transfer, "_BATCH_BYTES", 3 * 2**20)
    for room in (native_feed, threaded_feed):
        monkeypatch.setattr(room, "_READ_BYTES", 2**18)
    read_by(monkeypatch, request.param)
    yield
    torch.cuda.synchronize()
    release_buffers()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """In bfloat16, but for every other norm, which is cast when it lands."""
    torch.manual_seed(0)
    norms = [f"layers.{i}." for i in range(1, 24, 4)]
    state = {
        name: torch.randn_like(value) if value.dim() == 1 else value for name, value in Stack().state_dict().items()
    }
    made = tmp_path_factory.mktemp("stack")
    stored = {n: v if n.startswith(tuple(norms)) else v.bfloat16() for n, v in state.items()}
    save(stored, made)
    return made


@pytest.fixture(scope="module")
def expected(folder):
    """By mode: what bitsandbytes' own functions make of the file's tensors, on the GPU, each one alone."""

    @functools.cache
    def made(mode):
        tensors = {}
        for name, value in load_file(folder / "model.safetensors").items():
            value = value.to(GPU).bfloat16()
            if mode == "bf16" or value.dim() < 2 or name == "head.weight":
                tensors[name] = value
            else:
                parts = quantize_as_bitsandbytes(value, mode)
                tensors[name] = parts.pop("weight")
                tensors |= {f"{name} {part}": tensor for part, tensor in parts.items()}
        torch.cuda.synchronize()
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    return made


def config(mode):
    if mode == "bf16":
        return BnbQuantizationConfig.from_mode("nf4", skip_modules=["*"], torch_dtype=torch.bfloat16)
    return mode


def load(folder, mode):
    return load_and_quantize_model(empty(Stack), config(mode), folder, device_map=GPU)


def tensors_of(model):
    """All that was loaded, by the names that `expected` has."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter.data
        if getattr(parameter, "quant_state", None) is not None:
            parts = parts_of_4bit(parameter.data, parameter.quant_state)
            tensors |= {f"{name} {part}": tensor for part, tensor in parts.items() if part != "weight"}
        elif getattr(parameter, "SCB", None) is not None:
            tensors[f"{name} SCB"] = parameter.SCB
    return tensors


def sleep_on(stream, cycles=CYCLES):
    with torch.cuda.stream(stream):
        torch.cuda._sleep(cycles)


def slowed(monkeypatch, owner, name, stream_of, chance, seed=0, cycles=CYCLES):
    """Keep a stream busy at random before, and after, a method runs."""
    original, rng = getattr(owner, name), random.Random(f"{name} {seed}")

    def sleep(self):
        if rng.random() < chance:
            sleep_on(stream_of(self), cycles)

    def slow(self, *args, **kwargs):
        sleep(self)
        returned = original(self, *args, **kwargs)
        sleep(self)
        return returned

    monkeypatch.setattr(owner, name, slow)


def lane_of(feed):
    return feed.lanes[GPU]


def slow_copies(monkeypatch, chance=0.3, **options):
    for executor in EXECUTORS.values():
        for name in ("take", "done"):
            slowed(monkeypatch, executor, name, lambda feed: lane_of(feed).copies, chance, **options)


def slow_work(monkeypatch, chance=0.3, **options):
    for executor in EXECUTORS.values():
        slowed(monkeypatch, executor, "take", lambda feed: lane_of(feed).work, chance, **options)
    slowed(monkeypatch, Quantizer, "add", lambda quantizer: torch.cuda.current_stream(GPU), chance, **options)


SLOW = {
    "nothing": [],
    "copies": [slow_copies],
    "work": [slow_work],
    "both": [slow_copies, slow_work],
}


@pytest.mark.parametrize("slow", SLOW.values(), ids=SLOW)
@pytest.mark.parametrize("mode", MODES)
def test_slow_streams_change_no_bit(folder, expected, monkeypatch, mode, slow):
    for slow_down in slow:
        slow_down(monkeypatch)
    for _ in range(REPEATS):
        assert_same_bits(tensors_of(load(folder, mode)), expected(mode))


@pytest.mark.parametrize("mode", MODES)
def test_copies_that_lag_behind_all_the_time_change_no_bit(folder, expected, monkeypatch, mode):
    """Every slot and place is wanted again long before it is free."""
    slow_copies(monkeypatch, chance=1.0)
    assert_same_bits(tensors_of(load(folder, mode)), expected(mode))


@pytest.mark.parametrize("mode", MODES)
def test_work_that_lags_behind_all_the_time_changes_no_bit(folder, expected, monkeypatch, mode):
    slow_work(monkeypatch, chance=1.0)
    assert_same_bits(tensors_of(load(folder, mode)), expected(mode))


@pytest.mark.parametrize("mode", MODES)
def test_stream_of_the_callers_own_beside_a_busy_default_stream(folder, expected, monkeypatch, mode):
    slow_work(monkeypatch)
    for _ in range(REPEATS):
        stream = torch.cuda.Stream(GPU)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10 * CYCLES)
            sleep_on(torch.cuda.default_stream(GPU), 10 * CYCLES)
            model = load(folder, mode)
            assert torch.cuda.current_stream(GPU) == stream
            copied = {name: tensor.clone() for name, tensor in tensors_of(model).items()}  # in the stream's order
        stream.synchronize()
        assert_same_bits(copied, expected(mode))


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_weights_that_the_callers_stream_still_writes_are_quantized_as_they_will_be(folder, expected, mode):
    """A loaded model is quantized where it lies."""
    state = load_file(folder / "model.safetensors")
    values = {name: value.to(GPU).bfloat16() for name, value in state.items()}
    for _ in range(REPEATS):
        model = Stack().bfloat16().to(GPU)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream(GPU)):
            torch.cuda._sleep(20 * CYCLES)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(values[name])
            model = load_and_quantize_model(model, mode)
        torch.cuda.synchronize()
        assert_same_bits(tensors_of(model), expected(mode))


def freed_but_still_written():
    """Leave memory in torch's cache that the default stream has yet to write to. Returns its ranges of addresses."""
    pieces = [torch.empty(2**21, dtype=torch.uint8, device=GPU) for _ in range(40)]
    pieces += [torch.empty(2**19, dtype=torch.uint8, device=GPU) for _ in range(60)]
    pieces += [torch.empty(2**11, dtype=torch.uint8, device=GPU) for _ in range(100)]
    torch.cuda._sleep(100 * CYCLES)
    for piece in pieces:
        piece.fill_(0xA5)
    return [range(piece.data_ptr(), piece.data_ptr() + len(piece)) for piece in pieces]


@pytest.mark.parametrize("mode", MODES)
def test_work_that_was_pending_on_freed_memory_does_not_overwrite_what_is_loaded_into_it(folder, expected, mode):
    load(folder, mode)  # what is made once per process, and waits, is made now
    for _ in range(REPEATS):
        gc.collect()
        torch.cuda.empty_cache()
        freed = freed_but_still_written()
        model = load(folder, mode)
        if mode == "bf16":
            addresses = [parameter.data_ptr() for parameter in model.parameters()]
            assert any(address in piece for address in addresses for piece in freed)  # else this shows nothing
        torch.cuda.synchronize()
        assert_same_bits(tensors_of(model), expected(mode))
        del model


@pytest.mark.parametrize("own_streams", [False, True], ids=["default stream", "streams of their own"])
@pytest.mark.parametrize("mode", MODES)
def test_two_loads_at_once_on_one_gpu(folder, expected, monkeypatch, mode, own_streams):
    slow_copies(monkeypatch, chance=0.1)
    slow_work(monkeypatch, chance=0.1)

    def loaded(_):
        stream = torch.cuda.Stream(GPU) if own_streams else torch.cuda.default_stream(GPU)
        with torch.cuda.stream(stream):
            return {name: tensor.cpu() for name, tensor in tensors_of(load(folder, mode)).items()}

    with ThreadPoolExecutor(2) as pool:
        for tensors in pool.map(loaded, range(REPEATS)):
            assert_same_bits(tensors, expected(mode))


def test_two_loads_at_once_of_two_modes(folder, expected, monkeypatch):
    slow_copies(monkeypatch, chance=0.1)

    def loaded(mode):
        return {name: tensor.cpu() for name, tensor in tensors_of(load(folder, mode)).items()}

    with ThreadPoolExecutor(4) as pool:
        for mode, tensors in zip(MODES * 3, pool.map(loaded, MODES * 3), strict=True):
            assert_same_bits(tensors, expected(mode))


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "bf16"])
def test_load_inside_inference_mode_gives_weights_that_train(folder, expected, mode):
    with torch.inference_mode():
        model = load(folder, mode)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    assert_same_bits(tensors_of(model), expected(mode))
    x = torch.randn(4, 1024, device=GPU, dtype=torch.bfloat16)
    model.train()(x).float().square().sum().backward()
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert all(norm.weight.grad is not None and norm.weight.grad.isfinite().all() for norm in norms)
    with torch.no_grad():
        norms[0].weight.add_(norms[0].weight.grad)


class Wide(nn.Module):
    """Rows longer than a slot, so that an int8 weight is put together before it is quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(600_000, 12, bias=False)
        self.head = nn.Linear(12, 2)


def test_weight_that_is_put_together_first_is_whole_when_it_is_quantized(tmp_path, monkeypatch):
    weight = torch.randn(12, 600_000).bfloat16()
    head = {"head.weight": torch.randn(2, 12).bfloat16(), "head.bias": torch.randn(2).bfloat16()}
    save({"wide.weight": weight} | head, tmp_path)
    own = quantize_as_bitsandbytes(weight.to(GPU), "int8")
    own = {"wide.weight": own["weight"].cpu(), "wide.weight SCB": own["SCB"].cpu()} | head
    slow_copies(monkeypatch, chance=1.0)
    for _ in range(REPEATS):
        gc.collect()
        torch.cuda.empty_cache()
        scratch = torch.zeros(2**26, dtype=torch.uint8, device=GPU)  # what it would find in its memory
        del scratch
        model = load_and_quantize_model(empty(Wide), "int8", tmp_path, device_map=GPU)
        torch.cuda.synchronize()
        assert_same_bits(tensors_of(model), own)


@pytest.mark.parametrize("mode", ["nf4", "bf16"])
def test_load_that_is_stopped_writes_nothing_afterwards(folder, expected, monkeypatch, mode):
    slow_copies(monkeypatch, chance=1.0)
    for stopped_at in (1, 2, 5, 12):
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            for each in EXECUTORS.values():
                fail_at(patch, each, "done", stopped_at, KeyboardInterrupt())
            load(folder, mode)
        gc.collect()
        stream = torch.cuda.current_stream(GPU)
        assert stream == torch.cuda.default_stream(GPU)
        theirs = [torch.zeros(size, dtype=torch.uint8, device=GPU) for size in [2**21] * 30 + [2**19] * 30]
        assert_same_bits(tensors_of(load(folder, mode)), expected(mode))
        torch.cuda.synchronize()
        assert not any(tensor.any() for tensor in theirs)
        del theirs
