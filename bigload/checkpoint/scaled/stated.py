"""What the config beside a checkpoint says of how its weights are stored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError

# Beside the weights, and where in it the quantization is.
_CONFIG, _FIELDS = "config.json", ("quantization_config", "compression_config")
# Methods of transformers whose weights are all read, from their numbers and scales.
READ_METHODS = ("fp8", "mxfp8", "fbgemm_fp8", "mxfp4")
# Rows and columns of ModelOpt's blocks (FP8_PB_WO), unless its config says otherwise.
MODELOPT_BLOCK = 128
_MODELOPT = ("hf_quant_config.json", "quantization")
# Files that say nothing but how another method quantized the weights.
OF_OTHER_METHODS = (_MODELOPT[0],)


@dataclass(frozen=True)
class Stated:
    """What a config says.

    Attributes:
        method: its name for the method; "" if there is no config, or it says nothing.
        file: the config.
        block: rows and columns of values that share a scale, if it says so.
    """

    method: str = ""
    file: str = ""
    block: tuple[int, int] | None = None


def stated(folder: Path) -> Stated:
    """Return what the config in a folder says.

    Raises:
        CheckpointError: it names blocks of a size that no weight can have.
    """
    config = _read(folder / _CONFIG)
    for said in map(config.get, _FIELDS):
        if isinstance(said, Mapping) and isinstance(said.get("quant_method"), str):
            return Stated(said["quant_method"], _CONFIG, _block(said, folder / _CONFIG))
    said = _read(folder / _MODELOPT[0]).get(_MODELOPT[1])
    if not isinstance(said, Mapping) or not said.get("quant_algo"):
        return Stated()
    path = folder / _MODELOPT[0]
    return Stated("modelopt", _MODELOPT[0], _block({**said, "quant_method": "modelopt"}, path))


def write_without_quantization(source: Path, target: Path) -> None:
    """Write a folder's config.json into another, unless it has one, without what it says of the weights' quantization.

    Does nothing if it says nothing of that.
    """
    said, path = _read(source / _CONFIG), target / _CONFIG
    kept = {name: value for name, value in said.items() if name not in _FIELDS}
    if len(kept) < len(said) and not path.exists():
        path.write_text(json.dumps(kept, indent=2) + "\n")


def _read(path: Path) -> Mapping[str, Any]:
    try:
        said = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}  # no such file, or one that says nothing
    return said if isinstance(said, Mapping) else {}


def _block(said: Mapping[str, Any], path: Path) -> tuple[int, int] | None:
    if "mxfp8" in (said["quant_method"], str(said.get("quant_algo")).lower()):
        block = said.get("weight_block_size", [1, 32])
    elif said["quant_method"] == "fp8":
        block = said.get("weight_block_size")
    elif said["quant_method"] == "compressed-tensors":
        groups = said.get("config_groups")
        each = groups.values() if isinstance(groups, Mapping) else ()
        found = {str(block): block for group in each if (block := _block_of_group(group)) is not None}
        if len(found) > 1:
            raise CheckpointError(f"'{path}' names blocks of several sizes, {', '.join(found)}, which cannot be read")
        block = next(iter(found.values()), None)
    elif str(said.get("quant_algo")).lower() == "fp8_pb_wo":
        block = [said.get("group_size") or MODELOPT_BLOCK] * 2
    else:
        return None
    if block is None:
        return None
    is_pair = isinstance(block, (list, tuple)) and len(block) == 2
    if not is_pair or not all(type(size) is int and size > 0 for size in block):
        raise CheckpointError(
            f"'{path}' says that weights are stored in blocks of {block!r}; expected two positive integers, such as "
            "[128, 128]: take config.json from the original checkpoint"
        )
    return (block[0], block[1])


def _block_of_group(group: Any) -> Any:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        return None
    if weights.get("strategy") == "block":
        return weights.get("block_structure")
    return [1, weights.get("group_size")] if weights.get("strategy") == "group" else None


def not_read(what: str, method: str, keys: Sequence[str] = ()) -> CheckpointError:
    """Return the error for what another method quantized.

    Args:
        what: the checkpoint, or a weight.
        method: the method, and how it was recognised.
        keys: of the checkpoint, which showed it.
    """
    return CheckpointError(
        f"{what} was quantized by {method}, which bigload does not read: it reads weights of 16 to 64 bits, those that "
        "bitsandbytes quantized, and fp8, int8 and mxfp4 with their scales. Use the original checkpoint, or load this "
        "one with the library that made it",
        unexpected_keys=list(keys),
    )
