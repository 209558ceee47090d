"""The `Plan`: all that a load will do, and the exact bytes that it needs of each place."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from typing import Any

import torch
from torch import nn

from ..config import BnbQuantizationConfig
from ..errors import counted, listed
from ..hardware.devices import CPU, Place
from ..hardware.interrupts import interruptible
from ..io.tensors import StoredTensor
from ..model.experts import Experts
from ..notation import html_table, show, text_table, turned_to_fit, wrapped
from ..quantization.formats import Plain
from .placing.accounts import Account, PlacedUnit
from .planned_tensors import PlannedTensor


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
        layers: the layers that bitsandbytes' layers replace, by path; placeholders in the plan that a loaded model
            keeps.
        device_map: block path -> the place that stores its weights.
        config: the config, with every "auto" resolved.
        devices: block path -> the device that computes it; None where that is the device map.
        units: the modules that are placed whole, in the order of the model.
        accounts: the bytes needed of each place.
        after: what is left to do when the tensors are loaded.
        read_weights: path -> "values", "dtype", "shape" or "cast": layers that are not quantized because other code
            reads this of their weight without calling them, or casts it.
        experts: the modules whose fused experts are quantized, by path.
        plain_experts: path -> why the fused experts there are not quantized, although no argument excludes them.
        experts_per_token: how many experts of each module a token visits, if the model's config says so.

    Examples:
        >>> import bigload, torch
        >>> layers = torch.nn.Sequential(torch.nn.Linear(1024, 2048), torch.nn.Linear(2048, 8))
        >>> plan = bigload.plan_device_map(layers, "nf4", device_map={"": "cuda:0", "0": "cpu"})
        >>> plan
        Plan(nf4: 145.20 MiB on cuda:0, 129.13 MiB on cpu, 1.13 MiB streamed for each forward)
        >>> plan.source_bytes, plan.nbytes, plan.streamed_bytes  # read, kept, and copied in each forward
        (8462368, 1253472, 1179904)
        >>> plan.read_bytes == plan.source_bytes  # of a share of the model it may be more
        True
        >>> plan.token_bytes  # the same, as it has no experts
        1179904
        >>> plan.device_bytes
        {device(type='cpu'): 1179712, device(type='cuda', index=0): 73760}
        >>> plan.device_map["0"], plan.execution_map[""], plan.is_mixed  # stored, computed, on a GPU
        (device(type='cpu'), device(type='cuda', index=0), True)
        >>> plan.held_bytes, plan.in_fp32, plan.dtypes_on_gpu  # from the model's own weights; the CPU computes nothing
        ({device(type='cpu'): 8462368}, [], {})
        >>> plan.offloaded
        [PlacedUnit(0: 1.13 MiB on cpu, computed on cuda:0)]
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
    experts_per_token: int | None = None

    @cached_property
    def source_bytes(self) -> int:
        """Bytes that the load reads."""
        return sum(source.tensor.nbytes for planned in interruptible(self.tensors) for source in planned.sources)

    @cached_property
    def read_bytes(self) -> int:
        """Bytes of files that the load reads; of a share more than `source_bytes` if it cannot be read alone."""
        return sum(planned.read_bytes for planned in interruptible(self.tensors))

    @cached_property
    def device_bytes(self) -> dict[torch.device, int]:
        """Bytes of the loaded model in the memory of each device, before the allocator's rounding."""
        total: dict[torch.device, int] = defaultdict(int)
        for planned in interruptible(self.tensors):
            place = planned.home or planned.device
            if isinstance(place, torch.device):
                total[place] += planned.nbytes
        return dict(total)

    @cached_property
    def held_bytes(self) -> dict[torch.device, int]:
        """Bytes on each device of the model's own values that the load uses, or leaves as they are."""
        total: dict[torch.device, int] = defaultdict(int)
        for planned in self.tensors:
            sources = planned.sources
            if sources and type(sources[0].tensor) is StoredTensor:
                continue  # the usual case, of which there are many
            for value in [source.tensor for source in sources] or [planned.tensor.value]:
                if isinstance(value, torch.Tensor):
                    total[value.device] += value.nbytes
        return dict(total)

    @property
    def execution_map(self) -> Mapping[str, torch.device]:
        """Block path -> the device that computes it."""
        if self.devices is not None:
            return self.devices
        return {path: place for path, place in self.device_map.items() if isinstance(place, torch.device)}

    def device_of(self, path: str) -> torch.device | None:
        """Return the device that computes the first parameters of the module at `path`; None if it has none.

        Examples:
            >>> import bigload, torch
            >>> layers = torch.nn.Sequential(torch.nn.Linear(1024, 2048), torch.nn.Linear(2048, 8))
            >>> plan = bigload.plan_device_map(layers, "nf4", device_map={"": "cuda:0", "0": "cpu"})
            >>> plan.device_of("0")  # stored on the CPU, and computed on the GPU
            device(type='cuda', index=0)
        """
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

    @property
    def token_bytes(self) -> float:
        """Bytes copied to devices for one token: of experts that are copied one by one those that it visits.

        Some of these are found on the device: as many as when each expert is visited as often as any other.
        """
        return sum(placed.token_bytes(self.experts_per_token) for placed in self.units)

    @property
    def nbytes(self) -> int:
        """Bytes of the loaded model, wherever it is."""
        return sum(placed.unit.nbytes for placed in self.units)

    def __str__(self) -> str:
        return plan_table(self)

    def __repr__(self) -> str:
        needs = ", ".join(f"{show(account.needed)} on {account.place}" for account in self.accounts)
        streamed = f", {show(self.streamed_bytes)} streamed for each forward" if self.streamed_bytes else ""
        return f"Plan({self.config.mode}: {needs}{streamed})"

    def _repr_html_(self) -> str:
        said = "".join(f"<div>{escape(line)}</div>" for line in summary(self))
        return html_table(_account_rows(self.accounts)) + html_table(_unit_rows(self.units)) + said


def without_values(plan: Plan) -> Plan:
    """Return a plan to keep with the loaded model: it names the tensors and layers that the model had before, with
    their shapes, and keeps none of them in memory.
    """
    made = {id(planned): planned.without_values() for planned in plan.tensors}

    def bare(tensors: Sequence[PlannedTensor]) -> tuple[PlannedTensor, ...]:
        return tuple(made.get(id(planned)) or planned.without_values() for planned in tensors)

    units = {
        id(unit): replace(unit, tensors=bare(unit.tensors), offloaded=bare(unit.offloaded))
        for unit in (placed.unit for placed in plan.units)
    }
    kept = replace(
        plan,
        tensors=tuple(made.values()),
        layers=dict.fromkeys(plan.layers, nn.Identity()),
        units=tuple(replace(placed, unit=units[id(placed.unit)]) for placed in plan.units),
        after=AfterLoad(),
    )
    vars(kept)["held_bytes"] = plan.held_bytes
    return kept


def _is_in(path: str, other: str) -> bool:
    return not other or path == other or path.startswith(f"{other}.")


def plan_table(plan: Plan, width: int | None = None, *, every_unit: bool = False) -> str:
    """Format a plan as a table: the account of each place, the units, and the traffic of each forward.

    Args:
        plan: the plan.
        width: characters of a line; None for any number.
        every_unit: give each unit a row of its own; otherwise equal ones share a row.
    """
    lines = []
    for rows in turned_to_fit(_account_rows(plan.accounts), width):
        lines += [*text_table(rows, width), ""]
    lines += [*text_table(_unit_rows(plan.units, every_unit=every_unit), width), ""]
    for line in summary(plan):
        lines += wrapped(line, width)
    return "\n".join(lines)


def _account_rows(accounts: Sequence[Account]) -> list[tuple[str, ...]]:
    parts = {"budget": "budget", "weights": "weights", "quant_state": "quant state", "ring": "ring"}
    parts |= {"cache": "cache", "reserve": "reserve", "kv_cache": "KV cache", "free": "free"}
    for part in ("cache", "kv_cache"):
        if not any(getattr(account, part) for account in accounts):
            del parts[part]

    def cell(figure: int | None) -> str:
        return "-" if figure is None else f"-{show(-figure)}" if figure < 0 else show(figure)

    return [
        ("place", *parts.values()),
        *((str(account.place), *(cell(getattr(account, part)) for part in parts)) for account in accounts),
    ]


def _unit_rows(units: Sequence[PlacedUnit], *, every_unit: bool = False) -> list[tuple[str, ...]]:
    """Return the head, and a row for all units that are equal: of one kind, size and place."""
    alike: dict[object, list[PlacedUnit]] = defaultdict(list)
    for number, placed in enumerate(units):
        kind = number if every_unit else re.sub(r"\d+", "#", placed.unit.name)
        place = placed.home, placed.device, placed.is_by_expert, placed.cached, placed.by_cpu
        alike[kind, placed.unit.nbytes, place].append(placed)
    rows: list[tuple[str, ...]] = [("unit", "count", "bytes each", "stored", "computed")]
    for first, *others in alike.values():
        name = _from_to(first.unit.name, others[-1].unit.name) if others else " = ".join(first.unit.paths)
        home = str(first.device if first.home is None else first.home)
        if first.is_by_expert:
            home = f"{first.device}, experts on {home}"
        if first.cached:
            home += f" ({first.cached} of {first.unit.most_experts} cached)"
        size = show(first.unit.nbytes)
        computed = f"{first.device}, experts on {first.home}" if first.by_cpu else str(first.device)
        rows.append((name or "the model", str(1 + len(others)), size, home, computed))
    return rows


def _from_to(first: str, last: str) -> str:
    """Return "h.0 to 7" for "h.0" and "h.7"."""
    parts = last.split(".")
    same = next(n for n, (one, other) in enumerate(zip(first.split("."), parts, strict=False)) if one != other)
    return f"{first} to {'.'.join(parts[same:])}"


def summary(plan: Plan) -> Iterator[str]:
    """Say in lines what is quantized, what is offloaded, and what each forward streams."""
    layers = counted(len(plan.layers), "layer")
    if plan.experts:
        layers += f" and the experts of {counted(len(plan.experts), 'module')}"
    what = "nothing is quantized" if plan.config.mode == "none" else f"{layers} as {plan.config.mode}"
    yield f"{what}, {show(plan.nbytes)} in all"
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
    units = "" if away == plan.offloaded else f", {counted(len(plan.offloaded), 'unit')} in all"
    yield f"offloaded: {len(away)} of {counted(len(blocks), 'block')}{units}"
    by_expert = [placed for placed in plan.offloaded if placed.is_by_expert and not placed.by_cpu]
    if by_expert:
        yield _of_cached(by_expert, plan.experts_per_token)
    by_cpu = [placed for placed in plan.offloaded if placed.by_cpu]
    if by_cpu:
        yield _of_cpu(by_cpu, plan.experts_per_token)
    from_disk = sum(placed.streamed_bytes for placed in plan.units if placed.home == "disk")
    share = "all" if from_disk == plan.streamed_bytes else show(from_disk)
    disk = f", {share} of it from the disk" if from_disk else ""
    most = "at most " if by_expert else ""
    yield f"streamed for each forward: {most}{show(plan.streamed_bytes)}{disk}"


def _of_cached(units: Sequence[PlacedUnit], visited: int | None) -> str:
    """Say what of experts is copied for a token."""
    one = max(each for placed in units for _, each in placed.unit.experts)
    held, number = sum(placed.cached for placed in units), sum(placed.unit.most_experts for placed in units)
    said = (
        f"only the experts of {len(units)} of them: {held / number:.0%} are cached on the device, those used last; "
        f"each other expert that a token visits is copied, {show(one)}"
    )
    if visited is None:
        return said
    copied, wanted = sum(one.token_bytes(visited) for one in units), sum(one.visited_bytes(visited) for one in units)
    hits = max(0.0, 1 - copied / wanted)
    return (
        f"{said}; a token visits {visited} in each, and {show(round(copied))} are copied for it if each is visited as "
        f"often as any other: {hits:.0%} are cached then"
    )


def _of_cpu(units: Sequence[PlacedUnit], visited: int | None) -> str:
    """Say what of experts the CPU reads for a token."""
    one = max(each for placed in units for _, each in placed.unit.experts)
    said = (
        f"only the experts of {len(units)} of them: the CPU computes them where they are, in 4 bit; for each "
        f"expert that a token visits it reads {show(one)}"
    )
    if visited is None:
        return said
    return f"{said}; a token visits {visited} in each: {show(sum(p.visited_bytes(visited) for p in units))}"
