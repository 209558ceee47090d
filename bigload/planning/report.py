"""What a `Plan` means: whether the model fits, and how fast it streams; as JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import counted
from ..hardware.devices import Place
from ..notation import show
from .placing.accounts import Account
from .plan import Plan


@dataclass(frozen=True)
class Rates:
    """How fast offloaded weights come to the device that computes, in GB/s (10^9 bytes a second).

    Attributes:
        link: of each GPU, from host memory.
        disk: reads of the disk, for all devices together.
    """

    link: float
    disk: float

    def of(self, home: Place, device: torch.device) -> float:
        """Return the rate from where weights are stored to the device that computes."""
        links = [self.link] if device.type == "cuda" else []
        return min([self.disk, *links] if home == "disk" else links)


def step_bytes(plan: Plan, sequences: int = 1) -> float:
    """Return the bytes that are copied for a forward of a token of each sequence; of experts those that lack, if known.

    Args:
        plan: the plan.
        sequences: that are generated at once.
    """
    return sum(placed.token_bytes(plan.experts_per_token, sequences) for placed in plan.offloaded)


def step_seconds(plan: Plan, rates: Rates, sequences: int = 1) -> float:
    """Return the seconds of streaming for each forward, arguments as of `step_bytes`.

    Each GPU has its own link, and all stream in parallel; what is on the disk comes at the rate of the disk that they
    share.
    """
    by_device: dict[torch.device, float] = defaultdict(float)
    disk_s = 0.0
    for placed in plan.offloaded:
        if placed.streamed_bytes and placed.home is not None:
            nbytes = placed.token_bytes(plan.experts_per_token, sequences)
            by_device[placed.device] += nbytes / rates.of(placed.home, placed.device) / 1e9
            disk_s += nbytes / rates.disk / 1e9 if placed.home == "disk" else 0
    return max([*by_device.values(), disk_s])


def verdict(plan: Plan, rates: Rates, said: str = "", sequences: int = 1) -> str:
    """Say in a sentence or two whether a plan fits, and what it streams for each token in how much time.

    Args:
        plan: the plan.
        rates: of the link and the disk.
        said: where the rates are from, for the text.
        sequences: that are generated at once: each forward makes a token of each.
    """
    model = "Not quantized, the model" if plan.config.mode == "none" else f"In {plan.config.mode} the model"
    short = [account for account in plan.accounts if account.free is not None and account.free < 0]
    if short:
        where = ", ".join(f"{show(-(account.free or 0))} too little on {account.place}" for account in short)
        return f"{model} does not fit: {where}."
    needs = ", ".join(map(_need, plan.accounts))
    is_known = all(account.budget is not None for account in plan.accounts)
    fits = "fits" if is_known else "may fit, as what is free is not known,"
    blocks = [placed for placed in plan.units if placed.unit.is_block]
    away = [placed for placed in blocks if placed.streamed_bytes]
    by_cpu = [placed for placed in blocks if placed.by_cpu]
    if not plan.streamed_bytes:
        does = f" if the CPU computes the experts of {len(by_cpu)} of {counted(len(blocks), 'block')}" if by_cpu else ""
        return f"{model} {fits if does else fits.rstrip(',')}{does}: it needs {needs}. Nothing is streamed."
    what, be = f"{len(away)} of {counted(len(blocks), 'block')}", "are" if len(away) > 1 else "is"
    is_by_expert = bool(away) and all(placed.is_by_expert for placed in plan.offloaded if placed.streamed_bytes)
    what = f"the experts of {what} are" if is_by_expert else f"{what if away else 'a part outside the blocks'} {be}"
    begin = f"{model} {fits} if {what} streamed: it needs {needs}."
    nbytes, seconds = step_bytes(plan, sequences), step_seconds(plan, rates, sequences)
    if not nbytes:
        return f"{begin} Each expert is copied when it is first visited, and stays."
    is_known = is_by_expert and plan.experts_per_token is not None
    how = "if each expert is visited as often as any other, about" if is_known else "at most"
    waits = f"Each token waits for {show(round(nbytes))}: {_duration(seconds)}{said}"
    return f"{begin} {waits}, {how} {per_second(seconds, sequences)} tokens a second."


def per_second(seconds: float, sequences: int = 1) -> str:
    """Return how many tokens come in a second, if each forward takes some seconds."""
    rate = sequences / seconds
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def _need(account: Account) -> str:
    budget = "" if account.budget is None else f" of the {show(account.budget)}"
    return f"{show(account.needed)}{budget} on {account.place}"


def with_kv_cache(plan: Plan, layers: Sequence[int], reserved: int = 0) -> Plan:
    """Return a plan whose accounts hold the KV cache too, on the devices that compute.

    Args:
        plan: the plan.
        layers: the bytes of each layer's cache, in the order of the blocks.
        reserved: bytes of each GPU's reserve that are meant for it.
    """
    blocks = [placed for placed in plan.units if placed.unit.is_block] or list(plan.units)
    shares: dict[Place, int] = defaultdict(int)
    for number, placed in enumerate(blocks):
        is_own = len(layers) == len(blocks)
        shares[placed.device] += layers[number] if is_own else -(-sum(layers) // len(blocks))
    accounts = [
        replace(account, kv_cache=shares[account.place], reserve=max(0, account.reserve - reserved))
        for account in plan.accounts
    ]
    return replace(plan, accounts=tuple(accounts))


_PARTS = ("weights", "quant_state", "ring", "cache", "reserve", "kv_cache")


def plan_json(plan: Plan, rates: Rates | None = None, sequences: int = 1) -> dict[str, Any]:
    """Return a plan as a dict that can be written as JSON; sizes in bytes, `step_s` in seconds.

    Args:
        plan: the plan.
        rates: of the link and the disk; without them `step_s` is None.
        sequences: that are generated at once, which may visit other experts.
    """
    return {
        "mode": plan.config.mode,
        "places": [
            {
                "place": str(account.place),
                **{name: getattr(account, name) for name in _PARTS},
                "needed": account.needed,
                "budget": account.budget,
                "free": account.free,
            }
            for account in plan.accounts
        ],
        "units": [
            {
                "paths": list(placed.unit.paths),
                "is_block": placed.unit.is_block,
                "bytes": placed.unit.nbytes,
                "home": str(placed.device if placed.home is None else placed.home),
                "device": str(placed.device),
                "streamed_bytes": placed.streamed_bytes,
                "cached_experts": placed.cached,
                "experts_by_cpu": placed.by_cpu,
            }
            for placed in plan.units
        ],
        "device_map": {path: str(place) for path, place in plan.device_map.items()},
        "read_weights": dict(plan.read_weights),
        "experts": list(plan.experts),
        "plain_experts": dict(plan.plain_experts),
        "streamed_bytes": plan.streamed_bytes,
        "experts_per_token": plan.experts_per_token,
        "token_bytes": round(plan.token_bytes),
        "step_s": None if rates is None else step_seconds(plan, rates, sequences),
    }
