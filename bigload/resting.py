"""Host memory for weights that will rest there: made, and pinned, by threads while the load reads."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager

import torch

from .bnb import QuantizedWeight
from .devices import CPU
from .formats import Part
from .host import HostGroup
from .plan import PlacedUnit, Plan

# How what streams a layer names the parts of its weight, after the weight's own name: see cells.py.
_NAMES = {
    "weight": "",
    "absmax": ".absmax",
    "quant_map": ".code",
    "nested_offset": ".offset",
    "nested_absmax": ".state2.absmax",
    "nested_quant_map": ".state2.code",
    "SCB": ".SCB",
}
# Pinning is the system's work more than the cores'.
_THREADS = 2


class Resting(AbstractContextManager["Resting"]):
    """The host memory of a plan's offloaded units."""

    def __init__(self, plan: Plan, *, pin: bool) -> None:
        """Begin to make it.

        Args:
            plan: what rests where.
            pin: whether GPUs shall read it at the full speed of their link.
        """
        self._pool = ThreadPoolExecutor(_THREADS, "bigload-pinning")
        self._groups: dict[int, Future[HostGroup]] = {}
        self._unit_of: dict[str, PlacedUnit] = {}
        for placed in plan.offloaded:
            if placed.streamed_bytes:
                for planned in placed.unit.offloaded:
                    self._unit_of[planned.tensor.name] = placed
                device = placed.device if pin else CPU
                self._groups[id(placed)] = self._pool.submit(HostGroup, _parts(placed), device)

    def group(self, placed: PlacedUnit) -> HostGroup:
        """Give a unit's memory, when it is there."""
        return self._groups[id(placed)].result()

    def views(self, name: str) -> Mapping[str, torch.Tensor] | None:
        """Give the memory of a tensor's parts, by their names in its format; None where it does not stream."""
        placed = self._unit_of.get(name)
        if placed is None:
            return None
        tensors = self.group(placed).tensors
        return {part: tensors[name + end] for part, end in _NAMES.items() if name + end in tensors}

    def __exit__(self, *raised: object) -> None:
        self._pool.shutdown()


def _parts(placed: PlacedUnit) -> dict[str, Part]:
    return {
        planned.tensor.name + _NAMES[part]: size
        for planned in placed.unit.offloaded
        for part, size in planned.format.parts(planned.shape).items()
    }


def put_to_rest(weight: QuantizedWeight, views: Mapping[str, torch.Tensor] | None) -> QuantizedWeight:
    """Bring what was quantized on a device to its memory on the host; the copies may go on when this returns.

    Args:
        weight: on the device, or in part there already.
        views: from `Resting.views`; None makes memory of its own.
    """

    def put(part: str, tensor: torch.Tensor) -> torch.Tensor:
        if views is None:
            return tensor.cpu()
        there = views[part]
        return there if there is tensor else there.copy_(tensor, non_blocking=True)

    data, state = put("weight", weight.data), weight.quant_state
    if weight.row_scales is not None:
        return QuantizedWeight(data, row_scales=put("SCB", weight.row_scales))
    state.absmax, state.code = put("absmax", state.absmax), put("quant_map", state.code)
    if state.nested:
        inner = state.state2
        state.offset = put("nested_offset", state.offset)
        inner.absmax, inner.code = put("nested_absmax", inner.absmax), put("nested_quant_map", inner.code)
    return QuantizedWeight(data, quant_state=state)
