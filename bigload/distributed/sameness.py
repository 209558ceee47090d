"""Whether all processes load the same: what is compared of checkpoints and models, without reading all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch

from ..checkpoint.bitsandbytes import QuantizedTensor
from ..io.tensors import LazyTensor, StoredTensor, read_bytes
from ..planning.plan import Plan
from ..planning.request import LoadRequest

# Of so many tensors, spread evenly, some bytes from their middle are compared.
_SAMPLED, _SAMPLE_BYTES = 64, 1024

_T = TypeVar("_T")


def facts_of(request: LoadRequest, plan: Plan) -> dict[str, str]:
    """Return digests of what must be the same in all processes, by what it is.

    A file is compared by the names, dtypes and shapes of its tensors, and by samples of their values: another version
    of the same model differs in them.
    """
    facts = facts_of_files(request)
    planned = [(p.tensor.names, p.whole_shape, p.format) for p in plan.tensors]
    facts["plan (model, config)"] = _digest([repr((planned, plan.config))])
    if request.checkpoint is None:
        own = [p.tensor.value for p in plan.tensors if not p.tensor.value.is_meta and p.tensor.is_parameter]
        facts["weights of the model"] = _digest(map(_values, _spread(own)))
    return facts


def facts_of_files(request: LoadRequest) -> dict[str, str]:
    """Return digests of the files that weights are loaded from."""
    if request.checkpoint is None:
        return {}
    stored = list(request.checkpoint.tensors.values())
    described = [repr((tensor.name, tensor.dtype, tuple(tensor.shape), tensor.nbytes)) for tensor in stored]
    return {"files (their tensors)": _digest(described), "files (their values)": _digest(_samples(stored))}


def _spread(tensors: Sequence[_T]) -> Sequence[_T]:
    return tensors[:: max(1, len(tensors) // _SAMPLED)]


def _values(tensor: torch.Tensor) -> bytes:
    """Return bytes of some values from the middle of a tensor."""
    flat = tensor.detach().reshape(-1)
    begin = len(flat) // 2
    sample = flat[begin : begin + _SAMPLE_BYTES // flat.itemsize].clone()  # numpy pins what it is given to its size
    return bytes(sample.cpu().view(torch.uint8).numpy())


def _samples(stored: Sequence[StoredTensor]) -> Iterable[bytes]:
    """Yield bytes of some tensors that are stored as plain bytes."""
    plain = [part for tensor in stored for part in _plain(tensor) if part.nbytes]
    for tensor in _spread(plain):
        begin = max(0, tensor.nbytes // 2 - _SAMPLE_BYTES // 2)
        yield bytes(read_bytes(tensor.file, tensor.offset + begin, min(_SAMPLE_BYTES, tensor.nbytes - begin)))


def _plain(tensor: StoredTensor) -> list[StoredTensor]:
    if isinstance(tensor, QuantizedTensor):
        return [tensor.parts["weight"]] if type(tensor.parts["weight"]) is StoredTensor else []
    if isinstance(tensor, LazyTensor):
        numbers = getattr(tensor, "numbers", None)
        return [numbers] if type(numbers) is StoredTensor else []
    return [tensor] if type(tensor) is StoredTensor else []


def _digest(parts: Iterable[str | bytes]) -> str:
    made = hashlib.sha256()
    for part in parts:
        made.update(part.encode() if isinstance(part, str) else part)
    return made.hexdigest()
