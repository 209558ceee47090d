"""Weights that a checkpoint holds quantized already: their parts, of five or six names, become one tensor of it.

Source of the format: what bitsandbytes' `state_dict` hooks write and transformers saves. Of a 4-bit weight: the packed
bytes, `absmax`, `quant_map`, for double quantization `nested_absmax` and `nested_quant_map`, and the rest as JSON in a
tensor of bytes, `quant_state.bitsandbytes__nf4` or `__fp4`. Of an int8 weight: the rows, `SCB` beside the weight, and
`weight_format`, 0 or absent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..config import BLOCKSIZES, FLOATS, STORAGES
from ..errors import CheckpointError, listed
from ..io.tensors import StoredTensor, read_whole
from ..quantization.formats import NESTED_BLOCKSIZE, TABLES, FourBit, Int8, part_name

_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
_FOUR_BIT_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@dataclass(frozen=True)
class QuantizedTensor(StoredTensor):
    """A weight stored quantized. Its shape is the weight's own, its dtype what it computes back to; offset the rows'.

    Attributes:
        format: how it is quantized.
        parts: the stored tensors by bitsandbytes' names: "weight" and "absmax", "quant_map" ..., or "SCB".
        nested_offset: what was taken from the scales before they were quantized.
    """

    format: FourBit | Int8
    parts: Mapping[str, StoredTensor]
    nested_offset: float = 0.0


# The longest that JSON makes of a float.
_LONGEST_FLOAT = 25


def stored_name(weight: str, part: str) -> str:
    """Name a part of a weight as bitsandbytes does: those of an int8 weight lie beside it, those of others under it."""
    if part in ("SCB", "weight_format"):
        return f"{weight.removesuffix('weight')}{part}"
    return part_name(weight, part)


def described(fmt: FourBit, shape: tuple[int, ...], dtype: torch.dtype, offset: float) -> bytes:
    """Return the JSON that bitsandbytes describes a 4-bit weight by, of a length that no offset changes.

    Args:
        fmt: its format.
        shape: (out_features, in_features).
        dtype: what it is dequantized to.
        offset: what was taken from its scales before they were quantized, if they were.
    """
    said: dict[str, Any] = {
        "quant_type": fmt.quant_type,
        "blocksize": fmt.blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    if not fmt.double_quant:
        return json.dumps(said).encode()
    said |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32"}
    longest = len(json.dumps(said | {"nested_offset": 0})) - 1 + _LONGEST_FLOAT
    return json.dumps(said | {"nested_offset": offset}).encode().ljust(longest)


def merge_quantized_parts(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Put the parts of each quantized weight together; all other tensors stay as they are.

    Raises:
        CheckpointError: a part is missing, or its size, dtype or description contradicts the others.
    """
    states = {match[1]: match for name in tensors if ".quant_state." in name and (match := _STATE.fullmatch(name))}
    # By the weight's dtype: a plain model may have a buffer of that name.
    rows = [name for name in tensors if (name.endswith(".SCB") or name == "SCB") and _is_int8(name, tensors)]
    made: dict[str, StoredTensor] = {}
    taken: set[str] = set()
    for name, match in states.items():
        made[name], used = _four_bit(name, match, tensors)
        taken.update(used)
    for name in rows:
        weight = f"{name.removesuffix('SCB')}weight"
        made[weight], used = _int8(weight, tensors)
        taken.update(used)
    # What lies under a tensor's own name is a part of it; a buffer's name lies under a module's.
    orphans = [name for name in tensors if name not in taken and _weight_of(name) in tensors]
    if orphans:
        raise CheckpointError(f"{listed(orphans)}: parts of quantized weights whose quant_state is missing")
    # Each in the place of its weight, so that the order stays that of the file.
    return {name: made.get(name, tensor) for name, tensor in tensors.items() if name in made or name not in taken}


def _weight_of(name: str) -> str | None:
    weight, _, part = name.partition(".quant_state.") if ".quant_state." in name else name.rpartition(".")
    return weight if part in _FOUR_BIT_PARTS or ".quant_state." in name else None


def _is_int8(scales: str, tensors: Mapping[str, StoredTensor]) -> bool:
    weight = tensors.get(f"{scales.removesuffix('SCB')}weight")
    return weight is not None and weight.dtype == torch.int8


def _four_bit(
    name: str, match: re.Match[str], tensors: Mapping[str, StoredTensor]
) -> tuple[QuantizedTensor, Iterable[str]]:
    described = _described(name, match, tensors[match[0]])
    nested = described["nested"]
    wanted = ["quant_map", "absmax", *(("nested_absmax", "nested_quant_map") if nested else ())]
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
    fmt = FourBit(match[2], described["blocksize"], nested, storage)
    _require_sizes(name, fmt, described["shape"], parts)
    quantized = QuantizedTensor(
        name,
        parts["weight"].file,
        described["dtype"],
        described["shape"],
        parts["weight"].offset,
        sum(part.nbytes for part in parts.values()),
        fmt,
        parts,
        described["nested_offset"],
    )
    return quantized, [match[0], *(part.name for part in parts.values())]


def _described(name: str, match: re.Match[str], blob: StoredTensor) -> dict[str, Any]:
    """Read and check the JSON that describes a 4-bit weight."""

    def wrong(what: str) -> CheckpointError:
        return CheckpointError(f"the quant_state of '{name}' in '{blob.file}' is damaged: {what}")

    if blob.dtype != torch.uint8:
        raise wrong(f"it is stored as {blob.dtype}, not as bytes")
    try:
        state = json.loads(bytes(read_whole(blob).numpy()))
    except (ValueError, RecursionError) as error:
        raise wrong(f"it is not JSON: {error}") from error
    if not isinstance(state, dict):
        raise wrong(f"expected an object, found {state!r}")
    blocksize, shape, dtype = state.get("blocksize"), state.get("shape"), state.get("dtype")
    if state.get("quant_type") != match[2]:
        raise wrong(f"quant_type is {state.get('quant_type')!r}, its name says '{match[2]}'")
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise wrong(f"blocksize is {blocksize!r}")
    if not isinstance(shape, list) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise wrong(f"shape is {shape!r}")
    if not isinstance(dtype, str) or dtype not in FLOATS:
        raise wrong(f"dtype is {dtype!r}, none of {', '.join(FLOATS)}")
    nested = "nested_blocksize" in state
    offset = state.get("nested_offset") if nested else 0.0
    if nested and (state["nested_blocksize"] != NESTED_BLOCKSIZE or state.get("nested_dtype") != "float32"):
        raise wrong(f"nested scales are in blocks of {state['nested_blocksize']!r} as {state.get('nested_dtype')!r}")
    if not isinstance(offset, (int, float)) or not abs(offset) <= torch.finfo(torch.float32).max:
        raise wrong(f"nested_offset is {offset!r}")
    return {
        "blocksize": blocksize,
        "shape": tuple(shape),
        "dtype": FLOATS[dtype],
        "nested": nested,
        "nested_offset": float(offset),
    }


def _int8(name: str, tensors: Mapping[str, StoredTensor]) -> tuple[QuantizedTensor, Iterable[str]]:
    scales, layout_name = stored_name(name, "SCB"), stored_name(name, "weight_format")
    if name not in tensors:
        raise CheckpointError(f"'{scales}' is stored, but '{name}' is missing", missing_keys=[name])
    parts = {"weight": tensors[name], "SCB": tensors[scales]}
    _require_sizes(name, Int8(), parts["weight"].shape, parts)
    layout = tensors.get(layout_name)
    if layout is not None and read_whole(layout).any():
        raise CheckpointError(
            f"'{name}' is stored in a layout of its own ('{layout.name}' is not 0); only rows are read"
        )
    quantized = QuantizedTensor(
        name,
        parts["weight"].file,
        torch.int8,
        parts["weight"].shape,
        parts["weight"].offset,
        sum(part.nbytes for part in parts.values()),
        Int8(),
        parts,
    )
    return quantized, [layout_name, *(part.name for part in parts.values())]


def _require_sizes(name: str, fmt: FourBit | Int8, shape: tuple[int, ...], parts: Mapping[str, StoredTensor]) -> None:
    expected = {part: (size.dtype, size.shape) for part, size in _parts(name, fmt, shape).items() if part in parts}
    expected |= {part: (torch.float32, (count,)) for part, count in TABLES.items() if part in parts}
    for part, (dtype, size) in expected.items():
        found = parts[part]
        if found.dtype != dtype or found.shape != size:
            raise CheckpointError(
                f"'{found.name}' has shape {found.shape} of {found.dtype}; for a weight of shape {shape} it must be "
                f"{size} of {dtype}: the file is damaged"
            )


def _parts(name: str, fmt: FourBit | Int8, shape: tuple[int, ...]) -> Mapping[str, Any]:
    if len(shape) < 2:
        raise CheckpointError(f"'{name}' is quantized, but its shape {shape} is no matrix")
    try:
        return fmt.parts(shape)
    except ValueError as error:
        raise CheckpointError(f"'{name}' of shape {shape} cannot be stored so: {error}") from error
