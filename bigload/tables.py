"""Tables as text that fits a terminal, and as HTML for notebooks."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from html import escape

Row = Sequence[str]
_GAP = "  "


def text_table(rows: Sequence[Row], width: int | None = None) -> list[str]:
    """Return the lines of a table whose first column is at the left and whose others are at the right.

    Args:
        rows: the first is the head.
        width: characters of a line; None for any number. What is too long in the first column loses its middle.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    if width is not None and _total(widths) > width:
        widths[0] = max(8, widths[0] - _total(widths) + width)
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(size) for cell, size in zip(others, widths[1:], strict=True)]
        lines.append(_GAP.join([shortened(first, widths[0]).ljust(widths[0]), *cells]).rstrip())
    return lines


def output_width() -> int | None:
    """Return the width of the terminal; None where the output goes elsewhere and COLUMNS does not say."""
    if sys.stdout is not None and sys.stdout.isatty():
        return shutil.get_terminal_size().columns
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdecimal() and int(columns) else None


def turned_to_fit(rows: Sequence[Row], width: int | None) -> Iterator[Sequence[Row]]:
    """Yield the tables that show some rows within a width: they are one, or turned, with as many rows as fit in each.

    Args:
        rows: the first is the head.
        width: characters of a line; None for any number.
    """
    head, *others = rows
    if width is None or max(map(len, text_table(rows))) <= width:
        yield rows
        return
    while others:
        count = len(others)
        while count > 1 and max(map(len, text_table(_turned([head, *others[:count]])))) > width:
            count -= 1
        yield _turned([head, *others[:count]])
        others = others[count:]


def wrapped(text: str, width: int | None) -> list[str]:
    """Return the lines of a text, none longer than a width, but for words that are."""
    if width is None or len(text) <= width:
        return [text]
    indent = text[: len(text) - len(text.lstrip())] + "  "
    return textwrap.wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def shortened(text: str, width: int) -> str:
    """Return a text without its middle, if it is longer than a width."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}\N{HORIZONTAL ELLIPSIS}{text[len(text) - end :]}"


def html_table(rows: Sequence[Row], *, has_head: bool = True) -> str:
    """Return an HTML table, with the first row as its head."""
    lines = []
    for number, row in enumerate(rows):
        tag = "th" if has_head and number == 0 else "td"
        sides = ["left", *["right"] * (len(row) - 1)]
        cells = [f'<{tag} style="text-align:{s}">{escape(cell)}</{tag}>' for s, cell in zip(sides, row, strict=True)]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"


class FieldsAsHtml:
    """Shows the attributes of an object as a table, in notebooks."""

    def _repr_html_(self) -> str:
        fields = [(name, str(value).removeprefix("torch.")) for name, value in vars(self).items()]
        return html_table([(type(self).__name__, ""), *fields])


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _turned(rows: Sequence[Row]) -> list[Row]:
    return [list(column) for column in zip(*rows, strict=True)]
