"""How modes and sizes are written: "nf4-dq", "10GiB". Imports no torch, for the command line's sake."""

from __future__ import annotations

import re
from difflib import get_close_matches
from fractions import Fraction
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
