"""Names in the checkpoint -> where each tensor of the model gets its values from."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from .checkpoint import Checkpoint, StoredTensor
from .errors import CheckpointError, ConfigError, listed
from .modules import ModelTensor

logger = logging.getLogger(__name__)

KeyMapping = Mapping[str, str] | Callable[[str], str]
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Source:
    """What one region of a parameter is filled from.

    Attributes:
        tensor: a tensor of the checkpoint, or a real one that the model holds already.
        region: the part of the parameter that it fills; () is all of it.
        transposed: its last two dimensions are swapped in the parameter.
    """

    tensor: StoredTensor | torch.Tensor
    region: tuple[slice | int, ...] = ()
    transposed: bool = False


def sources_in_checkpoint(
    tensors: Sequence[ModelTensor],
    checkpoint: Checkpoint,
    *,
    key_mapping: KeyMapping | None = None,
    ignores_key: Callable[[str], bool] = lambda key: False,
    strict: bool = False,
) -> dict[str, Source]:
    """Find the source of every tensor of the model, under any of its names.

    Args:
        tensors: what the model needs.
        checkpoint: what there is.
        key_mapping: renames checkpoint keys: {regex: replacement}, each applied in turn, or a function.
        ignores_key: keys that may be left over without a word.
        strict: make any other leftover key an error instead of a warning.

    Returns:
        Source by the tensor's first name; real buffers without one are left out.

    Raises:
        CheckpointError: parameters or meta buffers without a source, wrong shapes, stored integers where floats
            belong, or leftover keys under `strict`; each kind lists all of its cases.
        ConfigError: two checkpoint keys are renamed to one, or a pattern is not a regular expression.
    """
    stored = _renamed(checkpoint, key_mapping)
    found = {
        tensor.name: next((stored[name] for name in tensor.names if name in stored), None)
        for tensor in tensors
        if tensor.persistent
    }
    _require_sources(tensors, found, checkpoint)
    _require_fit(tensors, found)
    places = {name for tensor in tensors for name in tensor.names}
    unexpected = [key for key in stored if key not in places and not ignores_key(key)]
    if unexpected:
        message = (
            f"{len(unexpected)} tensors of '{checkpoint.location}' have no place in the model: {listed(unexpected)}"
        )
        if strict:
            raise CheckpointError(f"{message}; strict=True allows none", unexpected_keys=unexpected)
        logger.warning("%s", message)
    return {name: Source(tensor) for name, tensor in found.items() if tensor is not None}


def _renamed(checkpoint: Checkpoint, key_mapping: KeyMapping | None) -> dict[str, StoredTensor]:
    rename = _as_function(key_mapping)
    stored: dict[str, StoredTensor] = {}
    for key, tensor in checkpoint.tensors.items():
        name = rename(key)
        if name in stored:
            raise ConfigError(f"key_mapping renames both {stored[name].name!r} and {key!r} to {name!r}")
        stored[name] = tensor
    return stored


def _as_function(key_mapping: KeyMapping | None) -> Callable[[str], str]:
    if key_mapping is None:
        return lambda key: key
    if callable(key_mapping):
        return key_mapping
    if not isinstance(key_mapping, Mapping):
        raise ConfigError(f"key_mapping must be {{regex: replacement}} or a function, but it is {key_mapping!r}")
    rules = key_mapping.items()

    def rename(key: str) -> str:
        for pattern, replacement in rules:
            try:
                key = re.sub(pattern, replacement, key)
            except (re.error, IndexError, TypeError) as error:
                raise ConfigError(
                    f"key_mapping holds {pattern!r}: {replacement!r}, which re.sub does not take: {error}"
                ) from error
        return key

    return rename


def _require_sources(
    tensors: Sequence[ModelTensor], found: Mapping[str, StoredTensor | None], checkpoint: Checkpoint
) -> None:
    missing = [t for t in tensors if t.persistent and found[t.name] is None and (t.is_parameter or t.value.is_meta)]
    if missing:
        names = [tensor.name for tensor in missing]
        hints = islice(_likely_ties(missing, tensors, found), 3)
        raise CheckpointError(
            f"{len(names)} tensors of the model have no source in '{checkpoint.location}': {listed(names, limit=100)}"
            + "".join(f"; {hint}" for hint in hints),
            missing_keys=names,
        )
    empty = [t.name for t in tensors if not t.persistent and t.value.is_meta]
    if empty:
        raise CheckpointError(
            f"non-persistent buffers are on meta and in no checkpoint: {listed(empty)}; build the model under "
            "bigload.init_empty_weights(), which leaves buffers real",
            missing_keys=empty,
        )


def _likely_ties(
    missing: Sequence[ModelTensor], tensors: Sequence[ModelTensor], found: Mapping[str, StoredTensor | None]
) -> Iterator[str]:
    """Name matrices that missing ones are probably tied to: the only other of that shape, as embedding and head are."""
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for tensor in tensors:
        if tensor.is_parameter and found.get(tensor.name) is not None:
            by_shape.setdefault(tensor.shape, []).append(tensor.name)
    for tensor in missing:
        same = by_shape.get(tensor.shape, ())
        is_matrix = tensor.is_parameter and len(tensor.shape) == 2 and tensor.shape[0] != tensor.shape[1]
        if is_matrix and len(same) == 1:
            yield (
                f"'{tensor.name}' has the shape of '{same[0]}': if they are one weight, pass "
                f"tied_parameters=[('{same[0]}', '{tensor.name}')]"
            )


def _require_fit(tensors: Sequence[ModelTensor], found: Mapping[str, StoredTensor | None]) -> None:
    pairs = [(tensor, found.get(tensor.name)) for tensor in tensors]
    wrong = {t.name: (s.shape, t.shape, s) for t, s in pairs if s is not None and s.shape != t.shape}
    if wrong:
        cases = [
            f"'{name}' has shape {stored} in '{tensor.file.name}', the model expects {expected}"
            for name, (stored, expected, tensor) in wrong.items()
        ]
        shown = "; ".join(cases[:10]) + (f"; and {len(cases) - 10} more" if len(cases) > 10 else "")
        raise CheckpointError(
            f"{shown}: build the model from this checkpoint's config",
            mismatched_shapes={name: (stored, expected) for name, (stored, expected, _) in wrong.items()},
        )
    packed = [s for t, s in pairs if s is not None and t.value.is_floating_point() and s.dtype not in _FLOATS]
    if packed:
        verb = "is" if len(packed) == 1 else "are"
        raise CheckpointError(
            f"{listed(s.name for s in packed)} {verb} stored as {packed[0].dtype} in '{packed[0].file.name}', the "
            "model expects a 16 to 64 bit floating dtype: this version does not read quantized checkpoints; "
            "give the original one"
        )
