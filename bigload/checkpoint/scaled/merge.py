"""Finds the weights of a checkpoint that are stored with scales, and joins the two, as `ScaledTensor`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ...errors import CheckpointError, listed
from ...hardware.interrupts import interruptible
from ...io.tensors import StoredTensor
from . import fp4, fp8, int8, mxfp4
from .stated import READ_METHODS, Stated, not_read, stated
from .tensor import ScaledTensor

# What the names of scales end with, after the weight's.
_ENDS = ("_scale_inv", "_scale")
# How the scales of `M.weight` are called in M by DeepSeek-V4 and Mistral Large 4, which mean what "_scale_inv" does.
_BESIDE = ("scale", "qscale_weight")
# What a module multiplies its inputs by, as its weight was divided by it.
_OF_INPUTS = ".pre_quant_scale"
# Parts of a module with such a weight that say nothing of it, but of activations, which are not quantized here.
_OF_ACTIVATIONS = (
    ".input_scale",
    ".input_zero_point",
    ".input_scale_ub",
    ".activation_scale",
    ".qscale_act",
    ".k_scale",
    ".v_scale",
)
_PARTS = (*_OF_ACTIVATIONS, _OF_INPUTS)


def merge_scaled(tensors: Mapping[str, StoredTensor], folder: Path, *, is_folder: bool) -> dict[str, StoredTensor]:
    """Replace the parts of each weight that is stored with scales by one `ScaledTensor`, in the place of its numbers.

    Args:
        tensors: of the checkpoint, by name.
        folder: where they are, perhaps with a config.
        is_folder: whether this folder was named, so that the config in it is theirs.

    Raises:
        CheckpointError: scales are missing or do not fit, or the config contradicts the weights.
    """
    said = stated(folder)
    # Numbers and scales: of a plain checkpoint, which may have tens of thousands of tensors, there are none.
    parts = {
        n: t for n, t in interruptible(tensors.items()) if t.dtype.itemsize == 1 or n.endswith((*_ENDS, mxfp4.SCALES))
    }
    made = {name: tensor for name in interruptible(parts) if (tensor := _joined(name, tensors, said)) is not None}
    _require_scales(parts, tensors, made, said)
    is_plain = all(tensor.dtype.itemsize > 1 for tensor in parts.values() if len(tensor.shape) > 1)
    _require_as_stated(made, said, folder, may_be_dequantized=is_folder and is_plain)
    if not made:
        return dict(tensors)
    owners = {name.rpartition(".")[0] for name in made}
    beside = [name for name in tensors if name.endswith(_PARTS) and name.rpartition(".")[0] in owners]
    smoothed = [name for name in beside if name.endswith(_OF_INPUTS)]
    if smoothed:
        raise not_read(f"'{folder}'", f"a method that scales inputs (it holds {listed(smoothed)})", smoothed)
    gone = {tensor.scales.name for tensor in made.values()}.union(beside)
    kept = [(name, tensor) for name, tensor in tensors.items() if name not in gone]
    return {made[name].name if name in made else name: made.get(name, tensor) for name, tensor in kept}


def _joined(name: str, tensors: Mapping[str, StoredTensor], said: Stated) -> ScaledTensor | None:
    tensor = tensors[name]
    if mxfp4.is_mxfp4(tensor):
        whole = name.removesuffix(mxfp4.BLOCKS)
        scales = tensors.get(whole + mxfp4.SCALES)
        if scales is None:
            raise _lacking([whole + mxfp4.SCALES], "mxfp4")
        return mxfp4.mxfp4_tensor(whole, tensor, scales)
    if tensor.dtype != torch.int8 and tensor.dtype not in fp8.FLOAT8:
        return None
    end, scales = _scales(name, tensors)
    if scales is None or scales.name + "_2" in tensors:
        return None
    if tensor.dtype == torch.int8 and said.method in fp4.METHODS:
        return fp4.fp4_tensor(name, tensor, scales)
    if tensor.dtype == torch.int8:
        is_weight = name.rpartition(".")[2] == "weight" and end == "_scale"
        return int8.int8_tensor(name, tensor, scales, tensors, said) if is_weight else None
    return fp8.fp8_tensor(name, tensor, end, scales, said)


def _scales(name: str, tensors: Mapping[str, StoredTensor]) -> tuple[str, StoredTensor | None]:
    """Return the scales of a weight, and what the name of such scales ends with."""
    for end in _ENDS:
        if name + end in tensors:
            return end, tensors[name + end]
    module, _, part = name.rpartition(".")
    beside = [f"{module}.{own}" for own in _BESIDE if part == "weight"]
    return next(((_ENDS[0], tensors[each]) for each in beside if each in tensors), ("", None))


def _require_scales(
    parts: Mapping[str, StoredTensor],
    tensors: Mapping[str, StoredTensor],
    made: Mapping[str, ScaledTensor],
    said: Stated,
) -> None:
    """Refuse numbers without scales, and scales without numbers."""
    if made or said.method in fp8.METHODS:
        end = _ENDS[0] if said.method in fp4.METHODS else _ENDS[1]
        bare = [name for name, tensor in parts.items() if name not in made and _needs_scales(name, tensor)]
        if bare and not any(name.endswith("_scale_2") for name in tensors):
            raise _lacking([name + end for name in bare], "int8" if parts[bare[0]].dtype == torch.int8 else "fp8")
    end = _ENDS[0]
    whole = f"weight{end}"
    alone = [name for name in parts if name.endswith(whole) and name.removesuffix(end) not in made]
    if alone:
        weight = tensors.get(alone[0].removesuffix(end))
        found = "is not there" if weight is None else f"is stored as {weight.dtype}"
        raise CheckpointError(
            f"{listed(alone)}: scales of weights in fp8, but '{alone[0].removesuffix(end)}' {found}: download the "
            "checkpoint again"
        )
    alone = [
        name
        for name in parts
        if name.endswith(mxfp4.SCALES)
        and said.method in mxfp4.METHODS
        and name.removesuffix(mxfp4.SCALES) + mxfp4.BLOCKS not in tensors
    ]
    if alone:
        raise _lacking([name.removesuffix(mxfp4.SCALES) + mxfp4.BLOCKS for name in alone], "mxfp4")


def _needs_scales(name: str, tensor: StoredTensor) -> bool:
    if tensor.dtype == torch.int8:
        return name.endswith(".weight")
    return tensor.dtype in fp8.FLOAT8 and not name.endswith((*_ENDS, "_scale_2"))


def _lacking(names: list[str], kind: str) -> CheckpointError:
    return CheckpointError(
        f"weights are stored as {kind}, but {listed(names)} is missing: download the checkpoint again",
        missing_keys=names,
    )


def _require_as_stated(
    made: Mapping[str, ScaledTensor], said: Stated, folder: Path, *, may_be_dequantized: bool
) -> None:
    """Refuse a config that names another method than the weights are stored by."""
    known = {"fp4": fp4.METHODS, "fp8": fp8.METHODS, "int8": int8.METHODS, "mxfp4": mxfp4.METHODS}
    read = {method for methods in known.values() for method in methods}
    first: dict[str, ScaledTensor] = {}
    for tensor in made.values():
        first.setdefault(tensor.kind, tensor)
    for tensor in first.values():
        methods = known[tensor.kind.replace(",", "").split()[0]]
        if said.method and said.method not in read:
            raise not_read(
                f"'{folder}'", f"{said.method!r}, as '{said.file}' says (it holds '{tensor.name}' as {tensor.kind})"
            )
        if said.method and said.method not in methods:
            raise CheckpointError(
                f"'{folder / said.file}' says that the weights are quantized by '{said.method}', but '{tensor.name}' "
                f"is stored as {tensor.kind}: take config.json from the original checkpoint"
            )
    if not made and may_be_dequantized and said.method in READ_METHODS:
        raise CheckpointError(
            f"'{folder / said.file}' says that the weights are quantized by '{said.method}', but no weight there is "
            "stored so: if they have been dequantized, remove quantization_config from config.json"
        )
