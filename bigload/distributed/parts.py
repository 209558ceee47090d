"""From what a process has loaded of each tensor to what it holds of it, and to whole tensors, where each holds all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..checkpoint.bitsandbytes import QuantizedTensor
from ..pipeline.execute import LoadedTensor
from ..planning.plan import Plan
from ..planning.planned_tensors import PlannedTensor, Share
from ..quantization.formats import FourBit, Int8, Plain
from ..quantization.quantized_weight import QuantizedWeight
from ..quantization.quantizer import code_table, quantize_scales
from .ranks import Ranks
from .shards import Part, QuantizedShard, Whole


def to_execute(plan: Plan) -> Plan:
    """Return a plan as it is carried out for shares: scales are quantized when those of all processes are known."""
    return replace(plan, tensors=tuple(map(_without_double_quant, plan.tensors)))


def _without_double_quant(planned: PlannedTensor) -> PlannedTensor:
    if not _scales_are_quantized_here(planned):
        return planned
    assert isinstance(planned.format, FourBit)
    return replace(planned, format=replace(planned.format, double_quant=False))


def _scales_are_quantized_here(planned: PlannedTensor) -> bool:
    """Whether a share's scales are to be quantized: with double quantization, unless they are stored so."""
    if planned.share is None or not isinstance(planned.format, FourBit) or not planned.format.double_quant:
        return False
    return not planned.sources or not isinstance(planned.sources[0].tensor, QuantizedTensor)


def placeholder(planned: PlannedTensor, dtype: torch.dtype) -> LoadedTensor:
    """Return what stands for a whole tensor while layers are made: it is on meta.

    Args:
        planned: the tensor.
        dtype: that it is dequantized to.
    """
    parts = {
        name: torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        for name, spec in planned.format.parts(planned.whole_shape).items()
    }
    if isinstance(planned.format, Plain):
        return parts["weight"]
    return QuantizedWeight.from_parts(planned.format, planned.whole_shape, dtype, parts)


class Shares:
    """What the processes have loaded together."""

    def __init__(self, ranks: Ranks, plan: Plan, loaded: dict[str, LoadedTensor]) -> None:
        """Take over what `execute` returned for `to_execute(plan)`; values are taken out of it as they are used."""
        self._ranks, self._plan, self._loaded = ranks, plan, loaded

    def part(self, planned: PlannedTensor) -> nn.Parameter:
        """Return this process's part of a parameter, for fully_shard. A collective, for double quantization."""
        share, value = planned.share, self._loaded.pop(planned.tensor.name, None)
        assert share is not None
        if isinstance(planned.format, Plain):
            assert value is None or isinstance(value, torch.Tensor)
            own = self._plain(value, share, planned.format)
            return _parameter(own, share.whole, share.rank, planned.shape[0], planned.tensor.value.requires_grad)
        packed, scales, whole = self._packed(planned, value)
        shard = QuantizedShard(packed, scales, whole)
        return _parameter(shard, (share.ranks, shard.shape[1]), share.rank, 1, False)

    def gathered(self, planned: PlannedTensor) -> LoadedTensor | None:
        """Return a whole tensor, as one process would have loaded it. A collective."""
        share, value = planned.share, self._loaded.pop(planned.tensor.name, None)
        if share is None:
            if isinstance(value, torch.Tensor) and planned.tensor.is_parameter:
                self._ranks.spread(value)
            return value
        if isinstance(planned.format, Plain):
            assert value is None or isinstance(value, torch.Tensor)
            own = self._plain(value, share, planned.format)
            flat = self._ranks.gather(own.view(-1).view(torch.uint8)).view(own.dtype)
            return _kept(flat, share.whole)
        packed, scales, whole = self._packed(planned, value)
        whole_packed = self._ranks.gather(packed.view(torch.uint8)).view(packed.dtype)
        whole_scales = self._ranks.gather(scales.view(torch.uint8)).view(scales.dtype)
        made = whole.parameter(whole_packed, whole_scales)
        if isinstance(planned.format, Int8):
            return QuantizedWeight(_kept(made.data, share.whole), row_scales=made.SCB.clone())
        made.quant_state.absmax = made.quant_state.absmax.clone()  # not more memory than its own
        return QuantizedWeight(_kept(made.data, tuple(made.shape)), quant_state=made.quant_state)

    def _plain(self, value: torch.Tensor | None, share: Share, fmt: Plain) -> torch.Tensor:
        """Return the padded share of a tensor that is not quantized, the same in each copy of the model.

        What no checkpoint holds, a new head, each process has initialised for itself.
        """
        own = _padded(value, share.padded, fmt.dtype, self._ranks.device)
        self._ranks.spread(own, among_replicas=True)
        return own

    def _packed(self, planned: PlannedTensor, value: Any) -> tuple[torch.Tensor, torch.Tensor, Whole]:
        """Return the padded packed values and scales of a quantized share, and what is known of the whole."""
        share, fmt, device = planned.share, planned.format, self._ranks.device
        assert share is not None
        assert isinstance(fmt, (FourBit, Int8))
        specs = fmt.parts(share.padded)
        parts: Mapping[str, torch.Tensor] = {} if value is None else value.parts
        packed_spec, scales_spec = specs["weight"], specs["SCB" if isinstance(fmt, Int8) else "absmax"]
        packed = _padded(parts.get("weight"), packed_spec.shape, packed_spec.dtype, device).view(-1)
        if isinstance(fmt, Int8):
            scales = _padded(parts.get("SCB"), scales_spec.shape, scales_spec.dtype, device)
            return packed, scales, Whole(planned.tensor.name, fmt, share.whole)
        own = parts.get("absmax")
        held = {name: tensor for name, tensor in parts.items() if name not in ("weight", "absmax")}
        if _scales_are_quantized_here(planned):
            own, nested = self._quantized_scales(planned, own)
            held |= nested
        scales = _padded(own, scales_spec.shape, scales_spec.dtype, device)
        held.setdefault("quant_map", code_table(fmt.quant_type, device).clone())
        held["absmax"] = torch.empty(0, device="meta")
        dtype = self._plan.config.load_dtype if value is None else value.quant_state.dtype
        weight = QuantizedWeight.from_parts(fmt, share.whole, dtype, {"weight": packed, **held})
        storage = self._plan.config.bnb_4bit_quant_storage
        assert isinstance(storage, torch.dtype)
        return packed, scales, Whole(planned.tensor.name, fmt, share.whole, weight.quant_state, storage)

    def _quantized_scales(
        self, planned: PlannedTensor, own: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Quantize the scales of a weight, as double quantization does: their mean and blocks are the whole's.

        Returns:
            This process's scales, uint8, and the parts that all processes have.
        """
        share, fmt = planned.share, planned.format
        assert share is not None
        assert isinstance(fmt, FourBit)
        each = fmt.parts(share.padded)["absmax"].shape[0]
        mine = _padded(own, (each,), torch.float32, self._ranks.device)
        whole = self._ranks.gather(mine)[: fmt.parts(share.whole)["absmax"].shape[0]]
        made = quantize_scales(whole)
        first = share.begin // fmt.blocksize
        count = -(-(share.end - share.begin) // fmt.blocksize)
        return made.pop("absmax")[first : first + count].clone(), made


def _parameter(own: torch.Tensor, shape: tuple[int, ...], rank: int, rows: int, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(Part(own, shape, rank, rows), requires_grad=requires_grad)


def _padded(
    value: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return a tensor with zeros after its values, in memory of its own; itself if nothing is missing."""
    if value is not None and tuple(value.shape) == tuple(shape) and value.untyped_storage().nbytes() == value.nbytes:
        return value
    made = torch.zeros(shape, dtype=dtype, device=device)
    if value is not None and value.numel():
        made.view(-1)[: value.numel()].copy_(value.reshape(-1))
    return made


def _kept(flat: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the first values as a tensor that keeps no more memory than they take."""
    count = torch.Size(shape).numel()
    values = flat.reshape(-1)[:count].view(shape)
    return values if values.untyped_storage().nbytes() == values.nbytes else values.clone()
