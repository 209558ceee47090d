"""Where a load puts offloaded weights: into host memory, or into files."""

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
from ..planning.placing.accounts import PlacedUnit
from ..planning.plan import Plan
from ..planning.planned_tensors import PlannedTensor
from ..quantization.formats import Plain, part_name
from ..quantization.quantized_weight import QuantizedWeight
from .files import FileGroup, FilePart, Mappings
from .weight_cache import WeightCache

# Pinning takes the kernel's time, which more threads do not shorten.
_THREADS = 2


class OffloadTargets(AbstractContextManager["OffloadTargets"]):
    """The stores of a plan's offloaded units. Threads allocate and pin host memory while the load reads.

    Attributes:
        spared_bytes: bytes of the checkpoint that need not be read, since their weights are in files already.
    """

    def __init__(self, plan: Plan, *, pin: bool, folder: str | os.PathLike[str] | None = None) -> None:
        """Start the threads.

        Args:
            plan: which units are offloaded, and where to.
            pin: whether to pin host memory, which GPUs then read at the full speed of their link.
            folder: for weights on the disk that the checkpoint does not hold in their final form.
        """
        self.spared_bytes = 0
        self._torch_dtype = plan.config.load_dtype
        self._cache = WeightCache(folder, self._torch_dtype)
        self._files: dict[str, dict[str, FilePart]] = {}
        self._mappings = Mappings()
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
        """Return the store of a unit whose weights are all offloaded."""
        if placed.home == CPU:
            return self._groups[id(placed)].result()
        return FileGroup(
            {
                part_name(planned.tensor.name, part): where
                for planned in placed.unit.offloaded
                for part, where in self._files[planned.tensor.name].items()
            },
            self._mappings,
        )

    def host_buffers(self, planned: PlannedTensor) -> Mapping[str, torch.Tensor]:
        """Return the host memory of a tensor's parts, to be filled, by their names in its format; {} on the disk."""
        placed = self._unit_of.get(planned.tensor.name)
        if placed is None:
            return {}
        tensors, name = self._groups[id(placed)].result().tensors, planned.tensor.name
        return {part: tensors[part_name(name, part)] for part in planned.format.parts(planned.shape)}

    def find_cached(self, planned: PlannedTensor) -> torch.Tensor | QuantizedWeight | None:
        """Return a tensor that is in files already, as a view of them; None if it must be loaded first."""
        parts = self._cache.parts(planned) if planned.home == "disk" else None
        if parts is None:
            return None
        self.spared_bytes += sum(source.tensor.nbytes for source in planned.sources)
        return self._view_files(planned, parts)

    def offload(self, planned: PlannedTensor, value: torch.Tensor | QuantizedWeight) -> torch.Tensor | QuantizedWeight:
        """Copy a loaded tensor to host memory, or write it to a file, and return it there.

        Copies from a GPU may still be running when this returns.

        Raises:
            OffloadError: a file cannot be written.
        """
        if planned.home == "disk":
            return self._view_files(planned, self._cache.put(planned, _parts_of(value)))
        buffers = self.host_buffers(planned)
        parts = {part: _copy_to_host(tensor, buffers.get(part)) for part, tensor in _parts_of(value).items()}
        return self._weight_of(planned, parts)

    def _view_files(self, planned: PlannedTensor, parts: dict[str, FilePart]) -> torch.Tensor | QuantizedWeight:
        self._files[planned.tensor.name] = parts
        return self._weight_of(planned, FileGroup(parts, self._mappings).tensors)

    def _weight_of(self, planned: PlannedTensor, parts: Mapping[str, torch.Tensor]) -> torch.Tensor | QuantizedWeight:
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


def _copy_to_host(tensor: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor:
    if buffer is None:
        return tensor.cpu()
    return buffer if buffer is tensor else buffer.copy_(tensor, non_blocking=True)
