"""Weights that a checkpoint stores quantized: the tensors that make up one weight, as one `QuantizedTensor`.

Source of the format: bitsandbytes' `state_dict` hooks, as transformers saves it. A 4-bit weight `w` is stored as its
packed bytes `w`, `w.absmax`, `w.quant_map`, with double quantization `w.nested_absmax` and `w.nested_quant_map`, and
the other fields as JSON in a tensor of bytes, `w.quant_state.bitsandbytes__nf4` or `__fp4`. An int8 weight
`layer.weight` is stored as its rows, `layer.SCB`, and `layer.weight_format`, which is 0 or absent.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..config import BLOCKSIZES, FLOATS, STORAGES
from ..errors import CheckpointError, listed
from ..hardware.interrupts import interruptible
from ..hardware.layout import Shape, TensorSpec
from ..io.tensors import StoredTensor, read_each
from ..quantization.formats import NESTED_BLOCKSIZE, FourBit, Int8, part_name

_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
_FOUR_BIT_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@dataclass(frozen=True)
class QuantizedTensor(StoredTensor):
    """A weight that is stored quantized.

    Its shape is that of the dequantized weight, its dtype the one it is dequantized to (torch.int8 for an int8 weight,
    which stores none), its offset that of the part "weight", and its nbytes those of all parts.

    Attributes:
        format: how it is quantized.
        parts: the stored tensors: "weight" and "SCB", or "weight", "absmax", "quant_map" and so on.
        nested_offset: with double quantization, the mean that was subtracted from the scales.
    """

    format: FourBit | Int8
    parts: Mapping[str, StoredTensor]
    nested_offset: float = 0.0


class _QuantState(NamedTuple):
    """The fields of a 4-bit weight that are stored as JSON."""

    blocksize: int
    shape: Shape
    dtype: torch.dtype
    double_quant: bool
    nested_offset: float


# Characters that every float has room in, as JSON.
_LONGEST_FLOAT = 25


def stored_name(weight: str, part: str) -> str:
    """Return the name by which bitsandbytes stores a part of a weight: "layer.SCB", but "layer.weight.absmax"."""
    if part in ("SCB", "weight_format"):
        return f"{weight.removesuffix('weight')}{part}"
    return part_name(weight, part)


def described(fmt: FourBit, shape: tuple[int, ...], dtype: torch.dtype, offset: float) -> bytes:
    """Return the JSON of a 4-bit weight's fields, padded to a length that does not depend on `offset`.

    Args:
        fmt: its format.
        shape: (out_features, in_features).
        dtype: what it is dequantized to.
        offset: the mean that was subtracted from the scales; unused without double quantization.
    """
    fields: dict[str, Any] = {
        "quant_type": fmt.quant_type,
        "blocksize": fmt.blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    if not fmt.double_quant:
        return json.dumps(fields).encode()
    fields |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32"}
    longest = len(json.dumps(fields | {"nested_offset": 0})) - 1 + _LONGEST_FLOAT
    return json.dumps(fields | {"nested_offset": offset}).encode().ljust(longest)


def merge_quantized_parts(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Replace the parts of each quantized weight by one `QuantizedTensor`, in the place of the part "weight".

    Raises:
        CheckpointError: a part is missing, or contradicts the others in size, dtype or description.
    """
    states = {match[1]: match for name in tensors if ".quant_state." in name and (match := _STATE.fullmatch(name))}
    blobs = _read_small(tensors, [match[0] for match in states.values()])
    made = {name: _four_bit(name, match, tensors, blobs) for name, match in interruptible(states.items())}
    named = interruptible(tensors.items())
    int8 = [name for name, tensor in named if tensor.dtype == torch.int8 and _is_int8(name, tensors)]
    layouts = _read_small(tensors, [stored_name(name, "weight_format") for name in int8])
    made |= {name: _int8(name, tensors, layouts) for name in interruptible(int8)}
    taken = {match[0] for match in states.values()}
    for name, weight in made.items():
        taken |= {part.name for part in weight.parts.values()}
        if isinstance(weight.format, Int8):
            taken.add(stored_name(name, "weight_format"))
    # A name below a tensor's is a part of that tensor; buffers have names below a module's.
    orphans = [name for name in interruptible(tensors) if name not in taken and _weight_of(name) in tensors]
    if orphans:
        raise CheckpointError(f"{listed(orphans)}: parts of quantized weights whose quant_state is missing")
    return {name: made.get(name, tensor) for name, tensor in tensors.items() if name in made or name not in taken}


def _read_small(tensors: Mapping[str, StoredTensor], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Read those of the named tensors that there are."""
    found = {name: tensors[name] for name in names if name in tensors}
    return dict(zip(found, read_each(found.values()), strict=True))


def _weight_of(name: str) -> str | None:
    weight, _, part = name.partition(".quant_state.") if ".quant_state." in name else name.rpartition(".")
    return weight if part in _FOUR_BIT_PARTS or ".quant_state." in name else None


def _is_int8(name: str, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether a tensor in int8 is a weight with scales; a plain model may have a buffer named SCB."""
    return name.rpartition(".")[2] == "weight" and stored_name(name, "SCB") in tensors


def _four_bit(
    name: str, match: re.Match[str], tensors: Mapping[str, StoredTensor], blobs: Mapping[str, torch.Tensor]
) -> QuantizedTensor:
    state = _state(name, match, tensors[match[0]], blobs[match[0]])
    wanted = ["quant_map", "absmax", *(("nested_absmax", "nested_quant_map") if state.double_quant else ())]
    names = {part: stored_name(name, part) for part in ("weight", *wanted)}
    missing = [key for key in names.values() if key not in tensors]
    if missing:
        raise CheckpointError(
            f"'{name}' is stored as {match[2]}, but {listed(missing)} is missing", missing_keys=missing
        )
    parts = {part: tensors[key] for part, key in names.items()}
    storage = parts["weight"].dtype
    if storage not in STORAGES.values():
        raise CheckpointError(
            f"'{name}' is stored as {match[2]}, but its packed bytes are {storage}: the file is damaged"
        )
    fmt = _format(match[2], state.blocksize, state.double_quant, storage)
    return _quantized(name, fmt, state.shape, state.dtype, parts, state.nested_offset)


def _state(name: str, match: re.Match[str], blob: StoredTensor, values: torch.Tensor) -> _QuantState:
    try:
        if blob.dtype != torch.uint8:
            raise ValueError(f"it is stored as {blob.dtype}, not as bytes")
        return _parsed(bytes(values.numpy()), match[2])
    except ValueError as error:
        raise CheckpointError(f"the quant_state of '{name}' in '{blob.file}' is damaged: {error}") from error


@functools.lru_cache(maxsize=256)
def _parsed(raw: bytes, quant_type: str) -> _QuantState:
    """Read the JSON of a 4-bit weight's fields, which layers of one shape share to the letter.

    Raises:
        ValueError: it says what cannot be.
    """
    try:
        state = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"expected an object, found {state!r}")
    blocksize, shape, dtype = state.get("blocksize"), state.get("shape"), state.get("dtype")
    if state.get("quant_type") != quant_type:
        raise ValueError(f"quant_type is {state.get('quant_type')!r}, its name says '{quant_type}'")
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize is {blocksize!r}")
    if not isinstance(shape, list) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"shape is {shape!r}")
    if not isinstance(dtype, str) or dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype!r}, none of {', '.join(FLOATS)}")
    nested = "nested_blocksize" in state
    offset = state.get("nested_offset") if nested else 0.0
    if nested and (state["nested_blocksize"] != NESTED_BLOCKSIZE or state.get("nested_dtype") != "float32"):
        nested_dtype = state.get("nested_dtype")
        raise ValueError(f"nested scales are in blocks of {state['nested_blocksize']!r} as {nested_dtype!r}")
    if not isinstance(offset, (int, float)) or not abs(offset) <= torch.finfo(torch.float32).max:
        raise ValueError(f"nested_offset is {offset!r}")
    return _QuantState(blocksize, tuple(shape), FLOATS[dtype], nested, float(offset))


@functools.lru_cache(maxsize=16)
def _format(quant_type: str, blocksize: int, double_quant: bool, storage: torch.dtype) -> FourBit:
    # Layers share it, since it is compared often, and an object is equal to itself at once.
    return FourBit(quant_type, blocksize, double_quant, storage)


def _int8(name: str, tensors: Mapping[str, StoredTensor], layouts: Mapping[str, torch.Tensor]) -> QuantizedTensor:
    weight, layout = tensors[name], stored_name(name, "weight_format")
    if layout in layouts and layouts[layout].any():
        raise CheckpointError(
            f"'{name}' is stored in a special layout ('{layout}' is not 0); only row-wise weights can be read"
        )
    parts = {"weight": weight, "SCB": tensors[stored_name(name, "SCB")]}
    return _quantized(name, Int8(), weight.shape, torch.int8, parts)


def _quantized(
    name: str,
    fmt: FourBit | Int8,
    shape: Shape,
    dtype: torch.dtype,
    parts: Mapping[str, StoredTensor],
    nested_offset: float = 0.0,
) -> QuantizedTensor:
    expected = _expected_parts(name, fmt, shape)
    for part, found in parts.items():
        if (found.dtype, found.shape) != expected[part]:
            raise CheckpointError(
                f"'{found.name}' has shape {found.shape} of {found.dtype}; for a weight of shape {shape} it must be "
                f"{expected[part].shape} of {expected[part].dtype}: the file is damaged"
            )
    weight, nbytes = parts["weight"], sum(part.nbytes for part in parts.values())
    return QuantizedTensor(name, weight.file, dtype, shape, weight.offset, nbytes, fmt, parts, nested_offset)


def _expected_parts(name: str, fmt: FourBit | Int8, shape: Shape) -> Mapping[str, TensorSpec]:
    if len(shape) < 2:
        raise CheckpointError(f"'{name}' is quantized, but its shape {shape} is not that of a matrix")
    try:
        return fmt.parts(shape)
    except ValueError as error:
        raise CheckpointError(f"'{name}' of shape {shape} cannot be stored like this: {error}") from error
