"""Sizes as people write them."""

from __future__ import annotations

import re
from fractions import Fraction

from .errors import PlacementError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(size: int | str) -> int:
    """Read a size in bytes: an int, or a string such as "10GiB", "500MB" or "1.5 GiB".

    Raises:
        PlacementError: not a size, or a negative one.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        parsed = Fraction(size)
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-zA-Z]*)\s*", size) if isinstance(size, str) else None
        # "Gb" is bits to accelerate and a slip to most: neither guess is safe.
        if match is None or match[2].upper() not in _UNITS or re.fullmatch("[kKmMgGtT]b", match[2]):
            raise PlacementError(f"max_memory holds {size!r}; expected bytes as an int, or a string such as '10GiB'")
        parsed = Fraction(match[1].rstrip(".")) * _UNITS[match[2].upper()]
    if not 0 <= parsed < 2**63:
        raise PlacementError(f"max_memory holds {size!r}; a size cannot be negative or above 2**63 bytes")
    return int(parsed)


def show(nbytes: int) -> str:
    """Write bytes for a person, in binary units."""
    amount = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.2f} {unit}"
        amount /= 1024
    return f"{amount:.2f} GiB"
