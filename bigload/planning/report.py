"""A Plan for people: as a table, as JSON, as a picture."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import counted
from ..optional import import_optional
from ..sizes import show
from .plan import Account, PlacedUnit, Plan


def plan_table(plan: Plan, link_gb_per_s: float | None = None) -> str:
    """Write a plan as a table: each place with what it gives and holds, then the units, then what each forward moves.

    Args:
        plan: what to write.
        link_gb_per_s: of the link to the device, for the time that streaming takes; left out when None.
    """
    lines = list(_aligned([_HEADS, *(_account_row(account) for account in plan.accounts)]))
    lines.append("")
    lines += _aligned([("unit", "bytes", "rests on", "computed on"), *_unit_rows(plan.units)])
    lines.append("")
    lines += _summary(plan, link_gb_per_s)
    return "\n".join(lines)


_HEADS = ("place", "budget", "weights", "quant state", "ring", "reserve", "free")


def _account_row(account: Account) -> tuple[str, ...]:
    figures = (account.budget, account.weights, account.quant_state, account.ring, account.reserve, account.free)
    return (str(account.place), *("-" if figure is None else show(figure) for figure in figures))


def _unit_rows(units: Sequence[PlacedUnit]) -> Iterator[tuple[str, ...]]:
    """Give a row for each run of alike units."""

    def key(placed: PlacedUnit) -> tuple[object, ...]:
        return placed.unit.is_block, placed.unit.nbytes, placed.home, placed.device

    for _, run in itertools.groupby(units, key):
        alike = list(run)
        first, last = alike[0], alike[-1]
        name = " = ".join(first.unit.paths) if len(alike) == 1 else f"{first.unit.name} to {last.unit.name}"
        size = show(first.unit.nbytes) + (f" each of {len(alike)}" if len(alike) > 1 else "")
        home = str(first.device if first.home is None else first.home)
        yield name or "the model", size, home, str(first.device)


def _summary(plan: Plan, link_gb_per_s: float | None) -> Iterator[str]:
    layers = counted(len(plan.layers), "layer")
    yield f"{layers} as {plan.config.mode}, {show(sum(placed.unit.nbytes for placed in plan.units))} in all"
    if not plan.offloaded:
        yield "nothing is offloaded"
        return
    blocks = [placed for placed in plan.units if placed.unit.is_block]
    away = [placed for placed in blocks if placed.home is not None]
    yield f"offloaded: {len(away)} of {counted(len(blocks), 'block')}, {counted(len(plan.offloaded), 'unit')} in all"
    moved = f"streamed for each forward: {show(plan.streamed_bytes)}"
    if link_gb_per_s:
        moved += f", {step_seconds(plan, link_gb_per_s) * 1000:.1f} ms at {link_gb_per_s:g} GB/s"
    yield moved


def step_seconds(plan: Plan, link_gb_per_s: float) -> float:
    """Give the seconds that streaming takes for each forward: GPUs have a link each, and stream at once."""
    by_device: dict[object, int] = {}
    for placed in plan.units:
        by_device[placed.device] = by_device.get(placed.device, 0) + placed.streamed_bytes
    return max(by_device.values(), default=0) / link_gb_per_s / 1e9


def plan_json(plan: Plan, link_gb_per_s: float | None = None) -> dict[str, Any]:
    """Give a plan as what JSON can hold; all sizes in bytes."""
    return {
        "mode": plan.config.mode,
        "places": [
            {
                "place": str(account.place),
                **{name: getattr(account, name) for name in ("weights", "quant_state", "ring", "reserve")},
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
            }
            for placed in plan.units
        ],
        "device_map": {path: str(place) for path, place in plan.device_map.items()},
        "streamed_bytes": plan.streamed_bytes,
        "step_s": None if link_gb_per_s is None else step_seconds(plan, link_gb_per_s),
    }


def draw_plan(plan: Plan, path: Path) -> None:
    """Draw what each place holds, as a bar of its parts beside its budget.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    import_optional("matplotlib", "pip install matplotlib").use("Agg")
    plt = import_optional("matplotlib.pyplot", "pip install matplotlib")
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.6 * len(plan.accounts)), layout="constrained")
    names = [str(account.place) for account in plan.accounts]
    left = [0.0] * len(names)
    for part in ("weights", "quant_state", "ring", "reserve"):
        widths = [getattr(account, part) / 2**30 for account in plan.accounts]
        axes.barh(names, widths, left=left, label=part.replace("_", " "))
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    for row, account in enumerate(plan.accounts):
        if account.budget is not None:
            axes.plot([account.budget / 2**30] * 2, [row - 0.4, row + 0.4], color="black")
    axes.set_xlabel("GiB; the line is the budget")
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=4, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join([row[0].ljust(len(first)), *others])
