"""The formats of a weight: the tensors that it consists of, and their exact bytes. Pure; imports no kernel."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ..config import FLOATS
from ..hardware.layout import Shape, TensorSpec

# Scales that share a scale in double quantization: bitsandbytes' own constant.
NESTED_BLOCKSIZE = 256
# bitsandbytes' code tables, and the number of values in each.
TABLES = {"quant_map": 16, "nested_quant_map": 256}


def part_name(weight: str, part: str) -> str:
    """Return a part's full name: the weight's own for the part "weight", otherwise "<weight>.<part>"."""
    return weight if part == "weight" else f"{weight}.{part}"


@dataclass(frozen=True)
class Plain:
    """Not quantized."""

    dtype: torch.dtype

    def parts(self, shape: Shape) -> dict[str, TensorSpec]:
        """Return the parts of a weight of this shape, by name."""
        return {"weight": TensorSpec(self.dtype, shape)}


@dataclass(frozen=True)
class Int8:
    """LLM.int8(): weight = CB * SCB / 127, with one scale for each row (arXiv 2208.07339, section 2)."""

    def parts(self, shape: Shape) -> dict[str, TensorSpec]:
        """Return the parts of a weight of shape (out_features, in_features), by name."""
        return {"weight": TensorSpec(torch.int8, shape), "SCB": TensorSpec(torch.float32, shape[:1])}

    def values_per_scale(self, shape: Shape) -> int:
        """Return how many consecutive values share a scale: those of a row."""
        return max(1, shape[-1])


@dataclass(frozen=True)
class FourBit:
    """QLoRA: two values in a byte, one scale for each block of values (arXiv 2305.14314, section 3).

    Each weight has its own code tables, since tensors that share memory cannot be saved as safetensors.
    """

    quant_type: str
    blocksize: int
    double_quant: bool
    quant_storage: torch.dtype

    def parts(self, shape: Shape) -> Mapping[str, TensorSpec]:
        """Return the parts of a weight of this shape, by name.

        Raises:
            ValueError: the packed bytes are not a whole number of elements of `quant_storage`.
        """
        return _four_bit_parts(self, shape)

    def values_per_scale(self, shape: Shape) -> int:
        """Return how many consecutive values share a scale: the blocksize, whatever the shape."""
        return self.blocksize


@functools.lru_cache(maxsize=256)
def _four_bit_parts(fmt: FourBit, shape: Shape) -> Mapping[str, TensorSpec]:
    # A model has hundreds of layers of few shapes, and a load asks several times for each.
    numel = math.prod(shape)
    packed, blocks = (numel + 1) // 2, -(-numel // fmt.blocksize)
    if packed % fmt.quant_storage.itemsize:
        raise ValueError(f"{packed} packed bytes do not divide into elements of {fmt.quant_storage}")
    weight = TensorSpec(fmt.quant_storage, (packed // fmt.quant_storage.itemsize, 1))
    if not fmt.double_quant:
        return {"weight": weight, "absmax": TensorSpec(torch.float32, (blocks,)), "quant_map": _table("quant_map")}
    return {
        "weight": weight,
        "absmax": TensorSpec(torch.uint8, (blocks,)),
        "nested_absmax": TensorSpec(torch.float32, (-(-blocks // NESTED_BLOCKSIZE),)),
        "nested_offset": TensorSpec(torch.float32, ()),
        "quant_map": _table("quant_map"),
        "nested_quant_map": _table("nested_quant_map"),
    }


def _table(name: str) -> TensorSpec:
    return TensorSpec(torch.float32, (TABLES[name],))


Format = Plain | Int8 | FourBit


def dominant_dtype(tensors: Iterable[tuple[torch.dtype, int]]) -> torch.dtype:
    """Return the 16 or 32 bit floating dtype of most bytes; float32 where there is none.

    Args:
        tensors: dtype and bytes of each tensor.
    """
    count: Counter[torch.dtype] = Counter()
    for dtype, size in tensors:
        if dtype in FLOATS.values():
            count[dtype] += size
    return count.most_common(1)[0][0] if count else torch.float32


def nbytes(fmt: Format, shape: Shape, multiple: int = 1) -> int:
    """Return the bytes of a weight of this shape, with each part rounded up to a multiple of `multiple`."""
    if isinstance(fmt, Plain):  # most of the tensors: one part
        return -(-math.prod(shape) * fmt.dtype.itemsize // multiple) * multiple
    return _quantized_nbytes(fmt, shape, multiple)


@functools.lru_cache(maxsize=256)
def _quantized_nbytes(fmt: Int8 | FourBit, shape: Shape, multiple: int) -> int:
    return sum(-(-part.nbytes // multiple) * multiple for part in fmt.parts(shape).values())
