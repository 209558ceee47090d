"""Warns if a mode leaves most of a model unquantized although nobody asked for that."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..config import BnbQuantizationConfig
from ..model import transformers_facts
from ..model.quantizable import meant_to_stay, one_of
from ..model.quantizable_experts import ChosenExperts
from ..model.tensors import ModelTensor
from ..model.view import ModelView
from ..notation import show

logger = logging.getLogger(__name__)

# The warning names at most _NAMED classes, each with at least _SHARE of the unquantized elements.
_NAMED, _SHARE = 4, 0.01
_ADVICE = (
    "bigload quantizes nn.Linear, subclasses that compute the same or are named in quantizable=(...), and in 4 bit the "
    "experts of transformers' classes and those named in experts_modules; name modules to leave in skip_modules"
)


def warn_of_leftover(
    view: ModelView,
    config: BnbQuantizationConfig,
    tensors: Sequence[ModelTensor],
    layers: Mapping[str, nn.Module],
    read: Mapping[str, str],
    experts: ChosenExperts,
    advice: str = _ADVICE,
) -> None:
    """Warn if less than half of a model's weights are quantized, and name the classes that hold the rest.

    Embeddings, the output head, and modules that the config or the model's class skips or keeps in fp32 do not count.

    Args:
        view: of the model.
        config: with every "auto" resolved.
        tensors: of the model, from `tensors_of`.
        layers: the layers to quantize, by path.
        read: the layers that stay plain because other code reads their weight, each with what it reads.
        experts: the fused experts, those that are quantized and those that are not.
        advice: what is quantized, and what to do.
    """
    if "*" in (config.skip_modules or ()):
        return  # nothing is to be quantized
    taken = {f"{path}.weight".lstrip(".") for path in layers} | experts.weights.keys()
    weights = [t for t in tensors if t.is_parameter and t.value.dim() > 1 and t.value.is_floating_point()]
    left = [tensor for tensor in weights if taken.isdisjoint(tensor.names)]
    plain = _elements(left)
    quantized = _elements(weights) - plain
    if plain <= quantized:
        return  # the usual case
    left = _not_meant_to_stay(view, config, left)
    plain = _elements(left)
    if plain <= quantized:
        return
    dtype = config.load_dtype
    amount = f"of {_size(plain + quantized, dtype)} only {_size(quantized, dtype)} are quantized"
    logger.warning(
        "%s was asked for, but %s; left in %s, beside embeddings and the head: %s. %s",
        config.mode,
        amount if quantized else "nothing is quantized",
        str(dtype).removeprefix("torch."),
        _by_class(view, left, dtype, read, experts.plain),
        advice,
    )


def _not_meant_to_stay(
    view: ModelView, config: BnbQuantizationConfig, tensors: Sequence[ModelTensor]
) -> list[ModelTensor]:
    heads, patterns = meant_to_stay(view, config)
    stays = one_of(patterns).search

    def is_meant(name: str) -> bool:
        owner = view.owner(name)
        return owner in heads or isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) or stays(name) is not None

    return [tensor for tensor in tensors if not any(map(is_meant, tensor.names))]


def _by_class(
    view: ModelView,
    tensors: Sequence[ModelTensor],
    dtype: torch.dtype,
    read: Mapping[str, str],
    experts: Mapping[str, str],
) -> str:
    """Describe the classes that hold some weights, largest share first, with why each is not quantized."""
    groups: dict[tuple[str, str], list[ModelTensor]] = {}
    for tensor in tensors:
        owner = view.owner(tensor.name)
        path = view.first_paths[owner]
        reason = experts.get(path) if tensor.value.dim() == 3 else None
        reason = reason or _reason(owner, tensor, read.get(path))
        groups.setdefault((type(owner).__name__, reason), []).append(tensor)
    shares = sorted(groups.items(), key=lambda group: -_elements(group[1]))
    least = _SHARE * _elements(tensors)
    named = [group for group in shares[:_NAMED] if _elements(group[1]) >= least]
    shown = []
    for (name, reason), held in named:
        owners = {tensor.name.rpartition(".")[0] for tensor in held}
        shown.append(f"{_size(_elements(held), dtype)} in {len(owners)} {name} ({reason})")
    others = _elements(tensors) - sum(_elements(held) for _, held in named)
    return ", ".join([*shown, f"{_size(others, dtype)} in others"] if others >= least else shown)


def _reason(owner: nn.Module, tensor: ModelTensor, read: str | None) -> str:
    if not (isinstance(owner, nn.Linear) or transformers_facts.is_conv1d(owner)):
        return "no nn.Linear"
    if read is not None:
        return {"values": "their owner reads their weight", "cast": "other code casts their weight"}.get(
            read, f"other code reads the {read} of their weight"
        )
    if len(tensor.names) > 1:
        return "tied"
    if type(owner) is nn.Linear or transformers_facts.is_conv1d(owner):
        return "changed after they were made"
    return "do not do just what nn.Linear does"


def _elements(tensors: Sequence[ModelTensor]) -> int:
    return sum(tensor.value.numel() for tensor in tensors)


def _size(elements: int, dtype: torch.dtype) -> str:
    return show(elements * dtype.itemsize)
