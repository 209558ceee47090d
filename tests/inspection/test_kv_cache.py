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
