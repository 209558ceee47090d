"""Where every tensor of a checkpoint lies: headers are parsed and checked, the data is not read.

Source of the format: the safetensors README, "Format": 8 bytes little-endian header length, a JSON header of
name -> dtype, shape, data_offsets (relative to the end of the header), then the data without holes.

Pickled checkpoints go through torch's own reader, which runs none of their code (weights_only) and maps the file.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, listed
from ..io.tensors import LazyTensor, StoredTensor
from ..quantization import formats
from .bitsandbytes import QuantizedTensor, gathered
from .hub import hub_folder, is_hub_id
from .record import Record, layout_of, read_record

WeightsLocation = str | os.PathLike[str]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
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
# The format's own bound; a longer one is a damaged length, not a header worth the memory.
_MAX_HEADER_BYTES = 100_000_000

_PICKLES = (".bin", ".pt", ".pth")
# What training leaves beside the weights, pickled too.
NOT_WEIGHTS = re.compile(
    r"((training_args|optimizer|scheduler|scaler|rng_state.*|trainer_state)\.(bin|pt|pth))|adapter_model\..*"
)
# In the order they are looked for in a folder: safetensors before pickles, the usual name before any other.
_IN_FOLDERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "*.safetensors.index.json",
    "*.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "*.index.json",
    "*.bin",
    "*.pt",
    "*.pth",
)


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a checkpoint by name, in the order of their files and offsets; quantized weights as one each.

    Attributes:
        location: the file of the weights, or their index.
        tensors: by name.
        record: what `save_quantized_model` wrote beside them.
    """

    location: Path
    tensors: dict[str, StoredTensor]
    record: Record | None = None

    @property
    def is_quantized(self) -> bool:
        """Ask whether it holds weights that bitsandbytes has quantized."""
        return any(isinstance(tensor, QuantizedTensor) for tensor in self.tensors.values())

    @property
    def dominant_dtype(self) -> torch.dtype:
        """The floating dtype that most of the checkpoint's bytes are in; float32 where there is none."""
        return formats.dominant_dtype(
            (tensor.dtype, math.prod(tensor.shape) * tensor.dtype.itemsize) for tensor in self.tensors.values()
        )


def open_checkpoint(weights_location: WeightsLocation) -> Checkpoint:
    """Read the headers of a checkpoint.

    Args:
        weights_location: a .safetensors, .bin, .pt or .pth file, an .index.json file, or a folder with one of them:
            safetensors are taken before pickles, `model.safetensors` or an index before a file of another name.
            Or, where there is no such path, a repository of the Hugging Face hub: "org/name" or "org/name@revision".

    Raises:
        CheckpointError: nothing there, not a checkpoint, or a file that contradicts itself.
    """
    if not weights_location:
        raise CheckpointError(f"weights_location is {weights_location!r}: say where the weights are")
    try:
        location = Path(weights_location).expanduser()
    except (TypeError, RuntimeError) as error:  # RuntimeError: the home of a user who does not exist
        raise CheckpointError(f"weights_location {weights_location!r} is not a path: {error}") from error
    try:
        if isinstance(weights_location, str) and not location.exists() and is_hub_id(weights_location):
            location = hub_folder(weights_location)
        return _open(location)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise CheckpointError(f"'{location}' cannot be read: {error}") from error


def _open(location: Path) -> Checkpoint:
    if location.is_dir():
        location = _find_in_folder(location)
    elif not location.exists():
        raise CheckpointError(
            f"no such file or folder: '{location}'; weights_location must be a .safetensors, .bin, .pt or .pth file, "
            "an .index.json file, or a folder with one of them"
        )
    tensors = _read_index(location) if location.name.endswith(".json") else _read_file(location)
    layout = layout_of((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors.values())
    return Checkpoint(location, gathered(tensors), read_record(location.parent, layout))


def _find_in_folder(folder: Path) -> Path:
    for pattern in _IN_FOLDERS:
        found = sorted(path for path in folder.glob(pattern) if not NOT_WEIGHTS.fullmatch(path.name))
        if len(found) == 1:
            return found[0]
        if found:
            names = listed(path.name for path in found)
            raise CheckpointError(f"folder '{folder}' holds several {pattern} files, {names}: name the one to load")
    held = sorted(path.name for path in folder.iterdir())
    raise CheckpointError(
        f"folder '{folder}' has no weights: expected model.safetensors, an .index.json or one .safetensors, .bin, .pt "
        f"or .pth file, found {listed(held) if held else 'nothing'}"
    )


def _read_index(path: Path) -> dict[str, StoredTensor]:
    index = _parse_json(path.read_bytes(), path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"'{path}' is not an index: expected a JSON object with a 'weight_map' of tensor -> file")
    shards = {shard: path.parent / shard for shard in dict.fromkeys(weight_map.values())}
    outside = [shard for shard in shards if Path(shard).is_absolute() or ".." in Path(shard).parts]
    if outside:
        raise CheckpointError(f"index '{path}' names {listed(outside)}, outside its own folder")
    absent = [shard for shard, file in shards.items() if not file.is_file()]
    if absent:
        raise CheckpointError(
            f"index '{path}' names {len(absent)} of {len(shards)} shards that are not in its folder: {listed(absent)}; "
            "download the checkpoint again"
        )
    headers = {shard: _read_file(file) for shard, file in sorted(shards.items())}
    lost = [name for name, shard in weight_map.items() if name not in headers[shard]]
    if lost:
        raise CheckpointError(
            f"index '{path}' places {listed(lost)} in shards that do not hold them ('{weight_map[lost[0]]}' for the "
            "first); the index and the shards are of different checkpoints",
            missing_keys=lost,
        )
    return {
        name: tensor
        for shard, header in headers.items()
        for name, tensor in header.items()
        if weight_map.get(name) == shard
    }


def _read_file(path: Path) -> dict[str, StoredTensor]:
    if path.suffix == ".safetensors":
        return read_header(path)
    if path.suffix in _PICKLES:
        return _read_pickle(path)
    raise CheckpointError(f"'{path}' is no checkpoint: expected a .safetensors, .bin, .pt, .pth or .index.json file")


def _read_pickle(path: Path) -> dict[str, StoredTensor]:
    try:
        state = _load_mapped(path)
    except pickle.UnpicklingError as error:
        strange = re.search(r"GLOBAL (\S+)", str(error))
        what = f"names '{strange[1]}', code that no state_dict needs" if strange else "is damaged or not a pickle"
        raise CheckpointError(
            f"'{path}' {what}; nothing of it was run. If you trust it, save its state_dict alone, best as safetensors"
        ) from error
    except Exception as error:  # a file that is cut fails in as many ways as there are places to cut it
        raise CheckpointError(f"'{path}' is damaged or not a checkpoint of torch: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"'{path}' holds a {type(state).__name__}, expected a state_dict of tensors by name")
    strangers = [str(name) for name, value in state.items() if not (isinstance(name, str) and _is_plain(value))]
    if strangers:
        raise CheckpointError(
            f"'{path}' holds {listed(strangers)}, which are no plain tensors by name; expected a state_dict: save that "
            "part alone"
        )
    return {
        name: LazyTensor(name, path, value.dtype, tuple(value.shape), rank, value.nbytes, partial(_itself, value))
        for rank, (name, value) in enumerate(state.items())
    }


def _is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta


def _itself(value: torch.Tensor) -> torch.Tensor:
    return value


def _load_mapped(path: Path) -> Any:
    is_zip = path.open("rb").read(2) == b"PK"  # files from before torch 1.6 cannot be mapped
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read one .safetensors header and check every number in it against the file.

    Returns:
        The tensors by name, in the order of their offsets.

    Raises:
        CheckpointError: the file is truncated, its header is damaged, or its tensors overlap or leave holes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length_field = file.read(8)
        if length_field == b"version ":
            raise CheckpointError(f"'{path}' is a Git LFS pointer, not the weights: fetch them with: git lfs pull")
        length = int.from_bytes(length_field, "little")
        if len(length_field) < 8 or length > size - 8 or length > _MAX_HEADER_BYTES:
            raise CheckpointError(
                f"'{path}' is truncated or no safetensors file: its header claims {length} bytes, the file has {size}; "
                "download it again"
            )
        header = _parse_json(file.read(length), path)
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of '{path}' is a JSON {type(header).__name__}, expected an object")
    start = 8 + length
    tensors = [_parse_entry(path, start, name, entry) for name, entry in header.items() if name != "__metadata__"]
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


def _parse_entry(path: Path, start: int, name: str, entry: Any) -> StoredTensor:
    def damaged(what: str) -> CheckpointError:
        return CheckpointError(f"the header of '{path}' is damaged at '{name}': {what}")

    if not isinstance(entry, dict):
        raise damaged(f"expected an object with dtype, shape and data_offsets, found {entry!r}")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise damaged(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if not _are_sizes(shape):
        raise damaged(f"shape {shape!r} is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(f"data_offsets {offsets!r} are not [begin, end]")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise damaged(f"{dtype} of shape {shape} takes {nbytes} bytes, its data_offsets span {offsets[1] - offsets[0]}")
    return StoredTensor(name, path, DTYPES[dtype], tuple(shape), start + offsets[0], nbytes)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)


def _parse_json(raw: bytes, path: Path) -> Any:
    try:
        return json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' does not hold the JSON it should: {error}") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise ValueError(f"the name {listed(twice)} stands twice")
    return names
