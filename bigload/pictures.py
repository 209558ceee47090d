"""Pictures drawn by matplotlib, which read well on light pages and on dark ones."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError, import_optional


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
        raise ConfigError(f"the picture '{path}' cannot be written: {error}") from error
