"""The Plan: everything that a load will do, and what it takes of each place, to the byte."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from ..config import BnbQuantizationConfig
from ..hardware.devices import CPU, Place
from ..quantization import formats
from ..quantization.formats import Plain
from .planned_tensors import PlannedTensor
from .solver import ring_bytes
from .units import GPU_BYTES, GROUP_BYTES, Unit


@dataclass(frozen=True, eq=False)
class PlacedUnit:
    """A unit and its place.

    Attributes:
        unit: what is placed.
        device: that computes it.
        home: where it rests, if not there.
    """

    unit: Unit
    device: torch.device
    home: Place | None = None

    @property
    def streamed_bytes(self) -> int:
        """Bytes that are brought to the device for each forward."""
        return 0 if self.home is None else self.unit.streamed_bytes


@dataclass(frozen=True)
class Account:
    """What a plan takes of one place, in bytes.

    Attributes:
        place: a device, or "disk".
        weights: values of the tensors, as they are packed; on a GPU as its allocator rounds them.
        quant_state: scales and code tables.
        ring: of a GPU, the slots that weights stream through; of the CPU, the buffer that files are read through.
        reserve: of a GPU, for activations or, where that is more, for what is on its way while it loads.
        budget: what may be used there; None if nobody said.
    """

    place: Place
    weights: int = 0
    quant_state: int = 0
    ring: int = 0
    reserve: int = 0
    budget: int | None = None

    @property
    def needed(self) -> int:
        """All of it."""
        return self.weights + self.quant_state + self.ring + self.reserve

    @property
    def free(self) -> int | None:
        """What is left of the budget."""
        return None if self.budget is None else self.budget - self.needed


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that a load will do.

    Attributes:
        tensors: one entry for each tensor of the model, tied ones once.
        layers: the layers that are replaced by bitsandbytes' own, by path.
        device_map: block path -> where its weights rest.
        config: the config, with every "auto" resolved.
        devices: block path -> the device that computes it; empty where that is the device map.
        units: what was placed whole, in the order of the model.
        accounts: what it takes of each place.
    """

    tensors: tuple[PlannedTensor, ...]
    layers: Mapping[str, nn.Module]
    device_map: Mapping[str, Place]
    config: BnbQuantizationConfig
    devices: Mapping[str, torch.device] | None = None
    units: tuple[PlacedUnit, ...] = ()
    accounts: tuple[Account, ...] = ()

    @cached_property
    def source_bytes(self) -> int:
        """Bytes that will be read, each once."""
        return sum(source.tensor.nbytes for planned in self.tensors for source in planned.sources)

    @cached_property
    def device_bytes(self) -> dict[torch.device, int]:
        """Bytes of the loaded model in the memory of each device, before the allocator's rounding."""
        total: dict[torch.device, int] = defaultdict(int)
        for planned in self.tensors:
            place = planned.home or planned.device
            if isinstance(place, torch.device):
                total[place] += planned.nbytes
        return dict(total)

    @property
    def execution_map(self) -> Mapping[str, torch.device]:
        """Block path -> the device that computes it."""
        if self.devices is not None:
            return self.devices
        return {path: place for path, place in self.device_map.items() if isinstance(place, torch.device)}

    @cached_property
    def is_mixed(self) -> bool:
        """Ask whether GPUs compute: then what the CPU computes is float32."""
        return any(placed.device.type == "cuda" for placed in self.units)

    @property
    def in_fp32(self) -> list[str]:
        """Paths of the units that the CPU computes in float32, beside GPUs."""
        return [path for placed in self.units if self.is_mixed and placed.device == CPU for path in placed.unit.paths]

    @property
    def offloaded(self) -> list[PlacedUnit]:
        """The units that rest where they are not computed."""
        return [placed for placed in self.units if placed.home is not None]

    @property
    def streamed_bytes(self) -> int:
        """Bytes that are brought to devices for each forward of the model."""
        return sum(placed.streamed_bytes for placed in self.units)

    def __str__(self) -> str:
        from .report import plan_table  # it writes what this room holds

        return plan_table(self)


def accounts_of(
    tensors: Iterable[PlannedTensor],
    units: Iterable[PlacedUnit],
    budgets: Mapping[Place, int],
    *,
    slots: int,
    reserve: int,
    host_ring: int,
) -> tuple[Account, ...]:
    """Add up what tensors take of each place.

    Args:
        tensors: placed.
        units: placed.
        budgets: by place, of those that have one.
        slots: how many of the largest streamed group a device holds, if it has so many groups.
        reserve: bytes of each GPU that are kept free.
        host_ring: bytes of the buffer that files are read through on their way to a GPU.
    """
    weights: dict[Place, int] = defaultdict(int)
    states: dict[Place, int] = defaultdict(int)
    for planned in tensors:
        place = planned.home or planned.device
        multiple = GROUP_BYTES if planned.home else GPU_BYTES if planned.device.type == "cuda" else 1
        values, state = _divided(planned, multiple)
        weights[place] += values
        states[place] += state
    groups: dict[Place, list[int]] = defaultdict(list)
    for placed in units:
        if placed.streamed_bytes:
            groups[placed.device].append(placed.streamed_bytes)
    places = dict.fromkeys([*(placed.device for placed in units), *weights])
    accounts = [
        Account(place, weights[place], states[place], ring_bytes(groups[place], slots), budget=budgets.get(place))
        for place in places
    ]
    uses_gpu = any(_is_gpu(account.place) for account in accounts)
    ordered = sorted(accounts, key=lambda account: (not _is_gpu(account.place), str(account.place)))
    return tuple(
        replace(account, reserve=reserve)
        if _is_gpu(account.place)
        else replace(account, ring=account.ring + host_ring)
        if account.place == CPU and uses_gpu
        else account
        for account in ordered
    )


def _is_gpu(place: Place) -> bool:
    return isinstance(place, torch.device) and place.type == "cuda"


def _divided(planned: PlannedTensor, multiple: int) -> tuple[int, int]:
    """Give the bytes of a tensor's values, and of what a quantized one has beside them."""
    if isinstance(planned.format, Plain):
        return formats.nbytes(planned.format, planned.shape, multiple), 0
    parts = planned.format.parts(planned.shape)
    rounded = {name: -(-part.nbytes // multiple) * multiple for name, part in parts.items()}
    return rounded["weight"], sum(rounded.values()) - rounded["weight"]
