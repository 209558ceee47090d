"""A quantized tensor written in pieces as its values come: what lies in files for it, and what each piece becomes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from ..checkpoint.writer import Entry, ShardWriter
from ..config import BnbQuantizationConfig
from ..errors import QuantizationError
from ..io.extents import Delivery
from ..planning.planned_tensors import PlannedTensor
from ..quantization.formats import NESTED_BLOCKSIZE, TABLES, FourBit, Int8, Plain
from ..quantization.quantizer import Quantizer, code_table, quantize_scales
from .execute import Finish, put_together, streamed

# The longest that JSON makes of a float.
_LONGEST_FLOAT = 25


@dataclass
class Output:
    """A tensor of the model as it will lie in files.

    Attributes:
        planned: the tensor.
        config: resolved.
        entries: what is written for it, by bitsandbytes' names of the parts.
    """

    planned: PlannedTensor
    config: BnbQuantizationConfig
    entries: dict[str, Entry] = field(init=False)

    def __post_init__(self) -> None:
        planned, name, fmt = self.planned, self.planned.tensor.name, self.planned.format
        if isinstance(fmt, Plain):
            shape = planned.shape
            self.entries = {"weight": Entry(name, fmt.dtype, shape)}
            return
        sizes = dict(fmt.parts(planned.shape))
        if isinstance(fmt, Int8):
            prefix = name.removesuffix("weight")
            self.entries = {
                "weight": Entry(name, *sizes["weight"]),
                "SCB": Entry(f"{prefix}SCB", *sizes["SCB"]),
                "weight_format": Entry(f"{prefix}weight_format", torch.uint8, ()),
            }
            return
        self.entries = {"weight": Entry(name, *sizes["weight"])}
        for part in ("absmax", "nested_absmax", *TABLES):
            if part in sizes:
                self.entries[part] = Entry(f"{name}.{part}", *sizes[part])
        part = f"quant_state.bitsandbytes__{fmt.quant_type}"
        self.entries["described"] = Entry(f"{name}.{part}", torch.uint8, (len(self.described(0.0)),))

    @property
    def names(self) -> list[str]:
        """Names of all that is written."""
        return [entry.name for entry in self.entries.values()]

    def described(self, offset: float) -> bytes:
        """Give the JSON that bitsandbytes describes a 4-bit weight by, of a length that no value changes."""
        fmt = self.planned.format
        assert isinstance(fmt, FourBit)
        said: dict[str, Any] = {
            "quant_type": fmt.quant_type,
            "blocksize": fmt.blocksize,
            "dtype": str(self.config.landing_dtype).removeprefix("torch."),
            "shape": list(self.planned.shape),
        }
        if not fmt.double_quant:
            return json.dumps(said).encode()
        said |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32"}
        longest = len(json.dumps(said | {"nested_offset": 0})) - 1 + _LONGEST_FLOAT
        return json.dumps(said | {"nested_offset": offset}).encode().ljust(longest)


def prepare_pieces(output: Output, writer: ShardWriter, planned: PlannedTensor) -> tuple[list[Delivery], Finish]:
    """Give a delivery for each source, whose pieces are written as they come: see `pipeline.deliveries_for`.

    The finish raises a QuantizationError where values are not finite in the format.
    """
    fmt, dtype, granule = planned.format, output.config.landing_dtype, 1
    pieces: _Pieces
    if isinstance(fmt, Plain):
        dtype, pieces = fmt.dtype, _PlainPieces(output, writer)
    else:
        granule, pieces = fmt.granule(planned.shape), _QuantizedPieces(output, writer, fmt)
    deliveries = streamed(planned, dtype, granule, pieces.add)
    if deliveries is not None:
        return deliveries, pieces.finish

    def use(whole: torch.Tensor) -> None:
        pieces.add(whole.contiguous().view(-1), 0)
        pieces.finish()

    return put_together(planned, dtype, use)


class _Pieces:
    """Takes a tensor in pieces and writes what becomes of each."""

    def __init__(self, output: Output, writer: ShardWriter) -> None:
        self._output, self._writer = output, writer

    def add(self, values: torch.Tensor, begin: int) -> None:
        """Take values, from the index of the first of them in the flattened tensor on."""
        raise NotImplementedError

    def finish(self) -> None:
        """Write what is known only when all values have been taken."""
        for name in self._output.names:
            self._writer.complete(name)


class _PlainPieces(_Pieces):
    def add(self, values: torch.Tensor, begin: int) -> None:
        self._writer.write_values(self._output.planned.tensor.name, begin * values.dtype.itemsize, values)


class _QuantizedPieces(_Pieces):
    def __init__(self, output: Output, writer: ShardWriter, fmt: FourBit | Int8) -> None:
        super().__init__(output, writer)
        self._format = fmt
        self._per_scale = fmt.granule(output.planned.shape)
        scales = -(-math.prod(output.planned.shape) // self._per_scale)
        self._scales = torch.empty(scales, dtype=torch.float32, device=output.planned.device)

    def add(self, values: torch.Tensor, begin: int) -> None:
        fmt, name = self._format, self._output.planned.tensor.name
        shape = (len(values) // self._per_scale, self._per_scale) if isinstance(fmt, Int8) else (1, len(values))
        alone = fmt if isinstance(fmt, Int8) else FourBit(fmt.quant_type, fmt.blocksize, False, torch.uint8)
        quantizer = Quantizer(shape, alone, values.dtype, values.device)
        quantizer.add(values, 0)
        made = quantizer.finish()
        (scales,) = made.scales
        at = begin // self._per_scale
        self._scales[at : at + len(scales)] = scales
        self._writer.write_values(name, begin if isinstance(fmt, Int8) else begin // 2, made.data)

    def finish(self) -> None:
        fmt, entries, write = self._format, self._output.entries, self._write
        if not bool(self._scales.isfinite().all()):
            raise QuantizationError(
                f"'{self._output.planned.tensor.name}': values that are not finite in this format; if the checkpoint's "
                "own are finite, add it to skip_modules or choose another mode or torch_dtype"
            )
        if isinstance(fmt, Int8):
            write("SCB", self._scales)
            write("weight_format", torch.zeros((), dtype=torch.uint8))
        else:
            write("quant_map", code_table(fmt.quant_type, self._scales.device))
            offset = 0.0
            if fmt.double_quant:
                scales, taken, nested = quantize_scales(self._scales)
                offset = taken.item()
                write("absmax", scales)
                write("nested_absmax", nested.absmax)
                write("nested_quant_map", nested.code)
            else:
                write("absmax", self._scales)
            described = bytearray(self._output.described(offset))
            write("described", torch.frombuffer(described, dtype=torch.uint8))
        self._writer.complete(entries["weight"].name)
        del self._scales

    def _write(self, part: str, tensor: torch.Tensor) -> None:
        self._writer.write(self._output.entries[part].name, tensor)
