"""What is not captured runs as before, and the reason is said once; what fails leaves the model as it was."""

import contextlib
import copy
import pickle
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from checkpoints import empty, save_checkpoint
from models import llama
from static_caches import given
from torch import nn
from transformers import DynamicCache, StaticCache

from bigload import ConfigError, OffloadConfig, capture_decode, load_and_quantize_model
from bigload.decoding import decode_steps
from bigload.decoding.obstacles import obstacle_of


@pytest.fixture
def model(device):
    return llama().to(device).eval()


def tokens_on(model):
    return torch.arange(1, 11, device=model.device).view(2, 5)


def static(model, length=24):
    return StaticCache(config=model.config, max_cache_len=length)


@torch.no_grad()
def decoded(model, cache=None, steps=4, **how):
    cache = static(model) if cache is None else cache
    found = [model(tokens_on(model), **given(model, cache), **how).logits[:, -1:]]
    for _ in range(steps):
        found.append(model(found[-1].argmax(-1), **given(model, cache), **how).logits)
    return torch.cat(found, 1)


OBSTACLES = {
    "gradients": (lambda model: None, {}, "gradients are enabled"),
    "training": (lambda model: model.train(), {}, "in training mode"),
    "attentions": (lambda model: model.set_attn_implementation("eager"), {"output_attentions": True}, "output_attent"),
    "hidden states": (lambda model: None, {"output_hidden_states": True}, "output_hidden_states is asked for"),
    "a hook": (
        lambda model: model.model.layers[1].register_forward_hook(seen),
        {},
        "a hook of 'model.layers.1' (seen)",
    ),
    "a pre-hook, as a partial": (
        lambda model: model.lm_head.register_forward_pre_hook(partial(seen)),
        {},
        "a hook of 'lm_head' (seen)",
    ),
    "a cache that grows": (lambda model: None, {"cache": DynamicCache()}, "a DynamicCache grows with each token"),
}


def seen(*args):
    seen.calls = getattr(seen, "calls", 0) + 1


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_is_not_captured_is_said_once(name, model, captures, warned):
    prepare, how, message = OBSTACLES[name]
    prepare(model)
    run = decoded.__wrapped__ if name == "gradients" else decoded
    expected = run(model, **{key: copy.deepcopy(value) for key, value in how.items()})
    capture = capture_decode(model)
    assert torch.equal(run(model, **how), expected)
    assert capture.stats().replayed == 0
    assert message in warned()[0]
    assert len(warned()) == 1
    assert capture.stats().reasons == (warned()[0].partition("uncaptured: ")[2],)


def test_a_model_that_others_have_offloaded_or_put_on_several_devices(model):
    assert obstacle_of(model) is None
    model.model.layers[0]._hf_hook = SimpleNamespace(offload=True)
    assert obstacle_of(model) == "'model.layers.0' is offloaded by accelerate"
    model.model.layers[0]._hf_hook.offload = False  # it only moves inputs
    assert obstacle_of(model) is None
    model.lm_head = nn.Linear(8, 8, device="meta")
    assert obstacle_of(model) == f"it is on several devices ({model.device}, meta)"


def test_a_hook_of_all_modules(model, captures, warned):
    capture, before = capture_decode(model), getattr(seen, "calls", 0)
    decoded(model)
    handle = nn.modules.module.register_module_forward_hook(seen)
    try:
        decoded(model)
    finally:
        handle.remove()
    assert "a hook of all modules (seen)" in warned()[0]
    assert seen.calls > before + 4
    decoded(model)
    assert capture.stats().captures == 2


def test_hooks_that_are_added_later_run_and_after_they_are_removed_steps_are_captured_again(model, captures, warned):
    expected, calls = decoded(model), []
    capture = capture_decode(model)
    assert torch.equal(decoded(model), expected)
    handle = model.model.norm.register_forward_hook(lambda *args: calls.append(1))
    assert torch.equal(decoded(model), expected)
    assert len(calls) == 5
    handle.remove()
    assert torch.equal(decoded(model), expected)
    assert len(calls) == 5
    assert (capture.stats().captures, capture.stats().replayed) == (2, 6)


def test_hooks_of_the_model_itself_run_around_each_step(model, captures):
    calls, expected = [], decoded(model)
    model.register_forward_hook(lambda *args: calls.append(1))
    capture = capture_decode(model)
    assert torch.equal(decoded(model), expected)
    assert (len(calls), capture.stats().replayed) == (5, 3)


def test_the_hooks_by_which_transformers_collects_states_do_nothing_unless_asked(model, captures):
    with torch.no_grad():
        model(tokens_on(model), output_hidden_states=True)  # after which they stay
    capture = capture_decode(model)
    decoded(model)
    assert capture.stats().replayed == 3


def test_a_model_that_is_offloaded_to_the_disk_runs_as_before(tmp_path, device, captures, warned, small_parts_stream):
    folder = save_checkpoint(llama().bfloat16(), tmp_path)
    model = load_and_quantize_model(
        empty(llama),
        "nf4",
        folder,
        device_map={"": device, "model.layers.1": "disk"},
        offload_folder=tmp_path / "off",
        offload=OffloadConfig(),
    ).eval()
    expected = decoded(model)
    capture = capture_decode(model)
    assert torch.equal(decoded(model), expected)
    assert capture.stats().replayed == 0
    assert "is offloaded, and no graph reads files or memory that is not pinned" in warned()[-1]
    model.offload.remove()
    assert torch.equal(decoded(model), expected)
    assert capture.stats().replayed == 3


def exchange_parameter(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)


def exchange_values(model):
    model.model.norm.weight.data = model.model.norm.weight.data * 2


def write(model):
    with torch.no_grad():
        model.model.norm.weight.mul_(2)


def exchange_module(model):
    model.model.layers[0].mlp = copy.deepcopy(model.model.layers[1].mlp)


def exchange_forward(model):
    own = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: own(x) * 2


def exchange_buffer(model):
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 2


def exchange_attention(model):
    model.set_attn_implementation("eager")


CHANGES = [
    exchange_parameter,
    exchange_values,
    write,
    exchange_module,
    exchange_forward,
    exchange_buffer,
    exchange_attention,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("inference", [False, True])
def test_what_is_changed_in_a_model_counts_in_the_next_step(change, inference, model, captures):
    with torch.inference_mode(inference):
        capture, cache = capture_decode(model), static(model)
        before = decoded(model, cache)
        assert capture.stats().captures == 1
        change(model)
        cache.reset()
        found = decoded(model, cache)
        capture.remove()
        assert torch.equal(found, decoded(model))
    assert not torch.equal(found, before) or change is exchange_attention
    assert capture.stats().captures == (1 if change is write else 2)


@torch.no_grad()
def test_a_config_that_asks_for_tuples_is_met_in_the_next_step(model, captures):
    """This model cannot compute with it, as its own error says; a step of before would go on as if nothing were."""
    capture, cache = capture_decode(model), static(model)
    decoded(model, cache)
    assert capture.stats().captures == 1
    model.config.return_dict = False
    with pytest.raises(AttributeError, match="last_hidden_state"):
        model(tokens_on(model)[:, :1].contiguous(), **given(model, cache))


def test_quantized_weights_that_are_exchanged_count_in_the_next_step(tmp_path, device, captures, small_parts_stream):
    folder = save_checkpoint(llama().bfloat16(), tmp_path)
    model = load_and_quantize_model(empty(llama), "nf4", folder, device_map=device).eval()
    capture = capture_decode(model)
    before = decoded(model)
    state = model.model.layers[0].mlp.down_proj.weight.quant_state
    state.absmax = state.absmax * 2
    found = decoded(model)
    assert not torch.equal(found, before)
    capture.remove()
    assert torch.equal(found, decoded(model))


def host_reads(model):
    own = model.model.norm.forward
    model.model.norm.forward = lambda x: own(x) * (1 if x.sum().item() < 1e9 else 2)


FAILURES = {
    "a wait of the host": (host_reads, None, "RuntimeError|AcceleratorError"),
    "an error": (lambda model: None, ValueError("of the step"), "ValueError: of the step"),
    "out of memory": (lambda model: None, torch.OutOfMemoryError("none"), "there was no memory for it on the device"),
}


class Failing:
    """Fails at the end of the step that is captured, once."""

    def __init__(self, model, error):
        self.own, self.error, self.module = model.lm_head.forward, error, model.lm_head
        model.lm_head.forward = self

    def __call__(self, x):
        out = self.own(x)
        is_capturing = torch._C._len_torch_dispatch_stack() if x.device.type == "cpu" else None
        if is_capturing is None:
            is_capturing = torch.cuda.is_current_stream_capturing()
        if self.error is not None and is_capturing:
            self.error, error = None, self.error
            raise error
        return out


@pytest.mark.parametrize("name", FAILURES)
def test_a_capture_that_fails_leaves_all_usable_and_the_reason_is_said(name, model, captures, warned):
    prepare, error, message = FAILURES[name]
    prepare(model)
    Failing(model, error)
    expected = decoded(model)
    capture = capture_decode(model)
    assert torch.equal(decoded(model), expected)
    assert capture.stats().replayed == 0
    (said,) = warned()
    assert any(part in said for part in message.split("|"))
    assert torch.equal(decoded(model, steps=8)[:, :5], expected)
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.rand(2**20, device=model.device).sum().item()
    # Others are captured as before.
    other = llama().to(model.device).eval()
    with capture_decode(other) as capture:
        decoded(other)
        assert capture.stats().replayed == 3


def test_ctrl_c_while_it_captures_ends_the_step_and_the_next_one_captures(model, captures):
    expected = decoded(model)
    failing = Failing(model, KeyboardInterrupt())
    capture = capture_decode(model)
    with pytest.raises(KeyboardInterrupt):
        decoded(model)
    assert failing.error is None
    assert torch.equal(decoded(model), expected)
    assert capture.stats().replayed == 4  # the kind is known


def test_ctrl_c_as_it_replays_leaves_all_usable(model, captures, monkeypatch):
    expected = decoded(model)
    capture = capture_decode(model)
    decoded(model)

    def interrupted(self, call):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr("bigload.decoding.steps.CapturedStep._fill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoded(model)
    assert torch.equal(decoded(model), expected)
    assert capture.stats().captures == 1


def test_arguments_that_differ_in_each_step_are_said(model, captures, warned):
    tokens = tokens_on(model)

    @torch.no_grad()
    def steps():
        cache, found = static(model), []
        model(tokens, **given(model, cache))
        for step in range(12):
            mask = torch.ones(2, 6 + step, dtype=torch.long, device=model.device)
            found.append(model(tokens[:, :1] + step, **given(model, cache), attention_mask=mask).logits)
        return torch.cat(found, 1)

    expected = steps()
    capture = capture_decode(model)
    assert torch.equal(steps(), expected)
    assert capture.stats().captures == 0
    assert "each step differs from the one before, in argument 'attention_mask'" in warned()[0]


def test_caches_that_differ_in_each_step_are_said(model, captures, warned):
    tokens = tokens_on(model)
    capture = capture_decode(model)
    with torch.no_grad():
        for length in range(12, 22):
            cache = static(model, length)
            model(tokens, **given(model, cache))
            model(tokens[:, :1], **given(model, cache))
    assert capture.stats().captures == 0
    assert "each step differs from the one before, in its caches, torch's modes or the model's config" in warned()[0]


def test_a_tensor_elsewhere(model, captures, warned):
    capture, cache = capture_decode(model), static(model)
    decoded(model, cache)
    with torch.no_grad(), contextlib.suppress(RuntimeError, NotImplementedError):
        model(torch.zeros(2, 1, dtype=torch.long, device="meta"), **given(model, cache))
    assert "it is given a tensor on meta" in warned()[0]
    assert capture.stats().captures == 1


def test_autocast_is_another_kind(model, captures):
    try:
        with torch.autocast(model.device.type, torch.bfloat16):
            decoded(model)
    except RuntimeError as error:
        pytest.skip(f"transformers' static cache takes no autocast here: {error}")
    capture = capture_decode(model)
    plain = decoded(model)
    with torch.autocast(model.device.type, torch.bfloat16):
        found = decoded(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)  # a graph has its own casts, not those that autocast keeps while it lasts
    with torch.autocast(model.device.type, torch.bfloat16):
        written = decoded(model)
    assert capture.stats().captures == 2
    assert torch.is_autocast_cache_enabled()
    capture.remove()
    with torch.autocast(model.device.type, torch.bfloat16):
        assert torch.equal(decoded(model), written)
    assert not torch.equal(found, plain)
    assert not torch.equal(found, written)


def test_several_threads_take_turns(model, captures):
    capture, found = capture_decode(model), {}
    expected = decoded(model, steps=8)

    def run(number):
        found[number] = decoded(model, steps=8)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(each, expected) for each in found.values())
    assert len(found) == 4
    assert capture.stats().replayed + capture.stats().uncaptured == 5 * 8


def test_two_models(device, captures):
    models = [llama().to(device).eval() for _ in range(2)]
    expected = [decoded(model) for model in models]
    with capture_decode(models[0]), capture_decode(models[1]):
        for _ in range(2):
            for model, each in zip(models, expected, strict=True):
                assert torch.equal(decoded(model), each)


class Counting(nn.Module):
    """A model that is not of transformers: its cache is a buffer, and a method computes a step."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)
        self.register_buffer("sums", torch.zeros(2, 16))
        self.latest, self.parts, self.notes = None, [], SimpleNamespace(sums=0)

    def step(self, ids):
        self.sums.add_(self.embed(ids))
        return {"logits": self.head(self.sums), "ids": ids, "pair": (ids + 1, None)}

    def exchanging(self, ids):
        self.sums = self.sums + self.embed(ids)
        return self.sums

    def keeping(self, ids):
        self.latest = self.embed(ids) if self.latest is None else self.latest + self.embed(ids)
        return self.latest

    def listing(self, ids):
        self.parts[:] = [*self.parts[-2:], self.embed(ids)]
        return sum(self.parts)

    def noting(self, ids):
        self.notes.sums = self.notes.sums + 1
        return self.embed(ids) + self.notes.sums

    def writing(self, ids):
        return ids.add_(1)

    def wrapping(self, ids):
        return iter([ids])


@torch.no_grad()
def counted(model, method="step"):
    model.sums = torch.zeros_like(model.sums)
    model.latest, model.parts, model.notes.sums = None, [], torch.zeros(16, device=model.sums.device)
    return [getattr(model, method)(torch.full((2,), step, device=model.sums.device)) for step in range(5)]


def test_a_model_of_ones_own_by_the_method_that_computes_a_step(device, captures):
    model = Counting().to(device).eval()
    expected = counted(model)
    with capture_decode(model, step="step") as capture:
        found = counted(model)
        assert capture.stats().replayed == 4
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one["logits"], two["logits"])
        assert torch.equal(one["ids"], two["ids"])
        assert torch.equal(one["pair"][0], two["pair"][0])
        assert one["pair"][1] is None
    assert "step" not in vars(model)


@torch.no_grad()
def test_arguments_in_lists_tuples_and_dicts_are_those_of_each_step(device, captures):
    class Nested(Counting):
        def nested(self, ids, given, pair):
            self.sums.add_(self.embed(ids) * given["scales"][0] + pair[1])
            return self.sums * given["scales"][1]

    def run():
        model.sums.zero_()
        found = []
        for step in range(5):
            one, two, three = (torch.full((1,), float(step + number), device=device) for number in range(3))
            ids = torch.full((2,), step, device=device)
            found.append(model.nested(ids, {"scales": [one, two]}, pair=("added", three)).clone())
        return found

    model = Nested().to(device).eval()
    expected = run()
    with capture_decode(model, step="nested") as capture:
        found = run()
        assert capture.stats().replayed == 4
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)


WRONG = {
    "writing": "it writes to a tensor that it is given",
    "wrapping": "it returns a ",
    "exchanging": "it puts another tensor into 'sums' of 'the model'",
    "keeping": "it puts another tensor into 'latest' of 'the model'",
    "listing": "it puts another tensor into 'parts' of 'the model'",
    "noting": "it puts another tensor into 'notes' of 'the model'",
}


@pytest.mark.parametrize("method", WRONG)
def test_a_step_that_a_graph_cannot_stand_for(method, device, captures, warned):
    model = Counting().to(device).eval()
    expected = counted(model, method)
    capture = capture_decode(model, step=method)
    found = [value for _ in range(4) for value in counted(model, method)]
    if method != "wrapping":
        for one, two in zip(found, expected * 4, strict=True):
            assert torch.equal(one, two)
    assert capture.stats().replayed == 0
    assert any(WRONG[method] in said or "exchanged between steps" in said for said in warned()), warned()


@torch.no_grad()
def test_a_step_that_does_what_the_one_before_did_not_is_not_captured(model, device, captures, warned):
    """Only the second one, which is captured, exchanges a tensor of the cache."""
    caches, turns, mlp = [], [], model.model.layers[0].mlp
    own = mlp.forward

    def forward(x):
        turns.append(True)
        if len(turns) == 3:  # the prompt, a step, and this one
            caches[-1].layers[0].keys = caches[-1].layers[0].keys + 0
        return own(x)

    def run():
        caches.append(StaticCache(config=model.config, max_cache_len=16))
        turns.clear()
        found = [model(torch.arange(3, 6, device=device).view(1, 3), **given(model, caches[-1])).logits[:, -1:]]
        for step in range(4):
            ids = torch.full((1, 1), 7 * step, device=device)
            found.append(model(ids, **given(model, caches[-1])).logits)
        return torch.cat(found, 1)

    mlp.forward = forward
    expected = run()
    with capture_decode(model):
        assert torch.equal(run(), expected)
    assert "puts another 'keys' into its cache" in " ".join(warned())


def test_a_captured_model_is_not_copied_until_it_is_removed(model, captures):
    expected = decoded(model)
    capture = capture_decode(model)
    for duplicate in (copy.deepcopy, pickle.dumps):
        with pytest.raises(ConfigError, match="call remove"):
            duplicate(model)
    capture.remove()
    capture.remove()
    assert torch.equal(decoded(copy.deepcopy(model)), expected)
    assert "forward" not in vars(model)


def test_arguments_are_checked(model, captures):
    with pytest.raises(ConfigError, match="no method of that name"):
        capture_decode(model, step="missing")
    with pytest.raises(ConfigError, match="expected 1 or more"):
        capture_decode(model, max_graphs=0)
    with pytest.raises(ConfigError):
        capture_decode("model")
    with capture_decode(model), pytest.raises(ConfigError, match="call remove"):
        capture_decode(model)
    capture_decode(model).remove()


def test_on_the_cpu_it_says_that_it_has_no_effect(warned):
    model = llama().eval()
    expected = decoded(model)
    capture = capture_decode(model)
    assert warned() == ["capture_decode has no effect: the model is on cpu, and CUDA graphs need a GPU"]
    assert torch.equal(decoded(model), expected)
    assert "forward" not in vars(model)
    assert "without effect" in repr(capture)
    capture.release()
    capture.remove()


def test_no_more_kinds_of_calls_are_remembered_than_a_few(model, captures, monkeypatch):
    monkeypatch.setattr(decode_steps, "_MAX_KINDS", 2)
    capture = capture_decode(model)
    for batch in (1, 2, 3, 4):
        with torch.no_grad():
            cache = static(model)
            for tokens in (tokens_on(model)[:1].repeat(batch, 1), *torch.ones(4, batch, 1, dtype=int).to(model.device)):
                model(tokens, **given(model, cache))
    assert (capture.stats().captures, capture.stats().graphs) == (4, 2)
    assert repr(capture).startswith("DecodeCapture(12 steps replayed, 4 not, 2 graphs of ")
