"""The KV cache of a model is counted as large as the one that the model makes."""

import pytest
import torch
import transformers
from torch import nn

from bigload import init_empty_weights
from bigload.inspection import kv_cache
from bigload.inspection.kv_cache import kv_cache_bytes

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFIGS = {
    "heads that share keys": transformers.LlamaConfig(**SIZES),
    "heads of their own": transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4),
    "one head": transformers.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4),
    "a sliding window": transformers.MistralConfig(**SIZES, sliding_window=8),
    "some sliding windows": transformers.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=8),
    "experts": transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "many experts": transformers.Qwen3MoeConfig(**SIZES, **MIXTURE, num_experts=4, head_dim=8),
    "states": transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3),
    "an encoder": transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    ),
}


def model_of(config):
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    return auto.from_config(config).eval()


def made_by(model, context, batch):
    """Return the bytes of the cache that a model makes."""
    tokens = torch.zeros((batch, context), dtype=torch.int64)
    inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
    cache = out["cache"] if "cache" in out else out["past_key_values" if "past_key_values" in out else "cache_params"]
    return sum(map(kv_cache._nbytes, kv_cache._layers(cache)))


@pytest.mark.parametrize("kind", CONFIGS)
def test_cache_is_as_large_as_the_models_own(kind):
    with init_empty_weights():
        empty = model_of(CONFIGS[kind])
    torch.manual_seed(0)
    real = model_of(CONFIGS[kind])
    for context, batch in ((5, 1), (40, 3)):
        for dtype in (torch.float32, torch.bfloat16):
            layers = kv_cache_bytes(empty, context, batch, dtype)
            assert layers is not None
            assert sum(layers) == made_by(real.to(dtype), context, batch), (context, batch, dtype)


def test_model_is_as_it_was():
    with init_empty_weights():
        model = model_of(CONFIGS["experts"])
    before = {name: id(module) for name, module in model.named_modules()}
    dtypes = {tensor.dtype for tensor in model.parameters()}
    assert kv_cache_bytes(model, 8, 1, torch.bfloat16)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert {tensor.dtype for tensor in model.parameters()} == dtypes
    assert not any("forward" in vars(module) for module in model.modules())


def test_long_contexts_take_no_memory_and_no_loop_over_tokens(monkeypatch):
    with init_empty_weights():
        plain, states = model_of(CONFIGS["heads that share keys"]), model_of(CONFIGS["states"])
    assert sum(kv_cache_bytes(plain, 1_000_000, 8, torch.bfloat16)) == 3 * 2 * 2 * 8 * 2 * 8_000_000
    lengths = []
    run = kv_cache._cache
    monkeypatch.setattr(kv_cache, "_cache", lambda model, n, batch: lengths.append(n) or run(model, n, batch))
    assert kv_cache_bytes(states, 1_000_000, 1, torch.bfloat16) == kv_cache_bytes(states, 64, 1, torch.bfloat16)
    assert max(lengths) <= 32


def test_what_has_no_cache_or_cannot_be_run_is_not_counted():
    assert kv_cache_bytes(nn.Sequential(nn.Linear(4, 4)), 8, 1, torch.float32) is None
    with init_empty_weights():
        bert = transformers.BertModel(transformers.BertConfig(vocab_size=64, hidden_size=32, num_attention_heads=4))
    assert kv_cache_bytes(bert, 8, 1, torch.float32) is None


STATIC = [kind for kind in CONFIGS if kind not in ("states", "an encoder")]


@pytest.mark.parametrize("kind", STATIC)
def test_a_static_cache_is_as_large_as_the_one_of_generate(kind):
    with init_empty_weights():
        empty = model_of(CONFIGS[kind])
    torch.manual_seed(0)
    real = model_of(CONFIGS[kind])
    for context, batch, dtype in ((7, 1, torch.float32), (40, 3, torch.bfloat16)):
        out = real.to(dtype).generate(
            torch.ones(batch, 5, dtype=torch.int64),
            max_new_tokens=2,
            cache_implementation="static",
            max_cache_len=context,
            return_dict_in_generate=True,
            disable_compile=True,
        )
        cache = out["cache"] if "cache" in out else out["past_key_values"]
        held = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
        assert kv_cache.static_cache_bytes(empty, context, batch, dtype) == held


def test_a_window_of_a_static_cache_keeps_as_many_tokens_as_it_is_wide():
    with init_empty_weights():
        model = model_of(CONFIGS["some sliding windows"])
    layers = kv_cache.static_cache_bytes(model, 1_000_000, 1, torch.bfloat16)
    token = 2 * 2 * 8 * 2
    assert sorted(set(layers)) == [8 * token, 1_000_000 * token] or set(layers) == {8 * token}


@pytest.mark.parametrize("kind", ["states", "an encoder"])
def test_what_takes_no_static_cache_is_not_captured(kind):
    with init_empty_weights():
        assert kv_cache.static_cache_bytes(model_of(CONFIGS[kind]), 8, 1, torch.float32) is None


def test_a_captured_step_needs_more_where_heads_share_keys_and_for_more_tokens():
    with init_empty_weights():
        shared, own = (model_of(CONFIGS[f"heads {kind}"]) for kind in ("that share keys", "of their own"))
    few, many = (kv_cache.captured_step_bytes(shared, [size], 1, torch.bfloat16) for size in (0, 2**30))
    assert many - few == 3 * 2**30  # two repeated, one moved
    assert kv_cache.captured_step_bytes(own, [2**30], 1, torch.bfloat16) < many
    assert few < kv_cache.captured_step_bytes(shared, [0], 64, torch.bfloat16) < few + 2**20
