"""How much the keys and values of the tokens take, found by running a model on meta, where nothing takes memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

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
        copied: Any = copy.deepcopy(model).to("meta", dtype).eval()
        for module in list(copied.modules()):
            if any(parameter.dim() == 3 for parameter in module._parameters.values() if parameter is not None):
                module.forward = _as_shaped  # which experts compute depends on values, of which there are none here
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
