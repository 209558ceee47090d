"""Mixtures that do not fit: nothing but experts is offloaded, and some of these stay on the device that computes."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from ...errors import PlacementError, listed
from ...hardware.devices import CPU, Place
from ..offload_config import OffloadConfig
from ..request import PlacementRequest
from ..units import Unit
from .accounts import PlacedUnit
from .solver import Item, OffPlace, Rules, slots_bytes, solve_partly

logger = logging.getLogger(__name__)

# The share of its experts for which a block gets a cache, before another block's experts leave the GPU.
_SHARE = 0.5


def place_by_expert(
    units: Sequence[Unit],
    items: Sequence[Item],
    devices: Sequence[torch.device],
    room: Sequence[int],
    homes: Mapping[OffPlace, int],
    rules: Rules,
    offload: OffloadConfig,
) -> list[PlacedUnit] | None:
    """Offload experts, and nothing else, to the CPU; None if that does not fit.

    As few units leave theirs as let each of these have the cache that is asked for: by default half of its experts. If
    all must leave theirs, the caches take what is left. With `execute="cpu"` there are no caches: the CPU computes the
    experts.

    Raises:
        PlacementError: there is no room for the `expert_cache` that is asked for.
    """
    by_cpu = offload.execute == "cpu"
    parts = {index: unit.by_expert() for index, unit in enumerate(units) if unit.fused}
    if by_cpu:
        parts = {index: part for index, part in parts.items() if part.can_stay_with_cpu}
    if not parts or "cpu" not in homes:
        return None
    share, limit = offload.expert_share, offload.expert_bytes

    def solved(cached: Callable[[Unit, int], int], least: int = 1) -> list[PlacedUnit] | None:
        def sizes(count: int) -> dict[int, Item]:
            return {index: _part_item(part, cached(part, count), by_cpu) for index, part in parts.items()}

        found = solve_partly(items, sizes, room, homes["cpu"], rules, least)
        if found is None:
            return None
        count = sum(one.away is not None for one in found)
        return [
            PlacedUnit(parts[index], devices[one.device], CPU, cached(parts[index], count), by_cpu)
            if one.away
            else PlacedUnit(units[index], devices[one.device])
            for index, one in enumerate(found)
        ]

    def asked(part: Unit, count: int) -> int:
        if limit is not None:
            return _most_cached(part, limit // -(-count // len(devices)))
        return int((_SHARE if share is None else share) * part.most_experts)

    if by_cpu:
        return solved(lambda part, count: 0)
    placed = solved(asked)
    if placed is None:
        placed = solved(lambda part, count: 0, len(parts))
        if placed is not None and offload.expert_cache is not None:
            raise PlacementError(
                f"expert_cache={offload.expert_cache!r}: there is no room for so many experts on "
                f"{listed(map(str, devices))}; what would help: a smaller expert_cache, or a larger budget there"
            )
    if placed is None or offload.expert_cache is not None:
        return placed
    left = {d: bytes_ - _used(placed, d, rules.slots) for d, bytes_ in zip(devices, room, strict=True)}
    return _filled(placed, left)


def _part_item(part: Unit, cached: int, by_cpu: bool) -> Item:
    staying = part.staying_bytes + part.cache_bytes(cached)
    streamed = 0 if by_cpu else part.streamed_bytes
    return Item(part.gpu_bytes, staying, part.group_bytes, streamed, is_block=part.is_block)


def _used(placed: Sequence[PlacedUnit], device: torch.device, slots: int) -> int:
    """Return the bytes that units take of a device that computes, without caches of experts."""
    own = [one for one in placed if one.device == device]
    on_gpu = device.type == "cuda"
    groups = [one.streamed_bytes for one in own if one.streamed_bytes]
    whole = sum(one.unit.gpu_bytes if on_gpu else one.unit.nbytes for one in own if one.home is None)
    return whole + sum(one.unit.staying_bytes for one in own if one.home is not None) + slots_bytes(groups, slots)


def _filled(placed: Sequence[PlacedUnit], left: Mapping[torch.device, int]) -> list[PlacedUnit]:
    """Let caches of experts take what is left of each device: each as many experts, some of the first one more.

    A cache that cannot hold what a token visits is of no use. So if these would be few for each, some units get none.
    """
    found = list(placed)
    for device, room in left.items():
        own = [i for i, one in enumerate(found) if one.device == device and one.is_by_expert and not one.by_cpu]

        def needed(cached: int, own: Sequence[int] = own) -> int:
            return sum(replace(found[index], cached=cached).cache_bytes for index in own)

        most = max((found[index].unit.most_experts for index in own), default=0)
        cached, fewest = bisect_right(range(1, most + 1), room, key=needed), max(2, -(-most // 8))
        cached = cached if cached >= fewest else 0
        room -= needed(cached)
        for index in own:
            found[index] = replace(found[index], cached=cached)
        for index in own:
            larger = replace(found[index], cached=max(cached + 1, fewest))
            more = larger.cache_bytes - found[index].cache_bytes
            if cached < most and more <= room:
                found[index], room = larger, room - more
    return found


def _most_cached(unit: Unit, room: int) -> int:
    return bisect_right(range(1, unit.most_experts + 1), room, key=unit.cache_bytes)


def with_caches(
    placed: Sequence[PlacedUnit], budgets: Mapping[Place, int], request: PlacementRequest
) -> list[PlacedUnit]:
    """Return the units of a device map with caches for those of which nothing but experts is offloaded.

    Args:
        placed: the units.
        budgets: bytes by place, where known.
        request: what is asked for. Without it a cache takes what `max_memory` leaves; on a GPU without such a budget up
            to a quarter of the experts, as the map may leave the rest free for other uses; none on the CPU.
    """
    share, limit = request.offload.expert_share, request.offload.expert_bytes
    left: dict[torch.device, int] = {}
    found = list(placed)
    for device in dict.fromkeys(one.device for one in placed if one.is_by_expert and not one.by_cpu):
        on_gpu = device.type == "cuda"
        usual = 0.25 if on_gpu and device not in request.budgets else 0.0
        for index, one in enumerate(found):
            if one.is_by_expert and one.device == device and not one.by_cpu:
                found[index] = replace(one, cached=int((usual if share is None else share) * one.unit.most_experts))
        if share is not None or (limit is None and not on_gpu):
            continue
        bounds = [] if limit is None else [limit]
        if limit is None and usual:
            bounds.append(sum(one.cache_bytes for one in found if one.device == device))
        if device in budgets:
            reserve = request.reserve if on_gpu else 0
            bounds.append(budgets[device] - reserve - _used(found, device, request.offload.slots))
        left[device] = max(0, min(bounds))
    return _filled(found, left)


def warn_of_unused_cache(offloaded: Sequence[PlacedUnit], offload: OffloadConfig) -> None:
    """Warn of an `expert_cache` that was asked for and that nothing of what is offloaded has."""
    if not offload.expert_cache or not offloaded or any(one.is_by_expert and not one.by_cpu for one in offloaded):
        return
    if any(one.by_cpu for one in offloaded):
        logger.warning("expert_cache has no effect: the CPU computes the experts, of which none is copied to a GPU")
        return
    with_experts = [one.unit.name for one in offloaded if one.unit.fused]
    if with_experts:
        logger.warning(
            "expert_cache has no effect: more than the experts of %s is offloaded; name the modules of the experts in "
            "device_map instead",
            listed(with_experts, 4),
        )
    else:
        logger.warning("expert_cache has no effect: what is offloaded holds no fused experts in 4 bit")
