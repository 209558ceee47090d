"""What a `Plan` means: whether the model fits, and how fast it streams; as JSON, and as a bar chart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, counted, import_optional
from ..hardware.devices import Place
from ..sizes import show
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


def step_seconds(plan: Plan, rates: Rates) -> float:
    """Return the seconds of streaming for each forward.

    Each GPU has its own link, and all stream in parallel; what is on the disk comes at the rate of the disk that they
    share.
    """
    by_device: dict[torch.device, float] = defaultdict(float)
    for placed in plan.offloaded:
        if placed.streamed_bytes and placed.home is not None:
            by_device[placed.device] += placed.streamed_bytes / rates.of(placed.home, placed.device) / 1e9
    disk_s = sum(placed.streamed_bytes for placed in plan.units if placed.home == "disk") / rates.disk / 1e9
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
    if not plan.streamed_bytes:
        return f"{model} {fits.rstrip(',')}: it needs {needs}. Nothing is streamed."
    blocks = [placed for placed in plan.units if placed.unit.is_block]
    away = sum(placed.streamed_bytes > 0 for placed in blocks)
    what = f"{away} of {counted(len(blocks), 'block')}" if away else "a part outside the blocks"
    seconds, be = step_seconds(plan, rates), "are" if away > 1 else "is"
    waits = f"Each token waits for {show(plan.streamed_bytes)}: {_duration(seconds)}{said}"
    return (
        f"{model} {fits} if {what} {be} streamed: it needs {needs}. {waits}, at most {per_second(seconds, sequences)} "
        "tokens a second."
    )


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


def plan_json(plan: Plan, rates: Rates | None = None) -> dict[str, Any]:
    """Return a plan as a dict that can be written as JSON; sizes in bytes, `step_s` in seconds."""
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
            }
            for placed in plan.units
        ],
        "device_map": {path: str(place) for path, place in plan.device_map.items()},
        "read_weights": dict(plan.read_weights),
        "experts": list(plan.experts),
        "plain_experts": dict(plan.plain_experts),
        "streamed_bytes": plan.streamed_bytes,
        "step_s": None if rates is None else step_seconds(plan, rates),
    }


def draw_plan(plan: Plan, path: Path) -> None:
    """Draw the account of each place as a stacked bar, with its budget as a line.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ConfigError: the file cannot be written, or matplotlib has no such format.
    """
    import_optional("matplotlib", "pip install matplotlib").use("Agg")
    plt = import_optional("matplotlib.pyplot", "pip install matplotlib")
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.6 * len(plan.accounts)), layout="constrained")
    names = [str(account.place) for account in plan.accounts]
    left = [0.0] * len(names)
    for part in _PARTS:
        widths = [getattr(account, part) / 2**30 for account in plan.accounts]
        axes.barh(names, widths, left=left, label=part.replace("_", " "))
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    for row, account in enumerate(plan.accounts):
        if account.budget is not None:
            axes.plot([account.budget / 2**30] * 2, [row - 0.4, row + 0.4], color="black")
    axes.set_xlabel("GiB; the line is the budget")
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=4, frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the picture '{path}' cannot be written: {error}") from error
    finally:
        plt.close(figure)
