"""The `Plan`: all that a load will do, and the exact bytes that it needs of each place."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..config import BnbQuantizationConfig
from ..errors import counted, listed
from ..hardware.devices import CPU, Place
from ..model.experts import Experts
from ..quantization import formats
from ..quantization.formats import Plain
from ..sizes import show
from .placing.solver import slots_bytes
from .planned_tensors import PlannedTensor
from .units import GPU_BYTES, GROUP_BYTES, Unit


@dataclass(frozen=True, eq=False)
class PlacedUnit:
    """A unit and its place.

    Attributes:
        unit: the unit.
        device: the device that computes it.
        home: where its weights are stored if it is offloaded, else None.
        cached: how many experts of each of its modules stay on the device, those used last, if nothing but experts is
            offloaded.
    """

    unit: Unit
    device: torch.device
    home: Place | None = None
    cached: int = 0

    @property
    def streamed_bytes(self) -> int:
        """Bytes copied to the device for each forward; for one that wants few experts less, if some stay there."""
        return 0 if self.home is None else self.unit.streamed_bytes

    @property
    def is_by_expert(self) -> bool:
        """Whether its experts are offloaded, and nothing else of it."""
        return self.home is not None and self.unit.is_by_expert

    @property
    def cache_bytes(self) -> int:
        """Bytes on the device for the experts that stay there."""
        return self.unit.cache_bytes(self.cached, GPU_BYTES if _is_gpu(self.device) else 1)


@dataclass(frozen=True)
class Account:
    """What a plan needs of one place, in bytes.

    Attributes:
        place: a device, or "disk".
        weights: values of the tensors, packed; on a GPU rounded up as its allocator does.
        quant_state: scales and code tables.
        ring: on a GPU, the slots that offloaded weights stream through; on the CPU, the buffer that files are read
            through.
        reserve: on a GPU, kept free for activations, or for the transfers of the load if they need more.
        budget: what may be used; None if unknown.
        cache: on the device that computes, for offloaded experts that stay there, those used last.
    """

    place: Place
    weights: int = 0
    quant_state: int = 0
    ring: int = 0
    reserve: int = 0
    budget: int | None = None
    cache: int = 0

    @property
    def needed(self) -> int:
        """The sum of weights, quant_state, ring, cache and reserve."""
        return self.weights + self.quant_state + self.ring + self.cache + self.reserve

    @property
    def free(self) -> int | None:
        """The budget less what is needed; negative if the plan does not fit."""
        return None if self.budget is None else self.budget - self.needed


@dataclass(eq=False)
class AfterLoad:
    """What the modules say is to be done when the tensors are in the model.

    Attributes:
        extra_states: module path -> what its `set_extra_state` is given: a tensor of the checkpoint, or a value.
        attributes: module path -> what its own loading sets on it.
        post_hooks: the paths of modules with hooks that follow their loading, in order.
    """

    extra_states: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    post_hooks: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Plan:
    """All that a load will do.

    Attributes:
        tensors: one entry for each tensor of the model, tied ones once.
        layers: the layers that bitsandbytes' layers replace, by path.
        device_map: block path -> the place that stores its weights.
        config: the config, with every "auto" resolved.
        devices: block path -> the device that computes it; None where that is the device map.
        units: the modules that are placed whole, in the order of the model.
        accounts: the bytes needed of each place.
        after: what is left to do when the tensors are loaded.
        read_weights: path -> "values", "dtype", "shape" or "cast": layers that are not quantized because other code
            reads this of their weight without calling them, or casts it.
        experts: the modules whose fused experts are quantized, by path.
        plain_experts: path -> why the fused experts there stay as they are, although nobody asked for that.
    """

    tensors: tuple[PlannedTensor, ...]
    layers: Mapping[str, nn.Module]
    device_map: Mapping[str, Place]
    config: BnbQuantizationConfig
    devices: Mapping[str, torch.device] | None = None
    units: tuple[PlacedUnit, ...] = ()
    accounts: tuple[Account, ...] = ()
    after: AfterLoad = field(default_factory=AfterLoad)
    read_weights: Mapping[str, str] = field(default_factory=dict)
    experts: Mapping[str, Experts] = field(default_factory=dict)
    plain_experts: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def source_bytes(self) -> int:
        """Bytes that the load reads."""
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

    def device_of(self, path: str) -> torch.device | None:
        """Return the device that computes the first parameters of the module at `path`; None if it has none."""
        for placed in self.units:
            if placed.unit.has_parameters and any(_is_in(one, path) or _is_in(path, one) for one in placed.unit.paths):
                return placed.device
        return None

    @cached_property
    def is_mixed(self) -> bool:
        """Whether a GPU computes: the units that the CPU computes are then in float32."""
        return any(placed.device.type == "cuda" for placed in self.units)

    @property
    def in_fp32(self) -> list[str]:
        """Paths of the units that the CPU computes in float32, beside GPUs."""
        return [path for placed in self.units if self.is_mixed and placed.device == CPU for path in placed.unit.paths]

    @property
    def dtypes_on_gpu(self) -> dict[str, torch.dtype]:
        """Name of a floating-point tensor that the CPU computes in float32 -> the dtype that it has on a GPU."""
        units = [placed.unit for placed in self.units if self.is_mixed and placed.device == CPU]
        dtypes = {}
        for planned in (planned for unit in units for planned in unit.tensors):
            dtype = planned.format.dtype if isinstance(planned.format, Plain) else self.config.load_dtype
            if dtype.is_floating_point:
                dtypes.update(dict.fromkeys(planned.tensor.names, dtype))
        return dtypes

    @property
    def offloaded(self) -> list[PlacedUnit]:
        """The units whose weights are stored elsewhere than on the device that computes them."""
        return [placed for placed in self.units if placed.home is not None]

    @property
    def streamed_bytes(self) -> int:
        """Bytes copied to devices for each forward of the model."""
        return sum(placed.streamed_bytes for placed in self.units)

    def __str__(self) -> str:
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
    """Add up the bytes needed of each place.

    Args:
        tensors: with their places.
        units: with their places.
        budgets: bytes by place, where known.
        slots: the number of slots on each device, each as large as the largest streamed group; no more than groups.
        reserve: bytes kept free on each GPU.
        host_ring: bytes of the host buffer that files are read through on their way to a GPU.
    """
    weights: dict[Place, int] = defaultdict(int)
    states: dict[Place, int] = defaultdict(int)
    for planned in tensors:
        place = planned.home or planned.device
        multiple = GROUP_BYTES if planned.home else GPU_BYTES if planned.device.type == "cuda" else 1
        values, state = _value_and_state_bytes(planned, multiple)
        weights[place] += values
        states[place] += state
    groups: dict[Place, list[int]] = defaultdict(list)
    caches: dict[Place, int] = defaultdict(int)
    for placed in units:
        if placed.streamed_bytes:
            groups[placed.device].append(placed.streamed_bytes)
        caches[placed.device] += placed.cache_bytes
    places = dict.fromkeys([*(placed.device for placed in units), *weights])
    accounts = [
        Account(
            place,
            weights[place],
            states[place],
            slots_bytes(groups[place], slots),
            budget=budgets.get(place),
            cache=caches[place],
        )
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


def _is_in(path: str, other: str) -> bool:
    return not other or path == other or path.startswith(f"{other}.")


def _is_gpu(place: Place) -> bool:
    return isinstance(place, torch.device) and place.type == "cuda"


def _value_and_state_bytes(planned: PlannedTensor, multiple: int) -> tuple[int, int]:
    """Return the bytes of a tensor's values, and of its quantization state."""
    if isinstance(planned.format, Plain):
        return formats.nbytes(planned.format, planned.shape, multiple), 0
    parts = planned.format.parts(planned.shape)
    rounded = {name: -(-part.nbytes // multiple) * multiple for name, part in parts.items()}
    return rounded["weight"], sum(rounded.values()) - rounded["weight"]


def plan_table(plan: Plan, link_gb_per_s: float | None = None) -> str:
    """Format a plan as a table: the account of each place, the units, and the traffic of each forward.

    Args:
        plan: the plan.
        link_gb_per_s: rate of the link to the device, for an estimate of the streaming time; None leaves it out.
    """
    has_cache = any(account.cache for account in plan.accounts)
    lines = list(_aligned([_account_row(account, has_cache) for account in (None, *plan.accounts)]))
    lines.append("")
    lines += _aligned([("unit", "bytes", "stored on", "computed on"), *_unit_rows(plan.units)])
    lines.append("")
    lines += _summary(plan, link_gb_per_s)
    return "\n".join(lines)


def _account_row(account: Account | None, has_cache: bool) -> tuple[str, ...]:
    """Return the row of an account; for None the heads."""
    columns = ["budget", "weights", "quant_state", "ring", *(["cache"] if has_cache else []), "reserve", "free"]
    if account is None:
        return ("place", *(column.replace("_", " ") for column in columns))
    figures = [getattr(account, column) for column in columns]
    return (str(account.place), *("-" if figure is None else show(figure) for figure in figures))


def _unit_rows(units: Sequence[PlacedUnit]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each run of equal units."""

    def key(placed: PlacedUnit) -> tuple[object, ...]:
        return placed.unit.is_block, placed.unit.nbytes, placed.home, placed.device, placed.is_by_expert, placed.cached

    for _, run in itertools.groupby(units, key):
        alike = list(run)
        first, last = alike[0], alike[-1]
        name = " = ".join(first.unit.paths) if len(alike) == 1 else f"{first.unit.name} to {last.unit.name}"
        size = show(first.unit.nbytes) + (f" each of {len(alike)}" if len(alike) > 1 else "")
        home = str(first.device if first.home is None else first.home)
        if first.is_by_expert:
            home = f"{first.device}, experts on {home}"
        if first.cached:
            home += f" ({first.cached} of {first.unit.most_experts} cached)"
        yield name or "the model", size, home, str(first.device)


def _summary(plan: Plan, link_gb_per_s: float | None) -> Iterator[str]:
    layers = counted(len(plan.layers), "layer")
    if plan.experts:
        layers += f" and the experts of {counted(len(plan.experts), 'module')}"
    yield f"{layers} as {plan.config.mode}, {show(sum(placed.unit.nbytes for placed in plan.units))} in all"
    for what in sorted(set(plan.read_weights.values())):
        paths = [path for path, read in plan.read_weights.items() if read == what]
        does = "casts" if what == "cast" else f"reads the {what} of"
        yield f"not quantized, as other code {does} their weight: {listed(paths, 4)}"
    for why in dict.fromkeys(plan.plain_experts.values()):
        paths = [path for path, reason in plan.plain_experts.items() if reason == why]
        yield f"experts not quantized, as {why}: {listed(paths, 4)}"
    if not plan.offloaded:
        yield "nothing is offloaded"
        return
    blocks = [placed for placed in plan.units if placed.unit.is_block]
    away = [placed for placed in blocks if placed.home is not None]
    yield f"offloaded: {len(away)} of {counted(len(blocks), 'block')}, {counted(len(plan.offloaded), 'unit')} in all"
    by_expert = [placed for placed in plan.offloaded if placed.is_by_expert]
    if by_expert:
        one = max(placed.streamed_bytes // placed.unit.most_experts for placed in by_expert)
        held = sum(placed.cached for placed in by_expert) / sum(placed.unit.most_experts for placed in by_expert)
        yield (
            f"of {len(by_expert)} nothing but the experts, {held:.0%} of which stay on the device, those used last; "
            f"copied for each of the others that a token visits: {show(one)}"
        )
    moved = f"streamed for each forward: {'at most ' if by_expert else ''}{show(plan.streamed_bytes)}"
    if link_gb_per_s:
        moved += f", {step_seconds(plan, link_gb_per_s) * 1000:.1f} ms at {link_gb_per_s:g} GB/s"
    yield moved


def step_seconds(plan: Plan, link_gb_per_s: float) -> float:
    """Return the seconds of streaming for each forward. Each GPU has its own link, and all stream in parallel."""
    by_device: dict[object, int] = {}
    for placed in plan.units:
        by_device[placed.device] = by_device.get(placed.device, 0) + placed.streamed_bytes
    return max(by_device.values(), default=0) / link_gb_per_s / 1e9


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join([row[0].ljust(len(first)), *others])
