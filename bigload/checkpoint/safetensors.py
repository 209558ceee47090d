"""Parses and checks the headers of safetensors files; their data is not read.

Source of the format: the safetensors README, "Format": 8 bytes little-endian header length, a JSON header of
name -> dtype, shape, data_offsets (relative to the end of the header), then the data without holes.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, listed
from ..hardware.interrupts import check_interrupt, interruptible
from ..io.tensors import StoredTensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
# No tensor of torch has more values than this, or dimensions.
_MAX_NUMEL, _MAX_DIMENSIONS = 2**63 - 1, 64
# The format's own limit: a greater length is damaged.
_MAX_HEADER_BYTES = 100_000_000


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read a file's header and check every number in it against the file.

    Returns:
        The tensors by name, in the order of their offsets.

    Raises:
        CheckpointError: the file is truncated, or its header damaged: its tensors overlap or leave gaps, for instance.
    """
    check_interrupt()  # a checkpoint may have hundreds of files
    size = require_file(path).st_size
    with path.open("rb") as file:
        length_field = file.read(8)
        if length_field == b"version ":
            raise CheckpointError(f"'{path}' is a Git LFS pointer, not the weights: fetch them with: git lfs pull")
        length = int.from_bytes(length_field, "little")
        if len(length_field) < 8 or length > size - 8 or length > _MAX_HEADER_BYTES:
            raise CheckpointError(
                f"'{path}' is truncated or not a safetensors file: its first bytes say that the header has {length} "
                f"bytes, the file has {size}; download it again"
            )
        header = parse_json(file.read(length), path)
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of '{path}' is a JSON {type(header).__name__}, expected an object")
    start = 8 + length
    entries = interruptible(header.items())
    tensors = [_parse_entry(path, start, name, entry) for name, entry in entries if name != "__metadata__"]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            raise CheckpointError(
                f"'{tensor.name}' begins at byte {tensor.offset} of '{path}', where its neighbour ends at {end}: "
                "the header is damaged"
            )
        end += tensor.nbytes
    if end != size:
        found = "truncated" if size < end else "longer than its header says"
        raise CheckpointError(
            f"'{path}' is {found}: the header describes {end} bytes, the file has {size}; download it again"
        )
    return {tensor.name: tensor for tensor in tensors}


def require_file(path: Path) -> os.stat_result:
    """Refuse pipes, devices and the like: they have no size, and reading them may not end.

    Raises:
        CheckpointError: it is no regular file.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"'{path}' is not a regular file")
    return found


def _parse_entry(path: Path, start: int, name: str, entry: Any) -> StoredTensor:
    damage = _damage(entry)
    if damage:
        raise CheckpointError(f"the header of '{path}' is damaged at '{name}': {damage}")
    begin, end = entry["data_offsets"]
    return StoredTensor(name, path, DTYPES[entry["dtype"]], tuple(entry["shape"]), start + begin, end - begin)


def _damage(entry: Any) -> str:
    if not isinstance(entry, dict):
        return f"expected an object with dtype, shape and data_offsets, found {_shown(entry)}"
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"dtype {_shown(dtype)} is none of {', '.join(DTYPES)}"
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        return f"shape {_shown(shape)} is not a list of sizes"
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets {_shown(offsets)} are not [begin, end]"
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        return f"{dtype} of shape {shape} takes {nbytes} bytes, its data_offsets span {offsets[1] - offsets[0]}"
    if not nbytes and math.prod(size or 1 for size in shape) > _MAX_NUMEL:  # any other fits the file
        return f"shape {shape} is of more values than can be counted"
    return ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _are_sizes(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    for each in value:  # noqa: SIM110 - a generator would take three times as long, for tens of thousands
        if type(each) is not int or each < 0:  # a bool is an int, too
            return False
    return True


def parse_json(raw: bytes, path: Path) -> Any:
    """Parse JSON.

    Raises:
        CheckpointError: not JSON, or a name occurs twice in an object.
    """
    try:
        return json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' does not contain valid JSON: {error}") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise ValueError(f"the name {listed(twice)} occurs twice")
    return names
