"""A quantized tensor written in pieces as its values come: what lies in files for it, and what each piece becomes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from ..checkpoint.bitsandbytes import described, stored_name
from ..checkpoint.writer import Entry, ShardWriter
from ..config import BnbQuantizationConfig
from ..errors import QuantizationError
from ..hardware.layout import TensorSpec
from ..io.extents import Delivery
from ..planning.planned_tensors import PlannedTensor
from ..quantization.formats import FourBit, Int8, Plain
from ..quantization.quantizer import Quantizer, code_table, quantize_scales
from .execute import Finish, put_together, streamed


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
        sizes = dict(fmt.parts(planned.shape))
        if isinstance(fmt, Int8):
            sizes["weight_format"] = TensorSpec(torch.uint8, ())
        elif isinstance(fmt, FourBit):
            sizes.pop("nested_offset", None)  # which is a number in the description
            part = f"quant_state.bitsandbytes__{fmt.quant_type}"
            sizes[part] = TensorSpec(torch.uint8, (len(self.described(0.0)),))
        self.entries = {part: Entry(stored_name(name, part), *size) for part, size in sizes.items()}

    @property
    def names(self) -> list[str]:
        """Names of all that is written."""
        return [entry.name for entry in self.entries.values()]

    def described(self, offset: float) -> bytes:
        """Give the JSON that describes a 4-bit weight."""
        assert isinstance(self.planned.format, FourBit)
        return described(self.planned.format, self.planned.shape, self.config.landing_dtype, offset)


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
        fmt, entries = self._format, self._output.entries
        if not bool(self._scales.isfinite().all()):
            raise QuantizationError(
                f"'{self._output.planned.tensor.name}': values that are not finite in this format; if the checkpoint's "
                "own are finite, add it to skip_modules or choose another mode or torch_dtype"
            )
        if isinstance(fmt, Int8):
            parts = {"SCB": self._scales, "weight_format": torch.zeros((), dtype=torch.uint8)}
        else:
            parts = {"quant_map": code_table(fmt.quant_type, self._scales.device)}
            parts |= quantize_scales(self._scales) if fmt.double_quant else {"absmax": self._scales}
            offset = parts.pop("nested_offset").item() if fmt.double_quant else 0.0
            said = bytearray(self._output.described(offset))
            parts[f"quant_state.bitsandbytes__{fmt.quant_type}"] = torch.frombuffer(said, dtype=torch.uint8)
        for part, tensor in parts.items():
            self._writer.write(entries[part].name, tensor)
        self._writer.complete(entries["weight"].name)
        del self._scales
