"""How modes and sizes are written, "nf4-dq" and "10GiB", and tables. Imports no torch, for the command line's sake.

Tables are text that fits a terminal, and HTML for notebooks.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from fractions import Fraction
from html import escape
from typing import Any

from .errors import PlacementError

# Mode -> the fields of `BnbQuantizationConfig` that it sets.
MODES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
    "int8-training": {"load_in_8bit": True, "llm_int8_has_fp16_weight": True},
    "none": {"load_in_4bit": True, "skip_modules": ["*"]},
}
# What others call them, and the letters do not tell.
_BY_OTHER_NAMES = (
    (("4", "4bit", "int4", "q4", "bnb", "bnb4bit", "loadin4bit", "bitsandbytes"), "nf4"),
    (("8", "8bit", "q8", "bnb8bit", "loadin8bit", "llmint8"), "int8"),
    (("16", "16bit", "fp16", "bf16", "float16", "bfloat16", "fp32", "float32", "32bit", "no", "off", "false"), "none"),
)

# Bytes of each unit.
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def nearest_mode(word: str) -> str | None:
    """Return the mode that a word may mean, if any."""
    plain = "".join(letter for letter in word.lower() if letter.isalnum())
    meant = next((mode for names, mode in _BY_OTHER_NAMES if plain in names), None)
    return meant or next(iter(get_close_matches(word.lower(), MODES, n=1, cutoff=0.5)), None)


def parse_size(size: int | str) -> int:
    """Return a size in bytes, given as an int or a string such as "10GiB", "500MB" or "1.5 GiB".

    Raises:
        PlacementError: it is no size, negative, or 2**63 or more.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        parsed = Fraction(size)
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-zA-Z]*)\s*", size) if isinstance(size, str) else None
        # "Gb" means bits to accelerate and bytes to most people: neither guess is safe.
        if match is None or match[2].upper() not in _UNITS or re.fullmatch("[kKmMgGtT]b", match[2]):
            raise PlacementError(f"max_memory holds {size!r}; expected bytes as an int, or a string such as '10GiB'")
        parsed = Fraction(match[1].rstrip(".")) * _UNITS[match[2].upper()]
    if not 0 <= parsed < 2**63:
        raise PlacementError(f"max_memory holds {size!r}; a size cannot be negative or above 2**63 bytes")
    return int(parsed)


def show(nbytes: int) -> str:
    """Write a number of bytes in binary units, such as "1.50 GiB"."""
    amount = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.2f} {unit}"
        amount /= 1024
    return f"{amount:.2f} GiB"


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
