"""A `Plan` as JSON, or as a bar chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import import_optional
from .plan import Plan, step_seconds


def plan_json(plan: Plan, link_gb_per_s: float | None = None) -> dict[str, Any]:
    """Return a plan as a dict that can be written as JSON; sizes in bytes, `step_s` in seconds."""
    return {
        "mode": plan.config.mode,
        "places": [
            {
                "place": str(account.place),
                **{name: getattr(account, name) for name in ("weights", "quant_state", "ring", "cache", "reserve")},
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
        "step_s": None if link_gb_per_s is None else step_seconds(plan, link_gb_per_s),
    }


def draw_plan(plan: Plan, path: Path) -> None:
    """Draw the account of each place as a stacked bar, with its budget as a line.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    import_optional("matplotlib", "pip install matplotlib").use("Agg")
    plt = import_optional("matplotlib.pyplot", "pip install matplotlib")
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.6 * len(plan.accounts)), layout="constrained")
    names = [str(account.place) for account in plan.accounts]
    left = [0.0] * len(names)
    for part in ("weights", "quant_state", "ring", "cache", "reserve"):
        widths = [getattr(account, part) / 2**30 for account in plan.accounts]
        axes.barh(names, widths, left=left, label=part.replace("_", " "))
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    for row, account in enumerate(plan.accounts):
        if account.budget is not None:
            axes.plot([account.budget / 2**30] * 2, [row - 0.4, row + 0.4], color="black")
    axes.set_xlabel("GiB; the line is the budget")
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=5, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
