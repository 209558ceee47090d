"""What a checkpoint lacks: kept where the model has values, initialised where asked, otherwise an error."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice

import torch

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.foreign import foreign_error
from ..errors import CheckpointError, counted, listed
from ..model.initialization import initial_values
from ..model.quantizable import matches
from ..model.tensors import ModelTensor
from ..model.view import ModelView

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lack:
    """What a checkpoint lacks.

    Attributes:
        missing: the model's tensors that it does not hold.
        tensors: all of the model's.
        found: first names of the model's tensors that it holds.
        spare: its keys that have no place in the model.
        checkpoint: the checkpoint.
    """

    missing: Sequence[ModelTensor]
    tensors: Sequence[ModelTensor]
    found: Collection[str]
    spare: Sequence[str]
    checkpoint: Checkpoint


Absent = Callable[[Lack], dict[str, torch.Tensor]]


def never_absent(lack: Lack) -> dict[str, torch.Tensor]:
    """Refuse a checkpoint that lacks anything.

    Raises:
        CheckpointError: always; it lists all that is missing.
    """
    names = [tensor.name for tensor in lack.missing]
    foreign = foreign_error(lack.checkpoint, lack.spare)
    if foreign is not None:
        foreign.missing_keys = names
        raise foreign
    hints = list(islice(chain(_prefix_hint(names, lack.spare), _expert_hint(lack), _likely_ties(lack)), 3))
    hints = hints or [
        "is it the checkpoint of this model? If these are new, such as a head to be trained, name them in "
        "initialize_missing",
    ]
    raise CheckpointError(
        f"{counted(len(names), 'tensor')} of the model not found in '{lack.checkpoint.location}': "
        + "; ".join([listed(names, limit=100), hints[0]])
        + "".join(f". {hint}" if hint[0].isupper() else f"; {hint}" for hint in hints[1:]),
        missing_keys=names,
    )


def new_values(
    view: ModelView, initialize: Sequence[str], lack: Lack, *, strict: bool = False, is_executed: bool = True
) -> dict[str, torch.Tensor]:
    """Return the values of what a checkpoint lacks: the model's own if they are real, else initial ones where asked.

    Args:
        view: of the model.
        initialize: names of modules and parameters that may be initialised.
        lack: what is missing.
        strict: keep nothing.
        is_executed: whether the load will be; otherwise initial values are on meta.

    Raises:
        CheckpointError: a tensor is on meta and not named, or its class does not initialise it; or the checkpoint is
            probably of another model or has other names.
    """
    asked = [t for t in lack.missing if any(matches(name, initialize) for name in t.names)]
    names = {tensor.name for tensor in asked}
    rest = [tensor for tensor in lack.missing if tensor.name not in names]
    real = [tensor for tensor in rest if not tensor.value.is_meta]
    # Keys of another prefix, or nothing found at all: no new head, but a checkpoint of other names or another model.
    is_other = not lack.found or foreign_error(lack.checkpoint, lack.spare) is not None
    is_other = is_other or any(_expert_hint(lack)) or any(any(_prefix_hint([t.name], lack.spare)) for t in rest[:100])
    if rest and (len(real) < len(rest) or is_other or strict):
        never_absent(replace(lack, missing=rest))
    if real:
        ties = "; ".join(_likely_ties(replace(lack, missing=real)))
        logger.warning(
            "%s of the model not found in '%s': %s; they keep the values that they have and are not quantized: train "
            "them%s",
            counted(len(real), "tensor"),
            lack.checkpoint.location,
            listed((tensor.name for tensor in real), limit=100),
            ties and f"; {ties}",
        )
    unused = [name for name in initialize if not any(matches(n, [name]) for tensor in asked for n in tensor.names)]
    if unused:
        logger.warning("initialize_missing names %s, which the checkpoint does not lack", listed(unused))
    if not is_executed:
        return {tensor.name: tensor.value for tensor in lack.missing}
    return {tensor.name: tensor.value for tensor in real} | initial_values(view, asked)


def _prefix_hint(missing: Sequence[str], spare: Sequence[str]) -> Iterator[str]:
    """Suggest a `key_mapping` for a prefix that only the checkpoint's keys, or only the model's names, have."""
    name = missing[0]
    longer = next((key for key in spare if key.endswith(f".{name}")), None)
    if longer is not None:
        prefix = longer.removesuffix(name)
        yield f"the checkpoint has '{longer}': try key_mapping={{{'^' + re.escape(prefix)!r}: ''}}"
    shorter = next((key for key in spare if name.endswith(f".{key}") and "." in key), None)
    if shorter is not None:
        prefix = name.removesuffix(shorter)
        yield f"the checkpoint has '{shorter}': try key_mapping={{'^': {prefix!r}}}"


def _expert_hint(lack: Lack) -> Iterator[str]:
    """Say so if one side has experts one by one and the other has them in one tensor."""
    one_by_one = re.compile(r"(^|\.)experts\.\d+\.")
    fused = re.compile(r"(^|\.)experts\.[^.\d]\w*$")
    names = [tensor.name for tensor in lack.missing]
    for mine, theirs, how in (
        (fused, one_by_one, "each expert by itself, as transformers 4 does, but the model has all in one tensor"),
        (one_by_one, fused, "all experts in one tensor, but the model has each by itself"),
    ):
        if any(map(mine.search, names)) and (key := next(filter(theirs.search, lack.spare), None)):
            yield (
                f"the checkpoint stores {how} ('{key}'): build the model with the version of transformers that wrote "
                "the checkpoint, or load it with from_pretrained of the model's own version and save it again"
            )


def _likely_ties(lack: Lack) -> Iterator[str]:
    """Suggest ties of missing matrices to the only other matrix of their shape, as of a head to the embedding."""
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for tensor in lack.tensors:
        if tensor.is_parameter and tensor.name in lack.found:
            by_shape.setdefault(tensor.shape, []).append(tensor.name)
    for tensor in lack.missing:
        same = by_shape.get(tensor.shape, ())
        is_matrix = tensor.is_parameter and len(tensor.shape) == 2 and tensor.shape[0] != tensor.shape[1]
        if is_matrix and len(same) == 1:
            yield (
                f"'{tensor.name}' has the shape of '{same[0]}': if they are one weight, pass "
                f"tied_parameters=[('{same[0]}', '{tensor.name}')]"
            )


def buffer_values(
    buffers: Sequence[ModelTensor],
    class_dtypes: Mapping[str, torch.dtype],
    rebuilt_buffers: Callable[[], Mapping[str, torch.Tensor]],
    rebuilt_by_owners: Callable[[Sequence[ModelTensor]], Mapping[str, torch.Tensor]],
    seems_unwritten: Callable[[], bool],
) -> dict[str, torch.Tensor]:
    """Return new values of buffers that the checkpoint does not hold, where they are lost or seem to be.

    A buffer is lost on meta. After `to_empty()` it is real but without values; a sign of it is that nothing has written
    to the real parameters, not even the layers that initialise theirs.

    Args:
        buffers: those that the checkpoint does not hold.
        class_dtypes, rebuilt_buffers, rebuilt_by_owners, seems_unwritten: as for `sources_in_checkpoint`.

    Raises:
        CheckpointError: a buffer on meta cannot be made anew.
    """
    transient = [tensor for tensor in buffers if not tensor.persistent]
    lost = [t for t in transient if t.value.is_meta or class_dtypes.get(t.name, t.value.dtype) != t.value.dtype]
    doubtful = [t for t in buffers if t not in lost and not t.value.is_meta and t.value.numel()]
    if doubtful and not seems_unwritten():
        doubtful = []
    if not lost and not doubtful:
        return {}
    made = dict(rebuilt_buffers())
    unknown = [t for t in (*lost, *doubtful) if t.name not in made]
    made |= rebuilt_by_owners(unknown) if unknown else {}
    gone = [tensor.name for tensor in lost if tensor.name not in made]
    if gone:
        raise CheckpointError(
            f"non-persistent buffers are on meta and in no checkpoint: {listed(gone)}; build the model under "
            "bigload.init_empty_weights(), which leaves buffers real",
            missing_keys=gone,
        )
    different = [t for t in doubtful if t.name in made and not _is_same(t.value, made[t.name])]
    if different:
        logger.warning(
            "buffers that are in no checkpoint differ from what their classes compute, as after to_empty(), and were "
            "computed again: %s; if you changed them yourself, do so after the load",
            listed(tensor.name for tensor in different),
        )
    unsure = [t.name for t in doubtful if t.name not in made and not t.value._version]
    if unsure:
        logger.warning(
            "buffers that are in no checkpoint keep the values that they have: %s; after to_empty() these are "
            "arbitrary: then build the model under bigload.init_empty_weights(), which leaves buffers real",
            listed(unsure),
        )
    return {tensor.name: made[tensor.name] for tensor in (*lost, *different)}


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.cpu(), other.to(one.dtype))


def require_whole_series(series: Mapping[str, tuple[Iterable[str], int]]) -> None:
    """Check that no tensor is missing among some that differ by a number, such as the experts of one layer.

    Args:
        series: name in the model -> the names of the stored tensors that it is made of, such as "experts.3.w1.weight",
            and how many there should be of each kind, from 0 on; 0 for as many as there are of any.

    Raises:
        CheckpointError: some are missing; names them.
    """
    lacking = {name: target for target, (names, count) in series.items() for name in _lacking(names, count)}
    if lacking:
        raise CheckpointError(
            f"{listed(lacking)}: not in the checkpoint, which has only others of the series that "
            f"{listed(dict.fromkeys(lacking.values()))} is made of",
            missing_keys=list(lacking),
        )


def _lacking(names: Iterable[str], count: int) -> list[str]:
    series: dict[tuple[str, str], set[int]] = {}
    for name in names:
        parts = name.split(".")
        at = max((place for place, part in enumerate(parts) if part.isdigit()), default=None)
        if at is not None:
            kind = ".".join(parts[:at]), ".".join(parts[at + 1 :])
            series.setdefault(kind, set()).add(int(parts[at]))
    count = count or 1 + max((max(numbers) for numbers in series.values()), default=-1)
    return [
        f"{before}.{number}.{after}"
        for (before, after), numbers in series.items()
        for number in range(count)
        if number not in numbers
    ]
