"""Sizes in bytes, read from and written as text."""

from __future__ import annotations

import re
from fractions import Fraction

from .errors import PlacementError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


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
