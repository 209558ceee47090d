"""Where weights that are not computed where they rest come to rest: in host memory, or in files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager

import torch

from ..hardware.devices import CPU
from ..hardware.layout import TensorSpec
from ..hardware.pinned import HostGroup, Store
from ..planning.plan import PlacedUnit, Plan
from ..planning.planned_tensors import PlannedTensor
from ..quantization.bnb import QuantizedWeight
from ..quantization.formats import Plain
from ..quantization.quantizer import weight_of
from .files import FileGroup, FilePart
from .weight_cache import WeightCache

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
    """The homes of a plan's offloaded units: host memory is made, and pinned, by threads while the load reads.

    Attributes:
        spared_bytes: of the checkpoint, that need not be read since what they become is in files already.
    """

    def __init__(self, plan: Plan, *, pin: bool, folder: str | os.PathLike[str] | None = None) -> None:
        """Begin to make them.

        Args:
            plan: what rests where.
            pin: whether GPUs shall read host memory at the full speed of their link.
            folder: for what rests on the disk and is not in the checkpoint as it shall be.
        """
        self.spared_bytes = 0
        self._torch_dtype = plan.config.landing_dtype
        self._cache = WeightCache(folder, self._torch_dtype)
        self._files: dict[str, dict[str, FilePart]] = {}
        self._pool = ThreadPoolExecutor(_THREADS, "bigload-pinning")
        self._groups: dict[int, Future[HostGroup]] = {}
        self._unit_of: dict[str, PlacedUnit] = {}
        for placed in plan.offloaded:
            if placed.home == CPU and placed.streamed_bytes:
                for planned in placed.unit.offloaded:
                    self._unit_of[planned.tensor.name] = placed
                device = placed.device if pin else CPU
                self._groups[id(placed)] = self._pool.submit(HostGroup, _parts(placed), device)

    def group(self, placed: PlacedUnit) -> Store:
        """Give the store of a unit that has come to rest."""
        if placed.home == CPU:
            return self._groups[id(placed)].result()
        return FileGroup(
            {
                planned.tensor.name + _NAMES[part]: where
                for planned in placed.unit.offloaded
                for part, where in self._files[planned.tensor.name].items()
            }
        )

    def memory(self, planned: PlannedTensor) -> Mapping[str, torch.Tensor]:
        """Give the host memory of a tensor's parts, by their names in its format, to be filled; none if it is new."""
        placed = self._unit_of.get(planned.tensor.name)
        if placed is None:
            return {}
        tensors, name = self._groups[id(placed)].result().tensors, planned.tensor.name
        return {part: tensors[name + end] for part, end in _NAMES.items() if name + end in tensors}

    def known(self, planned: PlannedTensor) -> torch.Tensor | QuantizedWeight | None:
        """Give a tensor that is in files already, as it rests there; None for one that must be read first."""
        parts = self._cache.parts(planned) if planned.home == "disk" else None
        if parts is None:
            return None
        self.spared_bytes += sum(source.tensor.nbytes for source in planned.sources)
        return self._in_files(planned, parts)

    def put(self, planned: PlannedTensor, value: torch.Tensor | QuantizedWeight) -> torch.Tensor | QuantizedWeight:
        """Bring to rest what has landed on a device; copies into host memory may go on when this returns.

        Raises:
            OffloadError: a file cannot be written.
        """
        if planned.home == "disk":
            return self._in_files(planned, self._cache.put(planned, _tensors_of(value)))
        memory = self.memory(planned)
        parts = {part: _copied(tensor, memory.get(part)) for part, tensor in _tensors_of(value).items()}
        if isinstance(value, torch.Tensor):
            return parts["weight"]
        return weight_of(planned, self._torch_dtype, parts)

    def _in_files(self, planned: PlannedTensor, parts: dict[str, FilePart]) -> torch.Tensor | QuantizedWeight:
        self._files[planned.tensor.name] = parts
        tensors = FileGroup(parts).tensors
        if isinstance(planned.format, Plain):
            return tensors["weight"]
        return weight_of(planned, self._torch_dtype, tensors)

    def __exit__(self, *raised: object) -> None:
        self._pool.shutdown()


def _parts(placed: PlacedUnit) -> dict[str, TensorSpec]:
    return {
        planned.tensor.name + _NAMES[part]: size
        for planned in placed.unit.offloaded
        for part, size in planned.format.parts(planned.shape).items()
    }


def _tensors_of(value: torch.Tensor | QuantizedWeight) -> dict[str, torch.Tensor]:
    """Give the parts of what has landed, by their names in its format."""
    if isinstance(value, torch.Tensor):
        return {"weight": value}
    if value.row_scales is not None:
        return {"weight": value.data, "SCB": value.row_scales}
    state = value.quant_state
    parts = {"weight": value.data, "absmax": state.absmax, "quant_map": state.code}
    if state.nested:
        inner = state.state2
        parts |= {"nested_offset": state.offset, "nested_absmax": inner.absmax, "nested_quant_map": inner.code}
    return parts


def _copied(tensor: torch.Tensor, there: torch.Tensor | None) -> torch.Tensor:
    """Copy a part into the memory that its group is streamed from, where it was not read straight into it."""
    if there is None:
        return tensor.cpu()
    return there if there is tensor else there.copy_(tensor, non_blocking=True)
