"""Weights that are stored quantized one by one, as one: a model may hold in one tensor what a checkpoint has in many.

transformers 4 held each expert in Linears of its own, which bitsandbytes quantized; transformers 5 holds all experts of
a layer in one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..errors import CheckpointError
from ..io.tensors import LazyTensor, StoredTensor, read_whole
from ..quantization.formats import NESTED_BLOCKSIZE, FourBit
from .bitsandbytes import QuantizedTensor


@dataclass(frozen=True)
class MergedTensor(QuantizedTensor):
    """A weight that is made of others, which are stored quantized.

    Attributes:
        pieces: those, in the order in which they fill it.
    """

    pieces: tuple[QuantizedTensor, ...] = ()


def merge_quantized(
    name: str, shape: tuple[int, ...], pieces: Iterable[tuple[StoredTensor, Sequence[slice | int], bool]]
) -> MergedTensor:
    """Join weights in 4 bit, bit for bit: packed bytes and scales are put one after the other.

    With double quantization each weight has an offset of its own, and the whole can have only one. So their scales are
    kept in float32, with the values that they are dequantized to.

    Args:
        name: of the weight that the model holds, for messages.
        shape: of that, (E, out_features, in_features).
        pieces: each stored weight, its region of the whole, and whether it is transposed there.

    Raises:
        CheckpointError: the weights cannot be joined without quantizing them again.
    """
    placed = []
    for stored, region, is_transposed in pieces:
        begin = None if is_transposed else _begin(shape, region)
        if not isinstance(stored, QuantizedTensor) or begin is None:
            raise not_joined(stored.name, name)
        placed.append((begin, stored))
    placed.sort(key=lambda each: each[0])
    parts = [stored for _, stored in placed]
    first = parts[0]
    fmt = first.format
    if not isinstance(fmt, FourBit) or len(shape) != 3:
        raise not_joined(first.name, name)
    for begin, stored in placed:
        numel = stored.shape[0] * stored.shape[1]
        if (stored.format, stored.dtype) != (fmt, first.dtype) or begin % fmt.blocksize or numel % fmt.blocksize:
            raise not_joined(stored.name, name)
    made = replace(fmt, double_quant=False)
    specs = made.parts(shape)

    def joined(part: str, load: Callable[[], torch.Tensor]) -> LazyTensor:
        spec = specs[part]
        return LazyTensor(f"{name}.{part}", first.file, spec.dtype, spec.shape, first.offset, spec.nbytes, load)

    held: dict[str, StoredTensor] = {
        "weight": joined("weight", partial(_joined, parts, _packed)),
        "absmax": joined("absmax", partial(_joined, parts, _scales)),
        "quant_map": first.parts["quant_map"],
    }
    nbytes = sum(part.nbytes for part in held.values())
    return MergedTensor(
        first.name, first.file, first.dtype, shape, first.offset, nbytes, made, held, pieces=tuple(parts)
    )


def not_joined(stored: str, name: str) -> CheckpointError:
    """Return the error for a quantized weight that the model holds as a part of another."""
    return CheckpointError(
        f"'{stored}' is quantized already, but this model combines it with others into '{name}', which needs weights "
        "that are not quantized: use the original checkpoint"
    )


def _begin(shape: tuple[int, ...], region: Sequence[slice | int]) -> int | None:
    """Return where a region begins in the flattened whole; None if it is not contiguous there."""
    part = torch.empty(shape, device="meta")[tuple(region)]
    return int(part.storage_offset()) if part.is_contiguous() else None


def _joined(parts: Sequence[QuantizedTensor], read: Callable[[QuantizedTensor], torch.Tensor]) -> torch.Tensor:
    return torch.cat([read(part) for part in parts])


def _packed(stored: QuantizedTensor) -> torch.Tensor:
    return read_whole(stored.parts["weight"])


def _scales(stored: QuantizedTensor) -> torch.Tensor:
    """Read the scales in float32, as bitsandbytes dequantizes them: QLoRA, arXiv 2305.14314, section 3."""
    parts = {part: read_whole(tensor) for part, tensor in stored.parts.items() if part != "weight"}
    if "nested_absmax" not in parts:
        return parts["absmax"]
    scales = parts["nested_absmax"].repeat_interleave(NESTED_BLOCKSIZE)[: len(parts["absmax"])]
    offset = torch.tensor(stored.nested_offset, dtype=torch.float32)
    return parts["nested_quant_map"][parts["absmax"].long()] * scales + offset
