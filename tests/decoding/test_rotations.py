"""Rotary embeddings in captured steps: one kernel where it gives the bits of the model's code, and else that code."""

import threading

import kernels_by_torch
import pytest
import torch
from comparisons import equal
from models import llama
from torch import nn
from transformers.models.cohere import modeling_cohere
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from bigload import capture_decode
from bigload.decoding.fused import rotations
from bigload.decoding.fused.rotations import Rotations, rotated

HEADS, KEYS, WIDTH = 4, 2, 16
OF_LLAMA, OF_GPT_OSS = modeling_llama.apply_rotary_pos_emb, modeling_gpt_oss.apply_rotary_pos_emb


class Attention(nn.Module):
    def forward(self, q, k, cos, sin):
        return apply_rotary_pos_emb(q, k, cos, sin)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = Attention(), Attention()
        self.weight = nn.Parameter(torch.ones(1))  # says on which device the model is

    def step(self, q, k, cos, sin):
        return self.two(*self.one(q, k, cos, sin), cos, sin)


def by_torch(strides, q, k, cos, sin):
    found = (OF_LLAMA if cos.shape[-1] == q.shape[-1] else OF_GPT_OSS)(q, k, cos, sin)
    made = [torch.empty_strided(x.shape, each, dtype=x.dtype) for x, each in zip((q, k), strides, strict=True)]
    return tuple(into.copy_(x) for into, x in zip(made, found, strict=True))


@pytest.fixture
def launched(device, monkeypatch):
    """Count what the kernel computes; on the CPU, torch stands in for it."""
    calls, own = [], rotated if device.type == "cuda" else by_torch

    def counted(strides, *given):
        calls.append(strides)
        return own(strides, *given)

    if device.type == "cpu":
        monkeypatch.setattr(rotations, "runs_kernels", lambda device: True)
    monkeypatch.setattr(rotations, "rotated", counted)
    return calls


def drawn(device, seed=0, batch=1, width=WIDTH, tables=1, dtype=torch.bfloat16, heads=HEADS, keys=KEYS):
    """Draw queries and keys as attention has them, and tables whose halves are equal, as those of most models."""
    draw = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, 1, count, width, generator=draw).transpose(1, 2) for count in (heads, keys))
    angles = torch.randn(tables, 1, width // 2, generator=draw).repeat(1, 1, 2)
    return [each.to(device, dtype) for each in (q, k, angles.cos(), angles.sin())]


def run(model, given):
    """Run steps, as they are and captured; the bits are the same, and the file has its function again."""
    with torch.no_grad():
        expected = [model.step(*each) for each in given]
        with capture_decode(model.eval(), step="step") as capture:
            for each, right in zip(given, expected, strict=True):
                assert all(map(equal, model.step(*each), right))
            assert capture.stats().replayed == len(given) - 1
    assert apply_rotary_pos_emb is OF_LLAMA


def test_rotations_are_one_kernel_for_queries_and_keys_in_a_graph(device, captures, launched):
    run(Net().to(device), [drawn(device, seed) for seed in range(4)])
    # Of each, which lie in memory in two ways: a first launch, a draw, and what it is given. Then each is in the graph.
    assert len(launched) == 3 + 3 + 2


def test_captured_steps_of_a_model_of_transformers_have_them(device, captures, launched):
    model = llama().to(device, torch.bfloat16).eval()
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    how |= {"disable_compile": True, "return_dict_in_generate": True, "output_logits": True}
    tokens = torch.arange(3, 8, device=device).view(1, 5)
    expected = model.generate(tokens, **how)
    with capture_decode(model) as capture:
        found = model.generate(tokens, **how)
        assert capture.stats().replayed == 4
    layers = model.config.num_hidden_layers
    assert len(launched) == 2 + layers + layers  # the trial of one shape, each compared, and each in the graph
    assert torch.equal(found.sequences, expected.sequences)
    assert all(map(equal, found.logits, expected.logits))


def test_results_lie_in_memory_as_those_of_the_model(device, captures, launched):
    q, k, cos, sin = drawn(device, batch=3)
    own, given = apply_rotary_pos_emb, (q, k.contiguous(), cos, sin)
    of, expected = Rotations(Net()), own(*given)
    with of.noting():
        apply_rotary_pos_emb(*given)
    launched.clear()
    with of.captured():
        found = apply_rotary_pos_emb(*given)
    assert len(launched) == 1
    assert [each.stride() for each in found] == [each.stride() for each in expected]


def test_what_rotates_in_another_way_keeps_its_code(device, captures, launched, monkeypatch):
    """Cohere's rotates pairs of neighbours. At position 0 all give the same."""
    monkeypatch.setitem(globals(), "apply_rotary_pos_emb", own := modeling_cohere.apply_rotary_pos_emb)
    q, k, cos, sin = drawn(device)
    of = Rotations(Net())
    with of.noting():
        Net().step(q, k, torch.ones_like(cos), torch.zeros_like(sin))
    with of.captured():
        launched.clear()
        Net().step(q, k, cos, sin)
    assert not launched
    assert apply_rotary_pos_emb is own


def test_what_writes_to_its_queries_keeps_its_code(device, captures, launched, monkeypatch):
    def own(q, k, cos, sin):
        return tuple(into.copy_(x) for into, x in zip((q, k), OF_LLAMA(q, k, cos, sin), strict=True))

    monkeypatch.setitem(globals(), "apply_rotary_pos_emb", own)
    q, k, cos, sin = drawn(device)
    of = Rotations(Net())
    with of.noting():
        apply_rotary_pos_emb(q, k, torch.ones_like(cos), torch.zeros_like(sin))
    launched.clear()
    with of.captured():
        found = apply_rotary_pos_emb(q, k, cos, sin)
    assert not launched
    assert found[0] is q


def test_tables_of_half_the_width_are_those_of_gpt_oss(device, captures, launched, monkeypatch):
    monkeypatch.setitem(globals(), "apply_rotary_pos_emb", OF_GPT_OSS)
    q, k, cos, sin = drawn(device)
    of, given = Rotations(Net()), (q, k, cos[..., : WIDTH // 2], sin[..., : WIDTH // 2])
    expected = Net().step(*given)
    with of.noting():
        Net().step(*given)
    with of.captured():
        launched.clear()
        assert all(map(equal, Net().step(*given), expected))
    assert len(launched) == 2


@pytest.mark.parametrize("off_from", [2, 3], ids=["in the draw", "for what it is given"])
def test_a_kernel_of_other_bits_is_not_used(off_from, device, captures, launched, monkeypatch):
    own = rotations.rotated

    def off(strides, *given):
        found = own(strides, *given)
        if len(launched) >= off_from:
            found[1].view(torch.int16)[0, -1, 0, -1] += 1
        return found

    monkeypatch.setattr(rotations, "rotated", off)
    run(Net().to(device), [drawn(device, seed) for seed in range(4)])
    assert len(launched) == off_from + 2  # of the other module, whose inputs lie in memory in another way


def test_a_kernel_that_does_not_run_is_not_used(device, captures, launched, monkeypatch):
    def broken(*given):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(rotations, "rotated", broken)
    run(Net().to(device), [drawn(device, seed) for seed in range(4)])


def test_a_function_that_refuses_what_a_trial_gives_it_is_kept(device, captures, launched, monkeypatch):
    def strict(q, k, cos, sin):
        if cos.abs().max() > 1:
            raise ValueError("no table of cosines")
        return OF_LLAMA(q, k, cos, sin)

    net, given = Net().to(device), drawn(device)
    monkeypatch.setitem(globals(), "apply_rotary_pos_emb", strict)
    of, expected = Rotations(net), net.step(*given)
    with of.noting():
        assert all(map(equal, net.step(*given), expected))
    assert launched
    assert not any(of._known.values())


def test_nothing_is_tried_in_a_capture(device, launched, monkeypatch):
    """A GPU that was full when it was asked would be asked again, by a kernel, which may end the capture."""
    asked, of, given = [], Rotations(Net()), drawn(device)
    monkeypatch.setattr(rotations, "runs_kernels", lambda device: asked.append(device))
    with of.noting():
        apply_rotary_pos_emb(*given)
    assert len(asked) == 1
    with of.captured():
        apply_rotary_pos_emb(*given)
    assert len(asked) == 1
    assert not launched


def test_what_the_kernel_does_not_take_is_left_to_the_model(device, launched):
    q, k, cos, sin = drawn(device)
    with Rotations(Net()).noting():
        apply_rotary_pos_emb(*(each.float() for each in (q, k, cos, sin)))
        apply_rotary_pos_emb(q, k, cos, sin, 1)
        apply_rotary_pos_emb(q, k, cos=cos, sin=sin)
        apply_rotary_pos_emb(q, k, cos.float(), sin.float())
        apply_rotary_pos_emb(q.repeat(1, 1, 2, 1), k.repeat(1, 1, 2, 1), cos.repeat(1, 2, 1), sin.repeat(1, 2, 1))
        apply_rotary_pos_emb(torch.cat([q, q], -1)[..., ::2], k, cos, sin)
    assert not launched


def test_another_thread_computes_as_before_and_models_share_a_file(device, launched):
    one, two, given = Rotations(Net()), Rotations(Net()), drawn(device)
    with one.noting():
        apply_rotary_pos_emb(*given)
    with one.captured():
        launched.clear()
        thread = threading.Thread(target=apply_rotary_pos_emb, args=given)
        thread.start()
        thread.join()
        assert not launched
        with two.noting():
            pass
        with two.captured():  # which knows of none
            apply_rotary_pos_emb(*given)
        assert not launched
    assert apply_rotary_pos_emb is OF_LLAMA
    inside, over = threading.Event(), threading.Event()

    def work():
        with one.captured():
            inside.set()
            over.wait(60)
            apply_rotary_pos_emb(*given)

    thread = threading.Thread(target=work)
    with two.captured():
        thread.start()
        assert inside.wait(60)
    apply_rotary_pos_emb(*given)
    assert not launched
    over.set()
    thread.join()
    assert len(launched) == 1
    assert apply_rotary_pos_emb is OF_LLAMA


def test_a_function_that_a_file_has_got_since_it_was_noted_is_kept(device, launched, monkeypatch):
    of, given = Rotations(Net()), drawn(device)
    with of.noting():
        apply_rotary_pos_emb(*given)
    monkeypatch.setitem(globals(), "apply_rotary_pos_emb", lambda q, k, cos, sin: (q + 1, k + 1))
    launched.clear()
    with of.captured():
        assert equal(apply_rotary_pos_emb(*given)[0], given[0] + 1)
    assert not launched


def test_models_without_rotations_are_left_alone():
    assert not Rotations(nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2))))._files
    assert Rotations(llama())._files == [vars(modeling_llama)]


@pytest.fixture
def on_gpu(device, monkeypatch):
    """On the CPU, the kernel is stood in for; what it is given is tested nevertheless."""
    if device.type == "cpu":
        kernels_by_torch.install_in(monkeypatch, rotations, "decoding/fused/kernels.py", kernels_by_torch.rotate)
    return device


@pytest.mark.parametrize("half", [False, True], ids=["tables", "half tables"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "heads", "keys", "width"), [(1, 32, 8, 128), (1, 32, 4, 128), (4, 9, 3, 64), (2, 4, 4, 80)]
)
def test_the_kernel_gives_the_bits_of_torch(batch, heads, keys, width, dtype, half, on_gpu):
    for tables in {1, batch}:
        given = drawn(on_gpu, width + tables, batch, width, tables, dtype, heads, keys)
        columns = width // 2 if half else width
        given[2:] = [torch.randn_like(table[..., :columns]) for table in given[2:]]
        expected = (OF_GPT_OSS if half else OF_LLAMA)(*given)
        found = rotated([each.stride() for each in expected], *given)
        assert all(map(equal, found, expected))
        assert [each.stride() for each in found] == [each.stride() for each in expected]
