"""A `Plan` as a picture: what each place holds, and what is free there."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from typing import Any

from ..errors import counted
from ..pictures import Theme, new_figure, save, style, theme
from ..sizes import show
from .plan import Account, Plan

# The parts of an account, by their names in the picture and in the table.
_PARTS = {
    "weights": "weights",
    "quant_state": "quant state",
    "ring": "ring",
    "cache": "cache",
    "reserve": "reserve",
    "kv_cache": "KV cache",
}


def draw_plan(plan: Plan, path: str | os.PathLike[str], title: str = "", *, dark: bool = False) -> None:
    """Draw a plan: an axis for each place, with what it holds, what is free and what is missing.

    Args:
        plan: the plan.
        path: the picture, in the format that its name ends with.
        title: stands above the size of the model and what is streamed.
        dark: for a dark background.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ConfigError: the file cannot be written, or matplotlib has no such format.
    """
    save(plan_figure(plan, title, theme(dark=dark)), path)


def plan_figure(plan: Plan, title: str, colours: Theme) -> Any:
    """Return the figure of a plan."""
    figure = new_figure(1.1 + 0.95 * len(plan.accounts), colours)
    heading = figure.suptitle("\n".join(filter(None, (title, _heading(plan)))), x=0.02, ha="left", fontsize=11)
    heading.set_color(colours.ink)
    places = figure.subplots(len(plan.accounts), squeeze=False)[:, 0]
    used = [part for part in _PARTS if any(getattr(account, part) for account in plan.accounts)]
    handles: dict[str, Any] = {}
    for account, axes in zip(plan.accounts, places, strict=True):
        handles |= _draw_account(axes, account, used, colours)
    legend = figure.legend(
        handles.values(), handles, loc="outside lower left", ncols=len(handles), frameon=False, fontsize=9
    )
    for text in legend.get_texts():
        text.set_color(colours.ink)
    return figure


def _draw_account(axes: Any, account: Account, used: list[str], colours: Theme) -> dict[str, Any]:
    """Draw one place on axes of its own, and return what the legend shows."""
    style(axes, colours)
    handles, begin = {}, 0.0
    for colour, part in zip(colours.fills, _PARTS, strict=True):
        width = getattr(account, part) / 2**30
        if part in used:
            handles[_PARTS[part]] = axes.barh(0, width, 0.6, begin, color=colour)
        begin += width
    free = account.free or 0
    if free > 0:
        handles["free"] = axes.barh(
            0, free / 2**30, 0.6, begin, facecolor="none", edgecolor=colours.faint, hatch="////", linewidth=0
        )
    end = max(account.needed, account.budget or 0) / 2**30
    if account.budget is not None:
        axes.vlines(account.budget / 2**30, -0.42, 0.42, color=colours.alert if free < 0 else colours.ink, linewidth=2)
    axes.set_xlim(0, 1.005 * end or 1)
    axes.set_ylim(-0.45, 0.45)
    axes.set_yticks([])
    axes.xaxis.set_major_formatter("{x:g} GiB")
    figures = [figure.replace(" ", "\N{NO-BREAK SPACE}") for figure in _figures(account)]
    below = textwrap.fill(",  ".join(figures), 125).replace("\N{NO-BREAK SPACE}", " ")
    axes.set_xlabel(below, fontsize=8, color=colours.ink, loc="left")
    axes.set_title(_place(account), fontsize=10, color=colours.alert if free < 0 else colours.ink, loc="left")
    return handles


def _heading(plan: Plan) -> str:
    what = "not quantized" if plan.config.mode == "none" else f"in {plan.config.mode}"
    blocks = [placed for placed in plan.units if placed.unit.is_block]
    away = sum(placed.home is not None for placed in blocks)
    text = f"{show(plan.nbytes)} {what}"
    if not plan.streamed_bytes:
        return f"{text}, nothing streamed"
    by_expert = any(placed.is_by_expert for placed in plan.offloaded)
    what, most = ("experts of ", "at most ") if by_expert else ("", "")
    where = f"{what}{away} of {counted(len(blocks), 'block')}" if away else "a part outside the blocks"
    return f"{text}, {where} streamed: {most}{show(plan.streamed_bytes)} for each forward"


def _place(account: Account) -> str:
    if account.budget is None or account.free is None:
        return f"{account.place}: {show(account.needed)}, its budget is not known"
    short = f": {show(-account.free)} too little" if account.free < 0 else ""
    return f"{account.place}: {show(account.needed)} of {show(account.budget)}{short}"


def _figures(account: Account) -> Iterator[str]:
    for part, name in _PARTS.items():
        if getattr(account, part):
            yield f"{name} {show(getattr(account, part))}"
    if account.free is not None and account.free > 0:
        yield f"free {show(account.free)}"
