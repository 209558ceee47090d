"""`generate` with a static cache: captured steps give the tokens and logits of steps that are not, bit for bit."""

import gc
import weakref
from contextlib import contextmanager, nullcontext

import pytest
import torch
import transformers
from checkpoints import empty, save_checkpoint
from models import llama, t5
from static_caches import given, returned

import bigload
from bigload import capture_decode, load_and_quantize_model

SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 16}
TOKENS = torch.arange(1, 11).view(2, 5)
STEPS = 9
STATIC = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "pad_token_id": 0, "cache_implementation": "static"}
STATIC |= {"return_dict_in_generate": True, "output_logits": True, "disable_compile": True}


def of(family, config_class="{}Config", **fields):
    config = getattr(transformers, config_class.format(family))(**(SIZES | fields))
    return getattr(transformers, f"{family}ForCausalLM")(config)


MIXTURE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS = {
    "llama": llama,
    "qwen3": lambda: of("Qwen3"),
    "gpt-neox": lambda: of("GPTNeoX"),
    "mixtral": lambda: of("Mixtral", **MIXTURE),
    "mistral, a window that is never full": lambda: of("Mistral", sliding_window=32),
    "gemma3, masks by name": lambda: of("Gemma3", "{}TextConfig", sliding_window=32, sliding_window_pattern=2),
}


def generated(model, tokens, **how):
    torch.manual_seed(3)
    out = model.generate(tokens, **(STATIC | {"do_sample": False} | how))
    return out.sequences, list(out.logits)


def assert_same(found, expected):
    assert torch.equal(found[0], expected[0])
    assert len(found[1]) == len(expected[1])
    for one, two in zip(found[1], expected[1], strict=True):
        assert torch.equal(one, two)


@pytest.fixture
def model(device):
    return llama().to(device).eval()


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_and_logits_are_those_of_steps_that_run_as_before(name, device, captures):
    model, tokens = MODELS[name]().to(device).eval(), TOKENS.to(device)
    expected = generated(model, tokens)
    capture = capture_decode(model)
    found = generated(model, tokens)
    assert_same(found, expected)
    stats = capture.stats()
    # The prompt gives the first token; of the other steps the first runs as before.
    assert (stats.replayed, stats.uncaptured, stats.captures, stats.reasons) == (STEPS - 2, 1, 1, ())
    gc.collect()  # the cache of the last call, which some models hold in a cycle
    assert_same(generated(model, tokens), expected)
    capture.remove()
    assert_same(generated(model, tokens), expected)
    stats = capture.stats()
    assert stats.replayed + stats.uncaptured == 2 * (STEPS - 1)
    assert stats.captures == 1


def test_what_generate_switches_for_the_steps_alone_leaves_their_graph(device, captures, monkeypatch):
    """On a GPU, `generate` has experts computed in another way in its steps than for the prompt."""

    @contextmanager
    def switched(self):
        before = self.get_experts_implementation()
        self.set_experts_implementation(dict.fromkeys(before, "batched_mm"))
        try:
            yield
        finally:
            self.set_experts_implementation(before)

    monkeypatch.setattr(transformers.GenerationMixin, "_optimize_model_for_decode", switched)
    model, tokens = MODELS["mixtral"]().to(device).eval(), TOKENS.to(device)
    expected = generated(model, tokens)
    with capture_decode(model) as capture:
        for _ in range(3):
            assert_same(generated(model, tokens), expected)
            gc.collect()
        stats = capture.stats()
        assert (stats.uncaptured, stats.captures, stats.graphs) == (1, 1, 1)
        # Steps in another way have a graph of their own, or none where that way reads on the host, as on a GPU.
        monkeypatch.setattr(transformers.GenerationMixin, "_optimize_model_for_decode", lambda self: nullcontext())
        generated(model, tokens)
        assert capture.stats().uncaptured > 1
        assert capture.stats().captures == 2 or device.type == "cuda"


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"num_return_sequences": 3, "do_sample": True},
        {"repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_sampling_and_beams(how, model, device, captures):
    tokens = TOKENS.to(device)
    expected = generated(model, tokens, **how)
    capture = capture_decode(model)
    assert_same(generated(model, tokens, **how), expected)
    assert capture.stats().replayed == STEPS - 2


def test_prompts_that_are_padded_on_the_left(model, device, captures):
    tokens, mask = TOKENS.to(device), torch.ones(2, 5, dtype=torch.long, device=device)
    mask[0, :2] = 0
    expected = generated(model, tokens, attention_mask=mask)
    capture = capture_decode(model)
    assert_same(generated(model, tokens, attention_mask=mask), expected)
    assert capture.stats().replayed == STEPS - 2


def test_each_batch_size_and_length_has_a_graph_of_its_own(model, device, captures):
    prompts = [TOKENS[:1], TOKENS, TOKENS.repeat(2, 1)[:3], TOKENS[:, :3]]
    expected = [generated(model, prompt.to(device)) for prompt in prompts]
    capture = capture_decode(model)
    for _ in range(2):
        for prompt, each in zip(prompts, expected, strict=True):
            assert_same(generated(model, prompt.to(device)), each)
    # A cache is as long as the longest so far: that of the last prompt fits the graph of the second.
    assert capture.stats().graphs == 3


def test_an_encoder_and_a_decoder(device, captures):
    model, tokens = t5().to(device).eval(), TOKENS.to(device)
    expected = generated(model, tokens)
    capture = capture_decode(model)
    assert_same(generated(model, tokens), expected)
    assert capture.stats().replayed == STEPS - 2


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4"])
def test_quantized_models(mode, tmp_path, device, captures):
    folder = save_checkpoint(llama().bfloat16(), tmp_path)
    model = load_and_quantize_model(empty(llama), mode, folder, device_map=device).eval()
    tokens = TOKENS.to(device)
    expected = generated(model, tokens)
    capture = capture_decode(model)
    assert_same(generated(model, tokens), expected)
    assert capture.stats().replayed == STEPS - 2


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_int8_is_captured_where_the_gpu_alone_finds_outliers(threshold, tmp_path, device, captures, warned):
    folder = save_checkpoint(llama().half(), tmp_path)
    config = bigload.BnbQuantizationConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    model = load_and_quantize_model(empty(llama), config, folder, device_map=device).eval()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = 100.0  # makes some
    expected = generated(model, TOKENS.to(device))
    capture = capture_decode(model)
    assert_same(generated(model, TOKENS.to(device)), expected)
    if threshold == 0.0 or device.type == "cuda":
        assert capture.stats().replayed == STEPS - 2
        assert warned() == []
    else:
        assert capture.stats().replayed == 0
        (message,) = warned()
        assert "llm_int8_threshold=6, for which the host waits" in message


def test_int8_with_outliers_is_captured_for_as_many_sequences_as_the_gpu_alone_computes(
    tmp_path, device, captures, warned, monkeypatch
):
    if device.type == "cpu":
        monkeypatch.setattr("bigload.decoding.obstacles.is_on_gpu_alone", lambda state, device: True)
    folder = save_checkpoint(llama().half(), tmp_path)
    model = load_and_quantize_model(empty(llama), "int8", folder, device_map=device).eval()
    tokens = (torch.arange(33 * 5) % 100).view(33, 5).to(device)
    expected = generated(model, tokens)
    capture = capture_decode(model)
    assert_same(generated(model, tokens), expected)
    assert capture.stats().replayed == 0
    assert "in steps of more than 32 sequences" in warned()[-1]


def test_the_next_generation_uses_the_graph_of_a_cache_that_is_no_more(model, device, captures):
    tokens = TOKENS.to(device)
    expected = [generated(model, prompt) for prompt in (tokens, tokens + 7, tokens + 20)]
    capture = capture_decode(model)
    for number, each in enumerate(expected):
        assert_same(generated(model, tokens + (0, 7, 20)[number]), each)
    assert (capture.stats().captures, capture.stats().graphs) == (1, 1)


def tensors_of(cache):
    return [tensor for layer in cache.layers for tensor in vars(layer).values() if isinstance(tensor, torch.Tensor)]


@pytest.mark.parametrize("window", [None, 8])
def test_the_next_prompt_is_put_where_the_graph_has_its_cache(window, device, captures):
    model = (llama() if window is None else of("Mistral", sliding_window=window)).to(device).eval()
    tokens, how = TOKENS.to(device), {"max_new_tokens": 12, "min_new_tokens": 12}
    expected = [generated(model, tokens + add, **how) for add in (0, 7, 20)]
    capture, places = capture_decode(model), set()
    for add, each in zip((0, 7, 20), expected, strict=True):
        torch.manual_seed(3)
        out = model.generate(tokens + add, do_sample=False, **(STATIC | how))
        assert_same((out.sequences, list(out.logits)), each)
        places.add(tuple(tensor.data_ptr() for tensor in tensors_of(returned(out))))
        del out
    assert len(places) == 1
    assert capture.stats().captures == (1 if window is None else 2)


def test_a_cache_that_is_in_use_is_not_lent(model, device, captures):
    tokens = TOKENS.to(device)
    expected = [decoded(model, tokens + add, static(model)) for add in (0, 9)]
    capture, one, two = capture_decode(model), static(model), static(model)
    assert all(map(torch.equal, decoded(model, tokens, one), expected[0]))
    held = [tensor.clone() for tensor in tensors_of(one)]
    assert all(map(torch.equal, decoded(model, tokens + 9, two), expected[1]))
    assert all(map(torch.equal, tensors_of(one), held))
    assert capture.stats().captures == 2


@torch.no_grad()
def prepared(model, tokens, cache, steps=8):
    """Give the logits of each step, whose inputs the model prepares, masks included."""
    logits = model(tokens, **given(model, cache), use_cache=True).logits[:, -1]
    for _ in range(steps):
        yield logits
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
        how = given(model, cache) | {"attention_mask": torch.ones_like(tokens), "use_cache": True}
        how["position_ids"] = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        logits = model(**model.prepare_inputs_for_generation(tokens, next_sequence_length=1, **how)).logits[:, -1]


def test_caches_side_by_side_do_not_share_the_place_of_one_that_had_several_graphs(device, captures):
    model, tokens = of("Mistral", sliding_window=8).to(device).eval(), TOKENS.to(device)
    prompts = (tokens, tokens + 9)
    expected = [list(prepared(model, prompt, static(model))) for prompt in prompts]
    capture = capture_decode(model)
    list(prepared(model, tokens, static(model)))  # one graph as the window fills, and one when it is full
    assert (capture.stats().graphs, capture.stats().reasons) == (2, ())
    turns = [prepared(model, prompt, static(model)) for prompt in prompts]
    found = [[], []]
    for number in (0, 1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0):  # the window of the second is full first
        found[number].append(next(turns[number]))
    for number in (0, 1):
        for one, two in zip(found[number], expected[number], strict=True):
            assert torch.equal(one, two)
    assert capture.stats().graphs > 2


CHANGED = {
    "another dtype": lambda model: model.to(torch.bfloat16),
    "another batch": lambda model: None,
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_cache_of_another_kind_is_not_lent(name, model, device, captures):
    tokens = TOKENS.to(device)
    capture = capture_decode(model)
    decoded(model, tokens, static(model))
    CHANGED[name](model)
    tokens = tokens[:1] if name == "another batch" else tokens
    found = decoded(model, tokens, static(model))
    capture.remove()
    assert all(map(torch.equal, found, decoded(model, tokens, static(model))))
    assert capture.stats().captures == 2


def test_caches_that_live_side_by_side_have_graphs_of_their_own(model, device, captures):
    tokens = TOKENS.to(device)
    expected = [decoded(model, prompt, static(model)) for prompt in (tokens, tokens + 9)]
    capture = capture_decode(model)
    one, two = static(model), static(model)
    turns = (stepped(model, prompt, cache) for prompt, cache in ((tokens, one), (tokens + 9, two)))
    found = list(zip(*turns, strict=True))
    for number in range(2):
        for step, each in enumerate(expected[number]):
            assert torch.equal(found[step][number], each)
    assert capture.stats().captures == 2


def static(model):
    return transformers.StaticCache(config=model.config, max_cache_len=16)


@torch.no_grad()
def stepped(model, tokens, cache, steps=6):
    """Give the logits of each step. What a step was given is overwritten afterwards."""
    logits = model(tokens, **given(model, cache), use_cache=True).logits[:, -1]
    for step in range(steps):
        yield logits
        token = logits.argmax(-1, keepdim=True)
        places = torch.full((len(tokens), 1), tokens.shape[1] + step, device=tokens.device)
        out = model(token, **given(model, cache), position_ids=places, use_cache=True)
        assert returned(out) is cache
        token.fill_(0)
        places.fill_(0)
        logits = out.logits[:, -1]


def decoded(*args):
    return list(stepped(*args))


def test_a_step_returns_memory_of_its_own_and_reads_what_it_is_given(model, device, captures):
    expected = decoded(model, TOKENS.to(device), static(model))
    capture = capture_decode(model)
    found = decoded(model, TOKENS.to(device), static(model))  # all are held until the last step has run
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)
    assert (capture.stats().replayed, capture.stats().uncaptured) == (5, 1)


def test_a_cache_that_is_reset_is_used_again(model, device, captures):
    tokens, cache = TOKENS.to(device), static(model)
    expected = decoded(model, tokens + 5, static(model))
    capture = capture_decode(model)
    decoded(model, tokens, cache)
    cache.reset()
    for one, two in zip(decoded(model, tokens + 5, cache), expected, strict=True):
        assert torch.equal(one, two)
    assert capture.stats().captures == 1


def test_no_cache_is_kept_alive(model, device, captures):
    capture = capture_decode(model)
    cache = static(model)
    gone = weakref.ref(cache)
    decoded(model, TOKENS.to(device), cache)
    del cache
    gc.collect()
    assert gone() is None
    assert capture.stats().graphs == 1
    capture.release()
    assert capture.stats().graphs == 0


def test_as_many_graphs_are_kept_as_asked_for(model, device, captures):
    tokens = TOKENS.to(device)
    expected = decoded(model, tokens, static(model))
    capture = capture_decode(model, max_graphs=2)
    caches = [static(model) for _ in range(4)]
    for cache in [*caches, caches[0].__class__(config=model.config, max_cache_len=16)]:
        for one, two in zip(decoded(model, tokens, cache), expected, strict=True):
            assert torch.equal(one, two)
    assert capture.stats().graphs == 2
    assert capture.stats().captures == 5


WINDOWS = {
    "mistral, all layers": lambda: of("Mistral", sliding_window=8),
    "gemma3, every second layer": lambda: of("Gemma3", "{}TextConfig", sliding_window=8, sliding_window_pattern=2),
    "gpt-oss, experts too": lambda: of("GptOss", sliding_window=8, **MIXTURE),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_that_fills_up(name, device, captures):
    model, tokens = WINDOWS[name]().to(device).eval(), TOKENS.to(device)
    length = {"max_new_tokens": 20, "min_new_tokens": 20}
    expected = generated(model, tokens, **length)
    capture = capture_decode(model)
    assert_same(generated(model, tokens, **length), expected)
    stats = capture.stats()
    # One graph while it fills, and one when it is full: of each, the first step runs as before.
    assert (stats.captures, stats.uncaptured, stats.reasons) == (2, 2, ())
    assert stats.replayed == 20 - 1 - stats.uncaptured


def test_a_count_of_the_window_that_python_would_read_is_not_captured(device, captures, warned):
    model, tokens = of("Mistral", sliding_window=32).to(device).eval(), TOKENS.to(device)

    @torch.no_grad()
    def steps():
        cache = static(model)
        found = [model(tokens, **given(model, cache)).logits[:, -1:]]
        for _ in range(4):  # without position_ids, the model asks the cache
            found.append(model(found[-1].argmax(-1), **given(model, cache)).logits)
        return found

    expected = steps()
    capture = capture_decode(model)
    for one, two in zip(steps(), expected, strict=True):
        assert torch.equal(one, two)
    assert capture.stats().replayed == 0
    assert "asks its cache for get_seq_length() in Python" in warned()[0]


def test_transformers_does_not_compile_what_is_captured(model, captures):
    assert model.generation_config.disable_compile is None
    with capture_decode(model):
        assert model.generation_config.disable_compile is True
    assert model.generation_config.disable_compile is None
