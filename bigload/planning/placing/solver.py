"""Places units by a strategy such as "auto": on GPUs as far as they fit, the rest on the CPU and the disk.

Pure and deterministic: numbers in, places out. Units keep their order over the GPUs, so that activations cross from one
to the next only once. Of the units that could be offloaded, those are chosen that stream the fewest bytes for each
forward. They are spread evenly over the depth, so that resident blocks compute while the next block is prefetched.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch

from ...errors import BigloadError

OffPlace = Literal["cpu", "disk"]


@dataclass(frozen=True)
class Item:
    """The sizes of a unit, in bytes.

    Attributes:
        resident: on the device that computes it, when it is not offloaded.
        staying: still on that device when it is offloaded.
        away: in host memory or on the disk when it is offloaded.
        streamed: copied to the device for each forward when it is offloaded; 0 for an embedding, or if the CPU
            computes it.
        is_block: whether it is one of the model's repeated blocks.
        is_first: whether it must be on the first device: buffers that blocks share.
    """

    resident: int
    staying: int
    away: int
    streamed: int
    is_block: bool = True
    is_first: bool = False


@dataclass(frozen=True)
class Rules:
    """The rules of a placement.

    Attributes:
        strategy: "auto", "balanced", "balanced_low_0" or "sequential".
        slots: the number of slots on each device, each as large as the largest streamed unit.
        from_end: offload the last blocks instead of evenly spaced ones; for blocks that the CPU computes, so that
            activations cross only twice.
    """

    strategy: str = "auto"
    slots: int = 2
    from_end: bool = False


@dataclass(frozen=True)
class Assigned:
    """The place of one unit: the index of the device that computes it, and where it is offloaded to, if it is."""

    device: int
    away: OffPlace | None = None


@dataclass
class DoesNotFitError(BigloadError):
    """The units do not fit.

    Attributes:
        place: the place that is too small: the index of a device, "cpu" or "disk".
        needed: bytes that would be enough there, if no other place is too small.
        allowed: bytes that may be used there.
        item: the index of a unit that alone is too large for any device, or None.
    """

    place: int | OffPlace
    needed: int
    allowed: int
    item: int | None = field(default=None)


def solve_placement(
    items: Sequence[Item], devices: Sequence[int], homes: dict[OffPlace, int], rules: Rules
) -> list[Assigned]:
    """Return the place of each unit.

    Args:
        items: in the order of the model.
        devices: bytes for units and slots on each device that computes.
        homes: bytes that may be offloaded to each place; only those that may be used.
        rules: the strategy, the number of slots, and which blocks to offload first.

    Raises:
        DoesNotFitError: no such placement exists.
    """
    whole = _on_devices(items, [False] * len(items), devices, rules)
    if whole is not None:
        return whole
    if not homes:
        raise _shortage(items, devices, rules, may_leave=False)
    lacking: DoesNotFitError | None = None
    for away in _candidates(items, devices, rules):
        room = sum(item.away for item, gone in zip(items, away, strict=True) if gone) <= sum(homes.values())
        if lacking is not None and not room:
            continue  # the error for a lack of room is known already
        placed = _on_devices(items, away, devices, rules)
        if placed is not None:
            try:
                return _with_homes(items, placed, away, homes)
            except DoesNotFitError as error:
                lacking = lacking or error
    raise lacking or _shortage(items, devices, rules, may_leave=True)


def solve_partly(
    items: Sequence[Item],
    parts: Callable[[int], Mapping[int, Item]],
    devices: Sequence[int],
    room: int,
    rules: Rules,
    least: int = 1,
) -> list[Assigned] | None:
    """Return the place of each unit where as few as possible leave a part of themselves, evenly over the depth.

    Args:
        items: in the order of the model; all but that part stays.
        parts: gives the sizes of the units that may, by their index, if so many leave their part.
        devices: bytes for units and slots on each device that computes.
        room: bytes for these parts on the CPU.
        rules: the strategy, and the number of slots.
        least: how many leave their part at least.

    Returns:
        None if it does not fit, even if all leave their part.
    """
    indices = list(parts(1))
    masks = _masks(len(indices), from_end=False)
    for count in range(least, len(indices) + 1):
        chosen, sizes = (
            [index for index, gone in zip(indices, masks[count].tolist(), strict=True) if gone],
            parts(count),
        )
        if sum(sizes[index].away for index in chosen) > room:
            return None
        away = [False] * len(items)
        mixed = list(items)
        for index in chosen:
            away[index], mixed[index] = True, sizes[index]
        placed = _on_devices(mixed, away, devices, rules)
        if placed is not None:
            return [replace(one, away="cpu") if gone else one for one, gone in zip(placed, away, strict=True)]
    return None


def _on_devices(
    items: Sequence[Item], away: Sequence[bool], devices: Sequence[int], rules: Rules
) -> list[Assigned] | None:
    """Place the units on devices, given which are offloaded; None if they do not fit."""
    rings = _rings(items, away, len(devices), rules)
    capacities = [capacity - ring for capacity, ring in zip(devices, rings, strict=True)]
    if min(capacities) < 0:
        return None
    placed, turn, rest = [Assigned(0)] * len(items), 0, list[int]()
    for index, (item, gone) in enumerate(zip(items, away, strict=True)):
        if gone:  # each device has its own link: distribute round-robin
            device = turn % len(capacities)
            turn += item.streamed > 0
            placed[index] = Assigned(device)
            capacities[device] -= item.staying
        elif item.is_first:
            capacities[0] -= item.resident
        else:
            rest.append(index)
    if min(capacities) < 0:
        return None
    filled = _in_order([items[index].resident for index in rest], capacities, rules.strategy)
    if filled is None:
        return None
    for index, device in zip(rest, filled, strict=True):
        placed[index] = Assigned(device)
    return placed


def slots_bytes(groups: Sequence[int], slots: int) -> int:
    """Return the bytes of a device's slots, each as large as the largest group; there are no more slots than groups."""
    return min(slots, len(groups)) * max(groups, default=0)


def _rings(items: Sequence[Item], away: Sequence[bool], count: int, rules: Rules) -> list[int]:
    """Return the bytes of the slots on each device; offloaded units are distributed round-robin."""
    groups = [item.streamed for item, gone in zip(items, away, strict=True) if gone and item.streamed]
    return [slots_bytes(groups[number::count], rules.slots) for number in range(count)]


def _in_order(sizes: Sequence[int], capacities: Sequence[int], strategy: str) -> list[int] | None:
    """Return the device of each unit, in order, by a strategy; None if they do not fit."""
    if len(capacities) == 1:
        return [0] * len(sizes) if sum(sizes) <= capacities[0] else None
    filled = _greedy(sizes, capacities)
    if filled is None:
        return _largest_first(sizes, capacities)
    if strategy == "sequential":
        return filled
    if strategy == "balanced_low_0":
        first = _least(lambda cap: _greedy(sizes, [min(cap, capacities[0]), *capacities[1:]]), capacities[0])
        capacities = [first, *capacities[1:]]
        even = _least(lambda cap: _greedy(sizes, [first, *(min(cap, c) for c in capacities[1:])]), max(capacities))
        return _greedy(sizes, [first, *(min(even, c) for c in capacities[1:])])
    even = _least(lambda cap: _greedy(sizes, [min(cap, c) for c in capacities]), max(capacities))
    return _greedy(sizes, [min(even, c) for c in capacities])


def _greedy(sizes: Sequence[int], capacities: Sequence[int]) -> list[int] | None:
    """Fill one device after the other. If any assignment in order fits, this one does."""
    device, used, filled = 0, 0, []
    for size in sizes:
        while used + size > capacities[device]:
            device, used = device + 1, 0
            if device == len(capacities):
                return None
        used += size
        filled.append(device)
    return filled


def _largest_first(sizes: Sequence[int], capacities: Sequence[int]) -> list[int] | None:
    """Give up the order of the units: place the largest first, each where it leaves the least room."""
    left, filled = list(capacities), [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        fitting = [device for device, room in enumerate(left) if room >= sizes[index]]
        if not fitting:
            return None
        filled[index] = min(fitting, key=lambda device: left[device])
        left[filled[index]] -= sizes[index]
    return filled


def _least(fits: Callable[[int], object], enough: int) -> int:
    """Return the smallest cap that fits, given that `enough` does."""
    return bisect_left(range(enough + 1), True, key=lambda cap: fits(cap) is not None)


def _candidates(items: Sequence[Item], devices: Sequence[int], rules: Rules) -> Iterable[list[bool]]:
    """Yield choices of which units to offload, in order of the bytes that each forward streams."""
    can_leave = [item.away > 0 and not item.is_first for item in items]
    blocks = [index for index, item in enumerate(items) if item.is_block and can_leave[index]]
    beside = [index for index in range(len(items)) if can_leave[index] and not items[index].is_block]
    free = [index for index in beside if not items[index].streamed]
    counts = range(len(blocks) + 1)
    masks = _masks(len(blocks), from_end=rules.from_end)
    kinds = ("resident", "staying", "away", "streamed")
    columns = {kind: torch.tensor([getattr(items[i], kind) for i in blocks], dtype=torch.int64) for kind in kinds}
    sums = {kind: (masks * columns[kind]).sum(1).tolist() for kind in kinds}
    slots = (masks * columns["streamed"]).amax(1).tolist() if blocks else [0]
    total = sum(item.resident for item in items)
    found: list[tuple[int, int, int, int, list[int]]] = []
    for family, others in enumerate(_distinct([[], free, beside])):
        freed, moved, homed, slot = (
            sum(items[i].resident - items[i].staying for i in others),
            sum(items[i].streamed for i in others),
            sum(items[i].away for i in others),
            max((items[i].streamed for i in others), default=0),
        )
        for count in counts:
            needed = total - freed - sums["resident"][count] + sums["staying"][count]
            if needed + max(slot, slots[count]) <= sum(devices):  # one slot at least
                found.append((moved + sums["streamed"][count], homed + sums["away"][count], family, count, others))
    for _, _, _, count, others in sorted(found, key=lambda candidate: candidate[:4]):
        away = [False] * len(items)
        chosen = [index for index, gone in zip(blocks, masks[count].tolist(), strict=True) if gone]
        for index in (*others, *chosen):
            away[index] = True
        yield away


def _distinct(families: list[list[int]]) -> list[list[int]]:
    return [family for index, family in enumerate(families) if family not in families[:index]]


def _masks(count: int, *, from_end: bool) -> torch.Tensor:
    """Return masks, (count + 1, count) bool, whose row i selects i of `count` elements, evenly spaced or the last."""
    chosen = torch.arange(count + 1).unsqueeze(1)
    if from_end:
        return torch.arange(count) >= count - chosen
    marks = (2 * torch.arange(count + 1) * chosen + count) // max(1, 2 * count)
    return marks[:, 1:] > marks[:, :-1]


def _with_homes(
    items: Sequence[Item], placed: Sequence[Assigned], away: Sequence[bool], homes: dict[OffPlace, int]
) -> list[Assigned]:
    """Assign offloaded units to the CPU, and those that do not fit there, evenly over the depth, to the disk."""
    leaving = [index for index, gone in enumerate(away) if gone]
    sizes = [items[index].away for index in leaving]
    cpu, disk = homes.get("cpu"), homes.get("disk")
    masks = _masks(len(leaving), from_end=False)
    on_disk = (masks * torch.tensor(sizes, dtype=torch.int64)).sum(1).tolist()
    for count, moved in enumerate(on_disk):
        if sum(sizes) - moved <= (cpu or 0) and moved <= (disk or 0):
            to_disk = dict(zip(leaving, masks[count].tolist(), strict=True))
            target: dict[int, OffPlace] = {index: "disk" if there else "cpu" for index, there in to_disk.items()}
            return [Assigned(one.device, target.get(index)) for index, one in enumerate(placed)]
    target, left = {}, sum(sizes)
    for index in sorted(leaving, key=lambda index: -items[index].away):  # the largest first, so that few move
        on_cpu = left <= (cpu or 0)
        target[index] = "cpu" if on_cpu else "disk"
        left -= 0 if on_cpu else items[index].away
    if disk is not None and left <= (cpu or 0) and sum(sizes) - left <= disk:
        return [Assigned(one.device, target.get(index)) for index, one in enumerate(placed)]
    if disk is None:
        raise DoesNotFitError("cpu", sum(sizes), cpu or 0)
    raise DoesNotFitError("disk", sum(sizes) - left, disk)


def _shortage(items: Sequence[Item], devices: Sequence[int], rules: Rules, *, may_leave: bool) -> DoesNotFitError:
    """Return the error for units that do not fit even if every unit that may be is offloaded."""
    largest, alone = devices.index(max(devices)), None
    for index, item in enumerate(items):
        least = min(item.resident, item.staying + item.streamed) if may_leave and item.away else item.resident
        if alone is None and least > devices[largest]:
            alone = index
    away = [may_leave and item.away > 0 and not item.is_first for item in items]
    rings = _rings(items, away, len(devices), rules)
    enough = max(*devices, 0) + sum(item.resident for item in items) + sum(rings)

    def fits(number: int, size: int) -> object:
        return _on_devices(items, away, [*devices[:number], size, *devices[number + 1 :]], rules)

    for number in [largest] if alone is not None else reversed(range(len(devices))):
        if fits(number, enough) is not None:
            needed = _least(partial(fits, number), enough)
            return DoesNotFitError(number, needed, devices[number], alone)
    leaving = [item for item, gone in zip(items, away, strict=True) if gone]
    spent = [ring + sum(item.staying for item in leaving[n :: len(devices)]) for n, ring in enumerate(rings)]
    spent[0] += sum(item.resident for item in items if item.is_first)
    number = max(range(len(devices)), key=lambda n: spent[n] - devices[n])
    if spent[number] > devices[number]:  # the largest shortage of several devices
        return DoesNotFitError(number, spent[number], devices[number])
    return DoesNotFitError(largest, enough, devices[largest], alone)
