"""Where weights that are not computed where they rest come to rest: in host memory, or in files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager

import torch

from ..checkpoint.bitsandbytes import QuantizedTensor
from ..hardware.devices import CPU
from ..hardware.layout import TensorSpec
from ..hardware.pinned import HostGroup, Store
from ..planning.plan import PlacedUnit, Plan
from ..planning.planned_tensors import PlannedTensor
from ..quantization.formats import Plain, part_name
from ..quantization.quantized_weight import QuantizedWeight
from .files import FileGroup, FilePart
from .weight_cache import WeightCache

# Pinning is the system's work more than the cores'.
_THREADS = 2


class OffloadTargets(AbstractContextManager["OffloadTargets"]):
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
        self._torch_dtype = plan.config.load_dtype
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
                self._groups[id(placed)] = self._pool.submit(HostGroup, _specs_of(placed), device)

    def store_of(self, placed: PlacedUnit) -> Store:
        """Return the store of a unit that has come to rest."""
        if placed.home == CPU:
            return self._groups[id(placed)].result()
        return FileGroup(
            {
                part_name(planned.tensor.name, part): where
                for planned in placed.unit.offloaded
                for part, where in self._files[planned.tensor.name].items()
            }
        )

    def host_buffers(self, planned: PlannedTensor) -> Mapping[str, torch.Tensor]:
        """Return the host memory of a tensor's parts, by their names in its format, to be filled; none if it is new."""
        placed = self._unit_of.get(planned.tensor.name)
        if placed is None:
            return {}
        tensors, name = self._groups[id(placed)].result().tensors, planned.tensor.name
        return {part: tensors[part_name(name, part)] for part in planned.format.parts(planned.shape)}

    def find_cached(self, planned: PlannedTensor) -> torch.Tensor | QuantizedWeight | None:
        """Return a tensor that is in files already, as it rests there; None for one that must be read first."""
        parts = self._cache.parts(planned) if planned.home == "disk" else None
        if parts is None:
            return None
        self.spared_bytes += sum(source.tensor.nbytes for source in planned.sources)
        return self._view_files(planned, parts)

    def offload(self, planned: PlannedTensor, value: torch.Tensor | QuantizedWeight) -> torch.Tensor | QuantizedWeight:
        """Bring to rest what has landed on a device; copies into host memory may go on when this returns.

        Raises:
            OffloadError: a file cannot be written.
        """
        if planned.home == "disk":
            return self._view_files(planned, self._cache.put(planned, _parts_of(value)))
        memory = self.host_buffers(planned)
        parts = {part: _copy_to_host(tensor, memory.get(part)) for part, tensor in _parts_of(value).items()}
        return self._weight_of(planned, parts)

    def _view_files(self, planned: PlannedTensor, parts: dict[str, FilePart]) -> torch.Tensor | QuantizedWeight:
        self._files[planned.tensor.name] = parts
        return self._weight_of(planned, FileGroup(parts).tensors)

    def _weight_of(self, planned: PlannedTensor, parts: Mapping[str, torch.Tensor]) -> torch.Tensor | QuantizedWeight:
        """Make the weight whose parts are at rest."""
        if isinstance(planned.format, Plain):
            return parts["weight"]
        stored = planned.sources[0].tensor
        dtype = stored.dtype if isinstance(stored, QuantizedTensor) else self._torch_dtype
        return QuantizedWeight.from_parts(planned.format, planned.shape, dtype, parts)

    def __exit__(self, *raised: object) -> None:
        self._pool.shutdown()


def _specs_of(placed: PlacedUnit) -> dict[str, TensorSpec]:
    return {
        part_name(planned.tensor.name, part): size
        for planned in placed.unit.offloaded
        for part, size in planned.format.parts(planned.shape).items()
    }


def _parts_of(value: torch.Tensor | QuantizedWeight) -> Mapping[str, torch.Tensor]:
    return {"weight": value} if isinstance(value, torch.Tensor) else value.parts


def _copy_to_host(tensor: torch.Tensor, there: torch.Tensor | None) -> torch.Tensor:
    """Copy a part into the memory that its group is streamed from, where it was not read straight into it."""
    if there is None:
        return tensor.cpu()
    return there if there is tensor else there.copy_(tensor, non_blocking=True)
