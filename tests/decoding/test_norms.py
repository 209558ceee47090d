"""Norms in captured steps: one kernel where it gives the bits of the model's own code, and else that code."""

import gc
import threading
import weakref
from contextlib import nullcontext

import kernels_by_torch
import pytest
import torch
from comparisons import equal
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from bigload import capture_decode
from bigload.decoding.fused import norms
from bigload.decoding.fused.norms import Norms, Order, fused_norm, orders_of


class Net(nn.Module):
    def __init__(self, kind=LlamaRMSNorm, width=64):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.linear, self.two = kind(width), nn.Linear(width, width), kind(width)
        for norm in (self.one, self.two):
            nn.init.normal_(norm.weight)
        self.to(torch.bfloat16)

    def step(self, x):
        return self.two(self.linear(self.one(x)))


def drawn(device):
    return torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)


def by_torch(x, weight, eps, order):
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@pytest.fixture
def launched(device, monkeypatch):
    """Count what the kernel computes; on the CPU, torch stands in for it."""
    calls, own = [], fused_norm if device.type == "cuda" else by_torch

    def counted(x, weight, eps, order):
        calls.append(x.shape)
        return own(x, weight, eps, order)

    if device.type == "cpu":
        monkeypatch.setattr(norms, "runs_kernels", lambda device: True)
    monkeypatch.setattr(norms, "fused_norm", counted)
    return calls


def run(model, device, width=64):
    """Run steps, as they are and captured; the bits are the same, and nothing is left on the modules."""
    draw = torch.Generator().manual_seed(1)
    given = [torch.randn(1, 1, width, generator=draw).to(device, torch.bfloat16) for _ in range(4)]
    with torch.no_grad():
        expected = [model.step(x) for x in given]
        with capture_decode(model.eval(), step="step") as capture:
            assert all(equal(model.step(x), right) for x, right in zip(given, expected, strict=True))
            assert capture.stats().replayed == 3
        assert all(equal(model.step(x), right) for x, right in zip(given, expected, strict=True))
    assert not [name for module in model.modules() for name in vars(module) if name == "forward"]


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
def test_norms_are_one_kernel_each_in_a_graph(kind, device, captures, launched):
    model = Net(kind).to(device)
    run(model, device)
    # Their kind is tried on draws in both dtypes, each norm on its own input; then each is in the graph.
    assert len(launched) == norms._DRAWS + 3 + 2 + 2


def test_what_was_tried_is_known_when_a_model_is_captured_again(device, captures, launched):
    model = Net().to(device)
    run(model, device)
    launched.clear()
    run(model, device)
    assert len(launched) == 2 + 2
    launched.clear()
    run(Net().to(device), device)  # another one
    assert len(launched) == norms._DRAWS + 3 + 2 + 2


@pytest.mark.parametrize("kind", [GemmaRMSNorm, GptOssRMSNorm, nn.LayerNorm, nn.RMSNorm])
def test_what_computes_in_another_way_keeps_its_code(kind, device, captures, launched):
    """Gemma's adds one to the weight, GPT-OSS' multiplies before it rounds, LayerNorm has a bias."""
    run(Net(kind).to(device), device)
    assert len(launched) <= 2


def test_a_kernel_of_other_bits_is_not_used(device, captures, launched, monkeypatch):
    own = norms.fused_norm

    def off(x, weight, eps, order):
        made = own(x, weight, eps, order)
        made.view(torch.int16).view(-1)[-1] += 1
        return made

    monkeypatch.setattr(norms, "fused_norm", off)
    run(Net().to(device), device)
    assert len(launched) == len(orders_of(1, 64))


def test_a_kernel_whose_sums_differ_in_their_last_bit_is_not_used(device, launched, monkeypatch):
    """Values in 16 bit show it once in tens of thousands: as another order of addition, of another torch."""

    def off(x, weight, eps, order):
        mean = x.float().pow(2).mean(-1, keepdim=True)
        other = torch.nextafter(mean, torch.full_like(mean, torch.inf))
        launched.append(x.shape)
        return weight * (x.float() * torch.rsqrt(other + eps)).to(x.dtype)

    monkeypatch.setattr(norms, "fused_norm", off)
    model = Net().to(device)
    of = Norms(model)
    with torch.no_grad(), of.noting():
        model.step(torch.ones(1, 1, 64, dtype=torch.bfloat16, device=device))
    assert launched
    assert not of._fused


def test_a_kernel_that_does_not_run_is_not_used(device, captures, launched, monkeypatch):
    def broken(*given):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(norms, "fused_norm", broken)
    run(Net().to(device), device)


class Strict(LlamaRMSNorm):
    def forward(self, hidden_states):
        if hidden_states.dtype != torch.bfloat16:
            raise TypeError("bfloat16 only")
        return super().forward(hidden_states)


def test_a_norm_that_refuses_what_a_trial_gives_it_keeps_its_code(device, captures, launched):
    run(Net(Strict).to(device), device)
    assert len(launched) == (1 + 3 + 1) * len(orders_of(1, 64))


class Uncopied(LlamaRMSNorm):
    def __reduce_ex__(self, protocol):
        raise TypeError("not to be copied")


def test_a_norm_that_refuses_to_be_copied_keeps_its_code(device, captures, launched):
    run(Net(Uncopied).to(device), device)


def test_a_trial_for_which_there_is_no_memory_leaves_the_step_alone(device, captures, launched, monkeypatch):
    own = torch.randn

    def full(*shape, generator, **kind):
        if generator.initial_seed() == 0:  # a trial's
            raise torch.OutOfMemoryError("full")
        return own(*shape, generator=generator, **kind)

    monkeypatch.setattr(torch, "randn", full)
    run(Net().to(device), device)


def test_a_weight_of_ones_does_not_hide_what_is_rounded_first(device, captures, launched):
    """It is written to later, where a graph has it: GPT-OSS' norms multiply before they round."""
    model, x = Net(GptOssRMSNorm).to(device).eval(), drawn(device)
    with torch.no_grad():
        for norm in (model.one, model.two):
            norm.weight.fill_(1.0)
        with capture_decode(model, step="step") as capture:
            for _ in range(2):
                model.step(x)
            for norm in (model.one, model.two):
                nn.init.normal_(norm.weight)
            found = model.step(x)
            assert capture.stats().replayed == 2
        assert equal(found, model.step(x))


class Limited(LlamaRMSNorm):
    limit = None

    def forward(self, hidden_states):
        found = super().forward(hidden_states)
        return found if self.limit is None else found.clamp(-self.limit, self.limit)


def test_a_norm_of_another_setting_has_a_trial_of_its_own(device, captures, launched):
    """The limit of the second is not met in the steps before the graph, but in that of the trial."""
    model, x = Net(Limited).to(device).eval(), drawn(device)
    model.two.limit = 0.5
    with torch.no_grad():
        model.two.weight.fill_(2.0**-10)
        with capture_decode(model, step="step") as capture:
            for _ in range(2):
                model.step(x)
            model.two.weight.fill_(1.0)
            found = model.step(x)
            assert capture.stats().replayed == 2
        assert equal(found, model.step(x))


@pytest.mark.parametrize("change", [{"__class__": GptOssRMSNorm}, {"limit": 0.5}])
def test_a_norm_that_has_changed_since_it_was_noted_is_captured_as_it_is(change, device, launched):
    model, x = Net(Limited).to(device), drawn(device)
    fused = Norms(model)
    with torch.no_grad():
        with fused.noting():
            model.step(x)
        for name, value in change.items():
            setattr(model.two, name, value)
        launched.clear()
        with fused.captured():
            found = model.step(x)
        assert len(launched) == 1  # the other norm
        assert equal(found, model.step(x))


class Inside(LlamaRMSNorm):
    def forward(self, hidden_states):
        return hidden_states.copy_(super().forward(hidden_states))


class Noisy(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) + torch.randn_like(hidden_states)


@pytest.mark.parametrize("kind", [Inside, Noisy])
def test_a_norm_that_does_more_than_the_kernel_keeps_its_code_and_random_numbers(kind, device, launched):
    norm, of_step = kind(64).to(device, torch.bfloat16), []
    fused = Norms(norm)
    with torch.no_grad():
        for step in (nullcontext, fused.noting):
            torch.manual_seed(0)
            with step():
                of_step.append((norm(drawn(device)), torch.rand(1, device=device)))
    assert equal(of_step[0][0], of_step[1][0])
    assert equal(of_step[0][1], of_step[1][1])
    assert launched
    assert not fused._fused


def test_what_is_known_of_a_model_does_not_keep_it(device, launched):
    def with_norm_that_knows_it():
        model = Net().to(device)

        class Knowing(LlamaRMSNorm):
            def forward(self, hidden_states):
                assert model.linear
                return LlamaRMSNorm.forward(self, hidden_states)

        model.one = Knowing(64).to(device, torch.bfloat16)
        return model

    model = with_norm_that_knows_it()
    with torch.no_grad(), Norms(model).noting():
        model.step(drawn(device))
    assert launched
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_inputs_that_the_kernel_does_not_take_are_left_to_the_model(device, launched):
    norm = LlamaRMSNorm(64).to(device, torch.bfloat16)
    of = Norms(norm)
    wide = torch.randn(1, 2, 128, device=device).to(torch.bfloat16)[..., ::2]
    with of.noting():
        norm(wide)  # not contiguous
        norm(hidden_states=wide.contiguous())
        norm(wide.contiguous().float())
    assert not launched


def test_another_thread_computes_as_before(device, launched):
    norm = LlamaRMSNorm(64).to(device, torch.bfloat16)
    of, x = Norms(norm), torch.randn(1, 1, 64, device=device).to(torch.bfloat16)
    with of.noting():
        norm(x)
    with of.captured():
        count = len(launched)
        norm(x)
        assert len(launched) == count + 1
        thread = threading.Thread(target=norm, args=(x,))
        thread.start()
        thread.join()
        assert len(launched) == count + 1


def test_modules_that_are_no_norms_are_left_alone():
    own = LlamaRMSNorm(8)
    own.forward = own.forward
    with_buffer = LlamaRMSNorm(8)
    with_buffer.register_buffer("count", torch.zeros(()))
    without = LlamaRMSNorm(8)
    del without.variance_epsilon
    model = nn.ModuleList([own, with_buffer, without, nn.Embedding(2, 8), nn.Linear(8, 8, bias=False)])
    assert not Norms(model)._all


@pytest.mark.parametrize(
    ("rows", "width", "orders"),
    [
        (1, 2048, [Order(512, 1, True, 9), Order(512, 1, True, 4)]),
        (1, 2880, [Order(512, 2, True, 9), Order(512, 2, True, 4)]),
        (16, 4096, [Order(32, 32, True, 5), Order(32, 32, True, 0)]),
        (32, 128, [Order(32, 1, True, 5), Order(32, 1, False, 5), Order(32, 1, False, 0)]),
        (4, 128, [Order(32, 1, True, 5), Order(128, 1, False, 7), Order(128, 1, False, 2)]),
        (1, 64, [Order(64, 1, False, 6), Order(64, 1, False, 1)]),
        (1, 131, []),  # not in fours
        (16, 8192, []),  # divided among warps
    ],
)
def test_orders_are_those_of_torch(rows, width, orders):
    assert orders_of(rows, width) == orders


SHAPES = [(1, 2048), (1, 4096), (1, 2880), (1, 5120), (1, 896), (4, 2048), (16, 4096), (32, 128), (128, 128), (4, 64)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_the_kernel_is_given_what_norms_the_rows(rows, width, dtype, monkeypatch):
    """The kernel is stood in for; itself it is tested on a GPU. Here a sum of squares may differ in its last bit."""
    launched = kernels_by_torch.install_in(monkeypatch, norms, "decoding/fused/kernels.py", kernels_by_torch.rms_norm)
    draw = torch.Generator().manual_seed(rows * width)
    weight = torch.randn(width, generator=draw).to(dtype)
    x = torch.randn(1, rows, width, generator=draw).to(dtype)
    expected, orders = by_torch(x, weight, 1e-6, None), orders_of(rows, width)
    for order in orders:
        found = fused_norm(x, weight, 1e-6, order)
        assert found.shape == x.shape
        torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps * 2, atol=0)
    assert launched == ["rms_norm"] * len(orders)


@pytest.mark.cuda
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_the_kernel_gives_the_bits_of_torch(rows, width):
    """In float32, where each other order of addition shows; and then in 16 bit."""
    draw = torch.Generator("cuda").manual_seed(rows * width)
    weight = torch.randn(width, generator=draw, device="cuda")
    given = [torch.randn(1, rows, width, generator=draw, device="cuda") for _ in range(150)]
    right = [
        order
        for order in orders_of(rows, width)
        if all(equal(fused_norm(x, weight, 1e-6, order), by_torch(x, weight, 1e-6, None)) for x in given)
    ]
    assert len(right) == 1
    for dtype in (torch.bfloat16, torch.float16):
        for magnitude in (1e-3, 1.0, 100.0):
            x, scales = given[0].mul(magnitude).to(dtype), weight.to(dtype)
            assert equal(fused_norm(x, scales, 1e-6, *right), by_torch(x, scales, 1e-6, None))


def test_a_forward_that_a_norm_has_got_since_it_was_noted_is_kept(launched, device):
    model = Net().to(device)
    fused, x = Norms(model), torch.randn(1, 64, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        with fused.noting():
            model.step(x)
        launched.clear()
        model.two.forward = torch.zeros_like
        with fused.captured():
            assert not model.step(x).any()
        assert len(launched) == 1  # the other norm
        assert not model.step(x).any()
