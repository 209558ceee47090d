"""Tensors written to safetensors files piece by piece, as their values come, and quantized on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from ..checkpoint.bitsandbytes import described, stored_name
from ..checkpoint.writer import Entry, ShardWriter
from ..config import BnbQuantizationConfig
from ..errors import QuantizationError
from ..hardware.layout import TensorSpec
from ..planning.planned_tensors import PlannedTensor
from ..quantization.formats import FourBit, Int8, Plain
from ..quantization.quantizer import Quantizer, code_table, quantize_scales
from .sinks import PieceSink, Sink, gathered_if_needed


@dataclass
class Output:
    """A tensor of the model and its entries in the files.

    Attributes:
        planned: the tensor.
        config: the config, with every "auto" resolved.
        entries: bitsandbytes' name of each part -> its entry.
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
            sizes.pop("nested_offset", None)  # a number in the JSON of the quant_state
            part = f"quant_state.bitsandbytes__{fmt.quant_type}"
            sizes[part] = TensorSpec(torch.uint8, (len(self.described(0.0)),))
        self.entries = {part: Entry(stored_name(name, part), *size) for part, size in sizes.items()}

    @property
    def names(self) -> list[str]:
        """The names of the entries."""
        return [entry.name for entry in self.entries.values()]

    def described(self, offset: float) -> bytes:
        """Return the JSON that describes a 4-bit weight.

        Args:
            offset: with double quantization, the mean of its absmax.
        """
        assert isinstance(self.planned.format, FourBit)
        return described(self.planned.format, self.planned.shape, self.config.load_dtype, offset)


def file_sink(output: Output, writer: ShardWriter, planned: PlannedTensor) -> Sink:
    """Make the sink that writes a tensor's values to files, in its format."""
    fmt = planned.format
    if isinstance(fmt, Plain):
        return gathered_if_needed(_PlainFileSink(output, writer, planned, fmt))
    return gathered_if_needed(_QuantizedFileSink(output, writer, planned, fmt))


class _PlainFileSink(PieceSink):
    def __init__(self, output: Output, writer: ShardWriter, planned: PlannedTensor, fmt: Plain) -> None:
        super().__init__(planned, fmt.dtype)
        self._name, self._writer = output.entries["weight"].name, writer

    def take(self, values: torch.Tensor, begin: int) -> None:
        self._writer.write_values(self._name, begin * values.dtype.itemsize, values)

    def finish(self) -> None:
        self._writer.complete(self._name)


class _QuantizedFileSink(PieceSink):
    """Quantizes values and writes them; the scales are kept until the end."""

    def __init__(self, output: Output, writer: ShardWriter, planned: PlannedTensor, fmt: FourBit | Int8) -> None:
        self._per_scale = fmt.values_per_scale(planned.shape)
        super().__init__(planned, output.config.load_dtype, self._per_scale)
        self._output, self._writer, self._format = output, writer, fmt
        self._made: torch.Tensor | None = None

    @property
    def _scales(self) -> torch.Tensor:
        """The scales, allocated when the first are there: memory of a weight before is used again."""
        if self._made is None:
            count = -(-math.prod(self.planned.shape) // self._per_scale)
            self._made = torch.empty(count, dtype=torch.float32, device=self.planned.device)
        return self._made

    def take(self, values: torch.Tensor, begin: int) -> None:
        fmt, name = self._format, self._output.entries["weight"].name
        shape = (len(values) // self._per_scale, self._per_scale) if isinstance(fmt, Int8) else (1, len(values))
        # Double quantization needs the scales of all pieces.
        piece_format = fmt if isinstance(fmt, Int8) else FourBit(fmt.quant_type, fmt.blocksize, False, torch.uint8)
        quantizer = Quantizer(shape, piece_format, values.dtype, values.device)
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
                f"'{self._output.planned.tensor.name}': values that are not finite in this format; if the "
                "checkpoint's own are finite, add it to skip_modules or choose another mode or torch_dtype"
            )
        if isinstance(fmt, Int8):
            parts = {"SCB": self._scales, "weight_format": torch.zeros((), dtype=torch.uint8)}
        else:
            parts = {"quant_map": code_table(fmt.quant_type, self._scales.device)}
            parts |= quantize_scales(self._scales) if fmt.double_quant else {"absmax": self._scales}
            offset = parts.pop("nested_offset").item() if fmt.double_quant else 0.0
            state = bytearray(self._output.described(offset))
            parts[f"quant_state.bitsandbytes__{fmt.quant_type}"] = torch.frombuffer(state, dtype=torch.uint8)
        for part, tensor in parts.items():
            self._writer.write(entries[part].name, tensor)
        self._writer.complete(entries["weight"].name)
        self._made = None
