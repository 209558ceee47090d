"""Opens checkpoints: reads the headers of all files, which say where each tensor is stored, but no data."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..config import FLOATS
from ..errors import CheckpointError, listed, reason
from ..hardware.interrupts import interruptible
from ..io.tensors import Stamp, State, StoredTensor, stamp_of
from ..quantization import formats
from .bitsandbytes import QuantizedTensor, merge_quantized_parts
from .hub import hub_folder, is_hub_id
from .pickled import read_pickle
from .record import Record, layout_of, read_record
from .safetensors import parse_json, read_header, require_file
from .scaled.merge import merge_scaled
from .scaled.tensor import ScaledTensor
from .variants import without_variants

WeightsLocation = str | os.PathLike[str]

_PICKLES = (".bin", ".pt", ".pth")
_SHARDS = (".safetensors", *_PICKLES)
# Files that training writes beside the weights, pickled too.
NOT_WEIGHTS = re.compile(
    r"((training_args|optimizer|scheduler|scaler|rng_state.*|trainer_state)\.(bin|pt|pth))|adapter_model\..*"
)
# What is looked for in a folder, in this order: safetensors before pickles, usual names before others.
_IN_FOLDERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "*.safetensors.index.json",
    "*.safetensors.index.*.json",
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
    """An opened checkpoint.

    Attributes:
        location: the file of the weights, or their index.
        tensors: by name, in the order of files and offsets; a weight that is stored in parts is one tensor.
        record: the contents of bigload.json, which `save_quantized_model` writes beside the weights.
        metadata: of a pickled state_dict: module path -> what its `_load_from_state_dict` is told.
        folder: the folder that was named, or that of the repository; None if a file was named, since the files beside
            it are not part of the checkpoint.
        stamps: what its files were when they were opened.
    """

    location: Path
    tensors: dict[str, StoredTensor]
    record: Record | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    stamps: Mapping[Path, Stamp] = field(default_factory=dict)

    def require_unchanged(self) -> None:
        """Refuse what was read of files that were replaced or written to since they were opened.

        Raises:
            CheckpointError: they were, or are gone.
        """
        for file, stamp in self.stamps.items():
            try:
                found = stamp_of(file.stat())
            except OSError as error:
                raise CheckpointError(f"'{file}' cannot be read any more: {reason(error)}") from error
            if found != stamp:
                raise CheckpointError(f"'{file}' was changed while it was read, so that no weight of it can be trusted")

    @property
    def is_quantized(self) -> bool:
        """Whether any of its weights is stored quantized by bitsandbytes."""
        return any(isinstance(tensor, QuantizedTensor) for tensor in self.tensors.values())

    @property
    def dominant_dtype(self) -> torch.dtype:
        """The 16 or 32 bit floating dtype of most of its bytes; float32 where there is none.

        Of a checkpoint in fp8 or the like, that of the other tensors; bfloat16 where there are none.
        """
        plain = [tensor for tensor in self.tensors.values() if not isinstance(tensor, ScaledTensor)]
        if len(plain) < len(self.tensors) and not any(tensor.dtype in FLOATS.values() for tensor in plain):
            return torch.bfloat16
        return formats.dominant_dtype((each.dtype, math.prod(each.shape) * each.dtype.itemsize) for each in plain)


def open_checkpoint(weights_location: WeightsLocation) -> Checkpoint:
    """Read the headers of a checkpoint.

    Args:
        weights_location: a .safetensors, .bin, .pt or .pth file, an .index.json file, or a folder that contains one.
            In a folder, safetensors are preferred to pickles, `model.safetensors` and an index to other names, and
            plain files to their variants ("model.fp16.safetensors"). If there is no such path: a repository of the
            Hugging Face hub, "org/name" or "org/name@revision".

    Raises:
        CheckpointError: there is no checkpoint, it is ambiguous which, or a file is damaged.
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
        return _open(location.absolute())  # a model that streams reads its files when the working directory has changed
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise CheckpointError(f"'{location}' cannot be read: {reason(error)}") from error


def _open(location: Path) -> Checkpoint:
    folder = location if location.is_dir() else None
    if folder is not None:
        location = _find_in_folder(folder)
    elif not location.exists():
        raise CheckpointError(
            f"no such file or folder: '{location}'; weights_location must be a .safetensors, .bin, .pt or .pth file, "
            "an .index.json file, or a folder with one of them"
        )
    stamps: dict[Path, Stamp] = {}
    tensors = _read_index(location, stamps) if location.name.endswith(".json") else _read_file(location, stamps)
    named = ((tensor.name, tensor.dtype, tensor.shape) for tensor in interruptible(tensors.values()))
    record = read_record(location.parent, functools.partial(layout_of, named))
    merged = merge_scaled(merge_quantized_parts(tensors), location.parent, is_folder=folder is not None)
    return Checkpoint(location, merged, record, tensors.metadata, folder, stamps)


def _find_in_folder(folder: Path) -> Path:
    held = sorted(path.name for path in folder.iterdir())
    looked_at = without_variants(name for name in held if not NOT_WEIGHTS.fullmatch(name))
    for pattern in _IN_FOLDERS:
        found = sorted(path for path in folder.glob(pattern) if path.name in looked_at)
        if len(found) == 1:
            return found[0]
        if found:
            names = listed(path.name for path in found)
            raise CheckpointError(f"folder '{folder}' holds several {pattern} files, {names}: name the one to load")
    inside = [name for name in held if any((folder / name).glob("*.safetensors"))]
    if (folder / "model_index.json").is_file() and inside:
        raise CheckpointError(
            f"folder '{folder}' is a pipeline of diffusers, with the weights of {listed(inside)}: name one, such "
            f"as '{folder / inside[0]}'"
        )
    _require_no_gguf(folder, held)
    raise CheckpointError(
        f"folder '{folder}' has no weights: expected model.safetensors, an .index.json or one .safetensors, .bin, .pt "
        f"or .pth file, found {listed(held) if held else 'nothing'}"
    )


def _require_no_gguf(folder: Path, names: Iterable[str]) -> None:
    found = [name for name in names if name.lower().endswith(".gguf")]
    if found:
        raise CheckpointError(
            f"'{folder / found[0]}' is quantized by llama.cpp (GGUF, as its name says), which bigload does not read: "
            "use the original checkpoint in safetensors"
        )


def _read_index(path: Path, stamps: dict[Path, Stamp]) -> State:
    require_file(path)
    index = parse_json(path.read_bytes(), path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if isinstance(index, dict) and index and all(str(file).endswith(_SHARDS) for file in index.values()):
        weight_map = index  # the map alone, as some tools write it
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
    headers = {shard: _read_file(file, stamps) for shard, file in sorted(shards.items())}
    lost = [name for name, shard in weight_map.items() if name not in headers[shard]]
    if lost:
        raise CheckpointError(
            f"index '{path}' places {listed(lost)} in shards that do not hold them ('{weight_map[lost[0]]}' for the "
            "first); the index and the shards are of different checkpoints",
            missing_keys=lost,
        )
    tensors = {
        name: tensor
        for shard, header in headers.items()
        for name, tensor in header.items()
        if weight_map.get(name) == shard
    }
    return State(tensors, {path: said for header in headers.values() for path, said in header.metadata.items()})


def _read_file(path: Path, stamps: dict[Path, Stamp]) -> State:
    stamps[path] = stamp_of(path.stat())
    if path.suffix == ".safetensors":
        return State(read_header(path))
    if path.suffix in _PICKLES:
        return read_pickle(path)
    _require_no_gguf(path.parent, [path.name])
    raise CheckpointError(f"'{path}' is no checkpoint: expected a .safetensors, .bin, .pt, .pth or .index.json file")
