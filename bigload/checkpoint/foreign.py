"""Checkpoints that other methods than bitsandbytes quantized: named by what they hold and by the config beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ..errors import CheckpointError, listed
from ..io.tensors import StoredTensor
from .checkpoint import Checkpoint
from .scaled.fp8 import FLOAT8
from .scaled.stated import not_read

# Method -> the ends of names that its checkpoints hold, all of them. More particular ones come first.
_PARTS: dict[str, tuple[str, ...]] = {
    "MXFP4": ("_blocks", "_scales"),
    "GPTQ": (".qweight", ".qzeros", ".scales", ".g_idx"),
    "AWQ or GPTQ": (".qweight", ".scales"),
    "Marlin": (".B", ".s", ".workspace"),
    "HQQ": (".W_q",),
    "quanto": (".weight._data", ".weight._scale"),
    "quanto, packed": (".weight._data._data", ".weight._scale"),
    "compressed-tensors NVFP4": (".weight_packed", ".weight_global_scale"),
    "compressed-tensors": (".weight_packed", ".weight_scale"),
    "compressed-tensors, sparse": (".weight_packed", ".scale_packed"),
    "compressed-tensors, with a bitmask": (".compressed", ".bitmask"),
    "NVFP4": (".weight_sf", ".weight_global_scale"),
    "ModelOpt NVFP4": (".weight_scale", ".weight_scale_2"),
    "FP8": (".weight_scale_inv",),
    "torchao": ("_weight_qdata",),
    "torchao, by its old names": (".weight:qdata",),
    "EETQ": (".weight_scales",),
    "AQLM": (".codes", ".codebooks"),
    "VPTQ": (".centroids", ".indices"),
    "ExLlamaV2": (".q_weight", ".q_scale"),
    "ExLlamaV3": (".trellis", ".suh"),
    "SpQR": (".dense_weights", ".row_offsets"),
    "HIGGS": (".tables", ".tables2"),
    "Four Over Six": (".quantized_weight_values",),
    "MLX": (".scales", ".biases"),
    "Metal": (".scales", ".qbiases"),
}
_SMALL_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32)
# Files beside the weights that say how they were quantized, and the path to the name of the method in them.
_CONFIGS = (
    ("config.json", ("quantization_config", "quant_method")),
    ("config.json", ("compression_config", "quant_method")),
    ("hf_quant_config.json", ("quantization", "quant_algo")),
    ("quantize_config.json", ("quant_method",)),
    ("quant_config.json", ("quant_method",)),
)


def foreign_error(checkpoint: Checkpoint, spare: Iterable[str]) -> CheckpointError | None:
    """Return the error for a checkpoint that another method quantized; None if nothing shows that.

    Args:
        checkpoint: the checkpoint.
        spare: its keys that have no place in the model.
    """
    keys = list(spare)
    found = next((method for method, ends in _PARTS.items() if all(any(map(_ends(e), keys)) for e in ends)), None)
    said = _said(checkpoint.location.parent)
    packed = [name for name, tensor in checkpoint.tensors.items() if _is_packed(tensor)] if said else []
    if found is None and any(re.search(r"\.(weight|input)_scale$", key) for key in keys):
        found = "a method that stores scales beside the weights"
    if found is None and not packed:
        return None
    ends = _PARTS.get(found or "", (".weight_scale", ".input_scale"))
    shown = [next(filter(_ends(end), keys)) for end in ends if any(map(_ends(end), keys))] or packed[:1]
    method = f"{said[0]!r}, as '{said[1]}' says" if said else found
    return not_read(f"'{checkpoint.location}'", f"{method} (it holds {listed(shown)})", shown)


def _is_packed(tensor: StoredTensor) -> bool:
    """Whether a tensor may hold numbers that stand for others: a matrix of small ones, or in any form of fp8."""
    return len(tensor.shape) > 1 and (tensor.dtype in FLOAT8 or tensor.dtype in _SMALL_INTEGERS)


def _ends(end: str) -> Callable[[str], bool]:
    return lambda key: key.endswith(end)


def _said(folder: Path) -> tuple[str, str] | None:
    """Return the method that a config beside the weights names, and the config's file."""
    for file, path in _CONFIGS:
        try:
            value = json.loads((folder / file).read_text())
            for name in path:
                value = value[name]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue  # no such file, or one that says nothing
        if isinstance(value, str) and "bitsandbytes" not in value:
            return value, file
    return None
