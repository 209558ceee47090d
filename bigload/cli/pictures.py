"""Pictures of plans and loads, drawn by matplotlib for light pages or dark ones."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, counted, import_optional, reason
from ..notation import show

if TYPE_CHECKING:
    from ..pipeline.report import LoadReport
    from ..planning.placing.accounts import Account
    from ..planning.plan import Plan

# The parts of an account, by their names in the picture and in the table.
_PARTS = {
    "weights": "weights",
    "quant_state": "quant state",
    "ring": "ring",
    "cache": "cache",
    "reserve": "reserve",
    "kv_cache": "KV cache",
}
# The stages of a load, by their names in the picture.
_LANES = {"plan": "plan", "read": "read", "copy": "copy to the GPU", "quantize": "quantize"}


@dataclass(frozen=True)
class Theme:
    """The colours of a picture.

    Attributes:
        paper: of the background.
        ink: of texts and lines.
        faint: of what is less important: grids, free space.
        alert: of what is wrong.
        fills: of bars, in the order in which they are used.
    """

    paper: str
    ink: str
    faint: str
    alert: str
    fills: tuple[str, ...]


LIGHT = Theme(
    "#ffffff",
    "#1f2328",
    "#d0d7de",
    "#cf222e",
    ("#0b6e4f", "#e0a458", "#c8553d", "#8d99ae", "#588b8b", "#7d5ba6"),
)
DARK = Theme(
    "#0d1117",
    "#e6edf3",
    "#3d444d",
    "#ff7b72",
    ("#2fae81", "#e0a458", "#d9694f", "#8d99ae", "#6fb0b0", "#a785d3"),
)


def theme(*, dark: bool = False) -> Theme:
    """Return the colours for a light background, or a dark one."""
    return DARK if dark else LIGHT


def new_figure(height: float, colours: Theme, width: float = 8.0) -> Any:
    """Return an empty figure of matplotlib.

    Args:
        height: in inches.
        colours: of the background.
        width: in inches.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure = import_optional("matplotlib.figure", "pip install matplotlib")
    return figure.Figure(figsize=(width, height), facecolor=colours.paper, layout="constrained")


def style(axes: Any, colours: Theme) -> None:
    """Give axes the theme's colours, and no frame but the line at the bottom."""
    axes.set_facecolor(colours.paper)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(colours.faint)
    axes.tick_params(colors=colours.ink, labelsize=9, length=0)


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure into a file, whose ending says in which format.

    In an SVG texts stay texts, and nothing differs from one run to the next.

    Raises:
        ConfigError: the file cannot be written, or matplotlib has no such format.
    """
    matplotlib = import_optional("matplotlib", "pip install matplotlib")
    is_svg = Path(path).suffix == ".svg"
    fixed: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": "bigload", "font.family": "sans-serif"}
    fixed["font.sans-serif"] = ["DejaVu Sans", "Verdana", "Arial", "sans-serif"]
    try:
        with matplotlib.rc_context(fixed):
            figure.savefig(path, dpi=150, metadata={"Date": None} if is_svg else None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the picture '{path}' cannot be written: {reason(error)}") from error


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


def draw_load(report: LoadReport, path: str | os.PathLike[str], title: str = "", *, dark: bool = False) -> None:
    """Draw what a load did when: a lane for each stage of each device.

    Args:
        report: of the load.
        path: the picture, in the format that its name ends with.
        title: stands above the figures of the load.
        dark: for a dark background.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ConfigError: the file cannot be written, or matplotlib has no such format.
    """
    save(load_figure(report, title, theme(dark=dark)), path)


def load_figure(report: LoadReport, title: str, colours: Theme) -> Any:
    """Return the figure of a load's timeline."""
    lanes = dict.fromkeys((stage, span.device) for stage in _LANES for span in report.timeline if span.stage == stage)
    figure = new_figure(1.1 + 0.42 * len(lanes), colours)
    axes = figure.subplots()
    style(axes, colours)
    has_several = len({device for stage, device in lanes if stage != "plan"}) > 1
    names = []
    for row, (stage, device) in enumerate(lanes):
        spans = [span for span in report.timeline if (span.stage, span.device) == (stage, device)]
        bars = [(span.begin_s, span.end_s - span.begin_s) for span in spans]
        axes.broken_barh(bars, (row - 0.35, 0.7), color=colours.fills[list(_LANES).index(stage)], linewidth=0)
        where = f", {device}" if has_several and stage != "plan" else ""
        names.append(f"{_LANES[stage]}{where}  {sum(length for _, length in bars):.2f} s")
    axes.set_yticks(range(len(lanes)), names)
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    axes.set_xlim(0, report.elapsed_s)
    axes.xaxis.set_major_formatter("{x:g} s")
    heading = str(replace(report, peak_bytes={}))
    axes.set_title("\n".join(filter(None, (title, heading))), fontsize=10, color=colours.ink, loc="left")
    return figure
