"""Pickled checkpoints, read by torch with weights_only=True, so that no code in them runs, and mapped."""

from __future__ import annotations

import pickle
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, listed
from ..hardware.interrupts import check_interrupt, interruptible
from ..io.tensors import LazyTensor, State, StoredObject, StoredTensor
from .safetensors import require_file


def read_pickle(path: Path) -> State:
    """Map the file of a pickled state_dict.

    Raises:
        CheckpointError: the file is damaged, would run code, or contains something else.
    """
    try:
        state = _load_mapped(path)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        what = f"names '{code[1]}', code that no state_dict needs" if code else "is damaged or not a pickle"
        raise CheckpointError(
            f"'{path}' {what}; nothing of it was run. If you trust it, save its state_dict alone, best as safetensors"
        ) from error
    except Exception as error:  # a truncated file can raise almost anything
        raise CheckpointError(f"'{path}' is damaged or not a checkpoint of torch: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"'{path}' holds a {type(state).__name__}, expected a state_dict of tensors by name")
    each = interruptible(state.items())
    others = [str(name) for name, value in each if not (isinstance(name, str) and _may_hold(name, value))]
    if others:
        raise CheckpointError(
            f"'{path}' holds {listed(others)}, which are not plain tensors by name; expected a state_dict: save that "
            "part alone"
        )
    each = interruptible(enumerate(state.items()))
    tensors = {name: _described(path, rank, name, value) for rank, (name, value) in each}
    return State(tensors, getattr(state, "_metadata", None))


def _described(path: Path, rank: int, name: str, value: Any) -> StoredTensor:
    if not _is_plain(value):
        return StoredObject(name, path, torch.uint8, (0,), rank, 0, value)
    return LazyTensor(name, path, value.dtype, tuple(value.shape), rank, value.nbytes, partial(_own_tensor, value))


def _may_hold(name: str, value: Any) -> bool:
    """Whether a state_dict may hold this: a tensor, or a module's extra state, which may be anything."""
    is_extra_state = name.rpartition(".")[2] == "_extra_state" and not isinstance(value, torch.Tensor)
    return is_extra_state or _is_plain(value)


def _is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta


def _own_tensor(value: torch.Tensor) -> torch.Tensor:
    return value


def _load_mapped(path: Path) -> Any:
    require_file(path)
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"  # files from before torch 1.6 cannot be mapped
    return torch.load(path, map_location=_on_cpu, weights_only=True, mmap=is_zip)


def _on_cpu(storage: Any, location: str) -> Any:
    """Leave a storage on the CPU, where torch reads it; called for each of what may be tens of thousands."""
    check_interrupt()
    return storage
