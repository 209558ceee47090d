"""Maps checkpoint keys to model tensors: finds the stored tensors that each model tensor is filled from."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Protocol

import torch

from ..checkpoint.bitsandbytes import QuantizedTensor
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.foreign import foreign_error
from ..checkpoint.merged import merge_quantized, not_joined
from ..checkpoint.scaled.tensor import ScaledTensor
from ..errors import CheckpointError, ConfigError, counted, listed
from ..hardware.interrupts import interruptible
from ..io.tensors import LazyTensor, StoredTensor, read_bytes, read_whole
from ..model.tensors import ModelTensor
from ..model.transformers_facts import KeyConversion
from .missing import Absent, Lack, buffer_values, never_absent, require_whole_series
from .tracing import TracedTensor

logger = logging.getLogger(__name__)

KeyMapping = Mapping[str, str] | Callable[[str], str]
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Source:
    """The source of one region of a parameter.

    Attributes:
        tensor: a tensor of the checkpoint, or one of the model's own.
        region: index of the region in the parameter; () is all of it.
        transposed: whether the last two dimensions are swapped in the parameter.
    """

    tensor: StoredTensor | torch.Tensor
    region: tuple[slice | int, ...] = ()
    transposed: bool = False

    def transpose(self) -> Source:
        """Return the source of the transposed parameter."""
        return replace(self, region=(*self.region[:-2], *self.region[:-3:-1]), transposed=not self.transposed)


@dataclass(frozen=True)
class Found:
    """The sources in the checkpoint for one name of the model.

    Attributes:
        sources: the pieces.
        shape: of the whole.
        first: a stored tensor that stands for them in messages.
    """

    sources: tuple[Source, ...]
    shape: tuple[int, ...]
    first: StoredTensor


class Rules(Protocol):
    """What the modules say about their own loading.

    Attributes:
        excused: names of tensors that the checkpoint need not hold.
    """

    excused: set[str]

    def apply(self, stored: Mapping[str, Found]) -> dict[str, Found]:
        """Return where each tensor of the model is loaded from, by its name."""

    def fitted(self, tensors: Sequence[ModelTensor]) -> Sequence[ModelTensor]:
        """Return the model's tensors in the shapes that the modules' own loading gives them."""

    def review(self, missing: list[str], unexpected: list[str]) -> None:
        """Take away the keys that may be missing or unexpected."""


def sources_in_checkpoint(
    tensors: Sequence[ModelTensor],
    checkpoint: Checkpoint,
    *,
    key_mapping: KeyMapping | None = None,
    conversion: KeyConversion | None = None,
    ignores_key: Callable[[str], bool] = lambda key: False,
    class_dtypes: Mapping[str, torch.dtype] | None = None,
    rebuilt_buffers: Callable[[], Mapping[str, torch.Tensor]] = dict,
    rebuilt_by_owners: Callable[[Sequence[ModelTensor]], Mapping[str, torch.Tensor]] = lambda buffers: {},
    seems_unwritten: Callable[[], bool] = lambda: False,
    rules: Rules | None = None,
    absent: Absent = never_absent,
    strict: bool = False,
) -> dict[str, tuple[Source, ...]]:
    """Find the sources of every tensor of the model, under any of its names.

    Args:
        tensors: of the model.
        checkpoint: where to look for them.
        key_mapping: renames checkpoint keys: {regex: replacement}, each applied in turn, or a function.
        conversion: transformers' own rules, applied after `key_mapping`.
        ignores_key: whether a key may be unused without a warning.
        class_dtypes: the dtype in which the model's class builds each tensor, where known.
        rebuilt_buffers: returns the buffers that are in no checkpoint, from a model that is built anew; called only if
            one of them is on meta, or of another dtype than its class makes, or if `seems_unwritten`.
        rebuilt_by_owners: returns those of some buffers that the modules which hold them can make anew.
        seems_unwritten: whether the model's tensors look as after `to_empty()`.
        rules: what the modules say about their own loading, applied after `conversion`.
        absent: given the tensors that the checkpoint lacks, and what is known of it, returns the values that they get
            instead, or raises.
        strict: raise for other unused keys instead of warning.

    Returns:
        Sources by each tensor's first name, without real buffers that the checkpoint does not hold.

    Raises:
        CheckpointError: parameters or meta buffers without a source (unless `absent` gives them values), wrong shapes,
            stored integers where floats are expected, or unused keys under `strict`; lists all cases of the first kind
            found.
        ConfigError: two checkpoint keys are renamed to one, or a pattern is not a regular expression.
    """
    stored = _by_model_name(_renamed(checkpoint, key_mapping), conversion)
    if rules is not None:
        stored = rules.apply(stored)
        tensors = rules.fitted(tensors)
    found = {
        tensor.name: next((stored[name] for name in tensor.names if name in stored), None)
        for tensor in interruptible(tensors)
        if tensor.persistent
    }
    places = {name for tensor in tensors for name in tensor.names}
    unexpected = [key for key in stored if key not in places and not ignores_key(key)]
    missing = [t for t in tensors if t.persistent and found[t.name] is None and (t.is_parameter or t.value.is_meta)]
    kept = _kept(missing, unexpected, rules)
    lacking = [tensor for tensor in missing if tensor.name not in kept]
    if lacking:
        spare = [key for key in stored if key not in places]
        kept |= absent(Lack(lacking, tensors, {n for n, each in found.items() if each is not None}, spare, checkpoint))
    _require_fit(tensors, found, lambda: foreign_error(checkpoint, unexpected))
    _warn_of_split_ties(tensors, stored)
    own = {t.name: stored[t.name].sources for t in tensors if not t.persistent and t.name in stored and rules}
    absent_buffers = [t for t in tensors if not t.is_parameter and t.name not in own and found.get(t.name) is None]
    kept |= buffer_values(absent_buffers, class_dtypes or {}, rebuilt_buffers, rebuilt_by_owners, seems_unwritten)
    if unexpected:
        message = (
            f"{counted(len(unexpected), 'tensor')} of '{checkpoint.location}' without a place in the model: "
            f"{listed(unexpected)}"
        )
        if strict:
            raise CheckpointError(f"{message}; strict=True allows none", unexpected_keys=unexpected)
        logger.warning("%s", message)
    in_memory = {name: (Source(value),) for name, value in kept.items()}
    return {**{name: each.sources for name, each in found.items() if each is not None}, **in_memory, **own}


def _kept(missing: Sequence[ModelTensor], unexpected: list[str], rules: Rules | None) -> dict[str, torch.Tensor]:
    """Return what modules with rules of their own keep; takes what they allow from `unexpected`."""
    if rules is None:
        return {}
    names = [tensor.name for tensor in missing]
    rules.review(names, unexpected)
    allowed = rules.excused | {tensor.name for tensor in missing} - set(names)
    return {t.name: t.value for t in missing if not t.value.is_meta and not allowed.isdisjoint(t.names)}


def _renamed(checkpoint: Checkpoint, key_mapping: KeyMapping | None) -> dict[str, StoredTensor]:
    rename = _as_function(key_mapping)
    stored: dict[str, StoredTensor] = {}
    for key, tensor in interruptible(checkpoint.tensors.items()):
        name = rename(key)
        if name in stored:
            raise ConfigError(f"key_mapping renames both {stored[name].name!r} and {key!r} to {name!r}")
        stored[name] = tensor
    return stored


def _by_model_name(stored: Mapping[str, StoredTensor], conversion: KeyConversion | None) -> dict[str, Found]:
    found: dict[str, Found] = {}
    groups: dict[str, dict[str, list[StoredTensor]]] = {}
    # Numeric order, with layers.10 after layers.9: merged tensors are stacked in that order.
    conversion = conversion and conversion.among(stored)
    rank = cache(_rank)  # names repeat their parts
    keys = sorted(stored, key=lambda key: [*map(rank, key.split("."))]) if conversion else stored
    for key in interruptible(keys):
        name, pattern = conversion.target(key) if conversion else (key, None)
        if pattern is None:
            found.setdefault(name, _whole(stored[key]))
        else:
            groups.setdefault(name, {}).setdefault(pattern, []).append(stored[key])
    for name, group in groups.items():
        assert conversion is not None
        found.update(_combined(name, group, conversion))
    return found


def _whole(stored: StoredTensor) -> Found:
    if not isinstance(stored, ScaledTensor) or not stored.is_turned:
        return Found((Source(stored),), stored.shape, stored)
    return Found((Source(stored, transposed=True),), _turned(stored.shape), stored)


def _rank(part: str) -> tuple[int, int, str]:
    return (0, int(part), "") if part.isdigit() else (1, 0, part)


def _combined(target: str, group: Mapping[str, Sequence[StoredTensor]], conversion: KeyConversion) -> dict[str, Found]:
    """Return the sources of combined tensors: regions if transformers only rearranges them, else a computation."""
    stored = {tensor.name: tensor for tensors in group.values() for tensor in tensors}
    first = next(iter(stored.values()))
    stand_ins = {pattern: [TracedTensor.whole(t.name, t.shape) for t in tensors] for pattern, tensors in group.items()}
    try:
        made = conversion.convert(target, stand_ins)
    except Exception:  # not only NotTraceable: operations that fail on stand-ins may work on tensors
        return _computed(target, group, conversion)
    if any(isinstance(tensor, QuantizedTensor) for tensor in stored.values()):
        joined = [
            merge_quantized(
                name,
                tuple(traced.shape),
                [(stored[piece.name], piece.region, piece.transposed) for piece in traced.pieces],
            )
            for name, traced in made.items()
        ]
        return {name: Found((Source(whole),), whole.shape, whole) for name, whole in zip(made, joined, strict=True)}
    return {
        name: Found(
            tuple(Source(stored[piece.name], piece.region, piece.transposed) for piece in traced.pieces),
            tuple(traced.shape),
            first,
        )
        for name, traced in made.items()
    }


def _computed(target: str, group: Mapping[str, Sequence[StoredTensor]], conversion: KeyConversion) -> dict[str, Found]:
    first = next(iter(group.values()))[0]
    packed = [tensor for tensors in group.values() for tensor in tensors if isinstance(tensor, QuantizedTensor)]
    if packed:
        require_whole_series({target: ([tensor.name for tensors in group.values() for tensor in tensors], 0)})
        raise not_joined(packed[0].name, target)
    empty = {
        pattern: [torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in tensors]
        for pattern, tensors in group.items()
    }
    try:
        shapes = conversion.convert(target, empty)
    except Exception as error:  # any error that torch or transformers raises for tensors that do not fit together
        names = [tensor.name for tensors in group.values() for tensor in tensors]
        require_whole_series({target: (names, 0)})
        raise CheckpointError(
            f"{listed(names)} cannot be combined into '{target}' as transformers does: {error}; the checkpoint lacks a "
            "part, or is of another model"
        ) from error

    def load(name: str) -> torch.Tensor:
        values = {pattern: [read_whole(tensor) for tensor in tensors] for pattern, tensors in group.items()}
        result: torch.Tensor = conversion.convert(target, values)[name]
        return result

    return {
        name: Found(
            (
                Source(
                    LazyTensor(
                        name, first.file, made.dtype, tuple(made.shape), first.offset, made.nbytes, partial(load, name)
                    )
                ),
            ),
            tuple(made.shape),
            first,
        )
        for name, made in shapes.items()
    }


def _as_function(key_mapping: KeyMapping | None) -> Callable[[str], str]:
    if key_mapping is None:
        return lambda key: key
    if callable(key_mapping):
        return partial(_renamed_by, key_mapping)
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


def _renamed_by(function: Callable[[str], str], key: str) -> str:
    name = function(key)
    if not isinstance(name, str):
        raise ConfigError(f"key_mapping must return a name for every key, but it returns {name!r} for {key!r}")
    return name


def _warn_of_split_ties(tensors: Sequence[ModelTensor], stored: Mapping[str, Found]) -> None:
    """Warn if a tied weight is stored under several names with different values; the first one is used."""
    for tensor in (tensor for tensor in tensors if len(tensor.names) > 1):
        twins = [stored[name].first for name in tensor.names if name in stored]
        if len(twins) > 1 and any(_differ(twin, twins[0]) for twin in twins[1:]):
            logger.warning(
                "%s are one weight in the model, but stored with different values; '%s' is taken: build the model "
                "without the tie if they are two weights",
                listed(tensor.names),
                twins[0].name,
            )


def _differ(one: StoredTensor, other: StoredTensor) -> bool:
    same_place = (one.file, one.offset) == (other.file, other.offset)
    return not same_place and one.dtype == other.dtype and _ends(one) != _ends(other)


def _ends(tensor: StoredTensor, nbytes: int = 65536) -> tuple[bytes, ...]:
    """Read the first and last bytes of a tensor: in practice they differ wherever two weights do."""
    if isinstance(tensor, QuantizedTensor):
        return _ends(tensor.parts["weight"], nbytes)
    if isinstance(tensor, ScaledTensor):
        return *_ends(tensor.numbers, nbytes), *_ends(tensor.scales, nbytes)
    if isinstance(tensor, LazyTensor):
        raw = tensor.load().detach().contiguous().view(-1).view(torch.uint8)
        return raw[:nbytes].numpy().tobytes(), raw[-nbytes:].numpy().tobytes()
    count = min(nbytes, tensor.nbytes)
    last = tensor.offset + tensor.nbytes - count
    return bytes(read_bytes(tensor.file, tensor.offset, count)), bytes(read_bytes(tensor.file, last, count))


def _require_fit(
    tensors: Sequence[ModelTensor], found: Mapping[str, Found | None], foreign: Callable[[], CheckpointError | None]
) -> None:
    pairs = [(tensor, each) for tensor in interruptible(tensors) if (each := found.get(tensor.name)) is not None]
    # A Conv1D weight, or experts, (in, out) in the model, are stored quantized as (out, in). Whether it is one is
    # checked later.
    unequal = [(t, each) for t, each in interruptible(pairs) if each.shape != t.value.shape]
    fits = {t.name for t, each in unequal if isinstance(each.first, QuantizedTensor) and each.shape == _turned(t.shape)}
    wrong = {t.name: (each.shape, t.shape, each.first) for t, each in unequal if t.name not in fits}
    if wrong:
        _raise(foreign())
        require_whole_series(
            {
                t.name: (
                    [piece.tensor.name for piece in each.sources if isinstance(piece.tensor, StoredTensor)],
                    t.shape[0],
                )
                for t, each in unequal
                if t.name in wrong
                and len(each.sources) > 1
                and each.shape[1:] == t.shape[1:]
                and each.shape[0] < t.shape[0]
            }
        )
        cases = [
            f"'{name}' has shape {stored} in '{tensor.file.name}', the model expects {expected}"
            for name, (stored, expected, tensor) in wrong.items()
        ]
        shown = "; ".join(cases[:10]) + (f"; and {len(cases) - 10} more" if len(cases) > 10 else "")
        raise CheckpointError(
            f"{shown}: build the model from this checkpoint's config",
            mismatched_shapes={name: (stored, expected) for name, (stored, expected, _) in wrong.items()},
        )
    rounded = [t.name for t, each in pairs if not t.value.is_floating_point() and each.first.dtype.is_floating_point]
    if rounded:
        raise CheckpointError(f"{listed(rounded)}: stored as floating numbers, where the model has integers")
    packed = [each.first for t, each in pairs if t.value.is_floating_point() and each.first.dtype not in _FLOATS]
    packed = [stored for stored in packed if not isinstance(stored, QuantizedTensor)]
    if packed:
        _raise(foreign())
        verb = "is" if len(packed) == 1 else "are"
        raise CheckpointError(
            f"{listed(s.name for s in packed)} {verb} stored as {packed[0].dtype} in '{packed[0].file.name}', the "
            "model expects a 16 to 64 bit floating dtype, or weights that bitsandbytes quantized, with their scales; "
            "use the original checkpoint"
        )


def _turned(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], *shape[:-3:-1])


def _raise(error: CheckpointError | None) -> None:
    if error is not None:
        raise error
