"""How much the keys and values of the tokens take, found by running a model on meta, where nothing takes memory.

A static cache, which captured decode steps need, has room for all tokens from the beginning.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

# What cuBLAS and PyTorch's allocator take for the stream that captures, whatever the model.
_GRAPH_BYTES = 64 * 2**20
# Tokens of the first runs: a layer that keeps a state, as Mamba's, computes them one after the other.
_FEW = 16


def kv_cache_bytes(model: nn.Module, context: int, batch: int, dtype: torch.dtype) -> list[int] | None:
    """Return the bytes of each layer's cache after some tokens; sliding windows and other limits count.

    Args:
        model: of transformers, that generates; not changed.
        context: tokens of each sequence.
        batch: sequences.
        dtype: that it computes in.

    Returns:
        One number for each layer; None if the model keeps no cache, or cannot be run on meta.
    """
    try:
        copied = _on_meta(model, dtype)
        few = _cache(copied, min(context, _FEW), batch)
        if context <= _FEW:
            layers = list(map(_nbytes, few))
        elif all(hasattr(layer, "keys") for layer in few):
            layers = list(map(_nbytes, _cache(copied, context, batch)))
        else:  # a state stays as it is, and what grows is taken to grow with each token
            pairs = zip(map(_nbytes, few), map(_nbytes, _cache(copied, 2 * _FEW, batch)), strict=True)
            layers = [first + (second - first) * (context - _FEW) // _FEW for first, second in pairs]
    except Exception:  # a model's code may do anything with values, and there are none
        return None
    return layers if any(layers) else None


def static_cache_bytes(model: nn.Module, context: int, batch: int, dtype: torch.dtype) -> list[int] | None:
    """Return the bytes of each layer of a static cache, as `generate(cache_implementation="static")` makes it.

    A layer with a sliding window keeps no more tokens than that.

    Args:
        model: of transformers; not changed.
        context: tokens of each sequence.
        batch: sequences.
        dtype: that it computes in.

    Returns:
        One number for each layer; None if the model takes no static cache, or cannot be run on meta.
    """
    if not getattr(model, "_can_compile_fullgraph", False) or getattr(model.config, "is_encoder_decoder", False):
        return None  # which transformers asks of models with such caches
    try:
        copied = _on_meta(model, dtype)
        cache = sys.modules["transformers"].StaticCache(config=copied.config, max_cache_len=context)
        name = "cache" if "cache" in inspect.signature(type(copied).forward).parameters else "past_key_values"
        few = min(context, _FEW)
        with torch.no_grad(), torch.device("meta"):
            copied(torch.zeros((batch, few), dtype=torch.int64), use_cache=True, **{name: cache})
        layers = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    except Exception:  # as above
        return None
    return layers if any(layers) else None


def captured_step_bytes(model: nn.Module, layers: Sequence[int], batch: int, dtype: torch.dtype) -> int:
    """Return the bytes that the graphs of captured decode steps need beside the cache: one step's activations.

    Args:
        model: of transformers.
        layers: the bytes of each layer of the static cache.
        batch: sequences.
        dtype: that it computes in.
    """
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(config, "num_attention_heads", None) or 1
    shared = heads // (getattr(config, "num_key_value_heads", None) or heads)
    # Keys and values are repeated for the heads that share them; a full window is moved on by way of a copy.
    attention = max(layers) * (shared + 1)
    widths = [getattr(config, name, None) or 0 for name in ("vocab_size", "intermediate_size", "hidden_size")]
    return _GRAPH_BYTES + attention + 4 * batch * sum(widths) * dtype.itemsize


def _on_meta(model: nn.Module, dtype: torch.dtype) -> Any:
    copied: Any = copy.deepcopy(model).to("meta", dtype).eval()
    for module in list(copied.modules()):
        if any(parameter.dim() == 3 for parameter in module._parameters.values() if parameter is not None):
            module.forward = _as_shaped  # which experts compute depends on values, of which there are none here
    return copied


def _cache(model: Any, context: int, batch: int) -> list[Any]:
    tokens = torch.zeros((batch, context), dtype=torch.int64, device="meta")
    inputs = {"input_ids": tokens}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens
    with torch.no_grad(), torch.device("meta"):
        out = model(**inputs, use_cache=True)
        named = "cache" if "cache" in out else "past_key_values"  # by version; the other name warns
        return _layers(out[named])


def _nbytes(layer: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(layer))


def _as_shaped(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.empty_like(hidden)


def _layers(cache: Any) -> list[Any]:
    if hasattr(cache, "self_attention_cache"):  # of an encoder and a decoder
        return list(zip(_layers(cache.self_attention_cache), _layers(cache.cross_attention_cache), strict=False))
    return list(getattr(cache, "layers", cache) or ())


def _tensors(held: Any) -> Iterator[torch.Tensor]:
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, (list, tuple)):
        for each in held:
            yield from _tensors(each)
    elif isinstance(held, dict):
        yield from _tensors(list(held.values()))
    elif hasattr(held, "__dict__"):
        yield from _tensors(list(vars(held).values()))
