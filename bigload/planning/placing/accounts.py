"""Units with their places, and the exact bytes that these need of each place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from ...hardware.devices import CPU, Place
from ...hardware.interrupts import interruptible
from ...notation import show
from ...quantization.formats import Plain
from ..planned_tensors import PlannedTensor
from ..units import GPU_BYTES, GROUP_BYTES, Unit
from .solver import slots_bytes


@dataclass(frozen=True, eq=False)
class PlacedUnit:
    """A unit and its place.

    Attributes:
        unit: the unit.
        device: the device that computes it.
        home: where its weights are stored if it is offloaded, else None.
        cached: how many experts of each of its modules are cached on the device, if only experts are offloaded.
        by_cpu: whether the CPU computes its experts where they are stored, so that none is copied, if only experts are
            offloaded.

    Examples:
        >>> import bigload, torch
        >>> layers = torch.nn.Sequential(torch.nn.Linear(1024, 2048), torch.nn.Linear(2048, 8))
        >>> plan = bigload.plan_device_map(layers, "nf4", device_map={"": "cuda:0", "0": "cpu"})
        >>> plan.offloaded, plan.offloaded[0].streamed_bytes
        ([PlacedUnit(0: 1.13 MiB on cpu, computed on cuda:0)], 1179904)
        >>> plan.units[0].is_by_expert, plan.units[0].cache_bytes
        (False, 0)
    """

    unit: Unit
    device: torch.device
    home: Place | None = None
    cached: int = 0
    by_cpu: bool = False

    @property
    def streamed_bytes(self) -> int:
        """Bytes copied to the device in each forward; fewer if it needs few experts and some are cached there."""
        return 0 if self.home is None or self.by_cpu else self.unit.streamed_bytes

    def visited_bytes(self, visited: int) -> int:
        """Return the bytes of the experts that a token visits, if they are so many of each of its modules.

        Examples:
            >>> import bigload, torch
            >>> layers = torch.nn.Sequential(torch.nn.Linear(1024, 2048), torch.nn.Linear(2048, 8))
            >>> plan = bigload.plan_device_map(layers, "nf4", device_map={"": "cuda:0", "0": "cpu"})
            >>> plan.offloaded[0].visited_bytes(8)  # it has no experts
            0
        """
        return sum(min(visited, number) * each for number, each in self.unit.experts)

    def token_bytes(self, visited: int | None, tokens: int = 1) -> float:
        """Return the bytes that are copied to the device for a forward of one token, or several, on average.

        Args:
            visited: how many experts of each module a token visits, each as often as any other; None if not known.
            tokens: that are computed at once, which may visit the same experts.

        Examples:
            >>> import bigload, torch
            >>> layers = torch.nn.Sequential(torch.nn.Linear(1024, 2048), torch.nn.Linear(2048, 8))
            >>> plan = bigload.plan_device_map(layers, "nf4", device_map={"": "cuda:0", "0": "cpu"})
            >>> plan.offloaded[0].token_bytes(visited=8)  # it has no experts: all of it
            1179904
        """
        if not self.is_by_expert or self.by_cpu or visited is None:
            return self.streamed_bytes
        total = 0.0
        for number, each in self.unit.experts:
            held, wanted = min(self.cached, number), number * (1 - (1 - min(visited, number) / number) ** tokens)
            if wanted > max(held, number // 2):  # all of them are copied then
                wanted, held = number, 0
            elif wanted > held:  # they pass through a slot, and none stays
                held = 0
            total += wanted * (1 - held / number) * each
        return total

    @property
    def is_by_expert(self) -> bool:
        """Whether its experts are offloaded, and nothing else of it."""
        return self.home is not None and self.unit.is_by_expert

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache of experts on the device."""
        return self.unit.cache_bytes(self.cached, GPU_BYTES if _is_gpu(self.device) else 1)

    def __repr__(self) -> str:
        place = self.device if self.home is None else f"{self.home}, computed on {self.device}"
        return f"PlacedUnit({self.unit.name or 'the model'}: {show(self.unit.nbytes)} on {place})"


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
        kv_cache: keys and values of the tokens; 0 unless they were asked for.

    Examples:
        >>> import bigload, torch
        >>> layers = torch.nn.Sequential(torch.nn.Linear(1024, 2048), torch.nn.Linear(2048, 8))
        >>> (account,) = bigload.plan_device_map(layers, "nf4", device_map="cpu", max_memory={"cpu": "1GiB"}).accounts
        >>> account.needed, account.free
        (1253472, 1072488352)
    """

    place: Place
    weights: int = 0
    quant_state: int = 0
    ring: int = 0
    reserve: int = 0
    budget: int | None = None
    cache: int = 0
    kv_cache: int = 0

    @property
    def needed(self) -> int:
        """The sum of weights, quant_state, ring, cache, reserve and kv_cache."""
        return self.weights + self.quant_state + self.ring + self.cache + self.reserve + self.kv_cache

    @property
    def free(self) -> int | None:
        """The budget less what is needed; negative if the plan does not fit."""
        return None if self.budget is None else self.budget - self.needed


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
    for planned in interruptible(tensors):
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


def _is_gpu(place: Place) -> bool:
    return isinstance(place, torch.device) and place.type == "cuda"


def _value_and_state_bytes(planned: PlannedTensor, multiple: int) -> tuple[int, int]:
    """Return the bytes of a tensor's values, and of its quantization state."""
    total = planned.rounded_bytes(multiple)
    if isinstance(planned.format, Plain):
        return total, 0
    weight = -(-planned.parts["weight"].nbytes // multiple) * multiple
    return weight, total - weight
