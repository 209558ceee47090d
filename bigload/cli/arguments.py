"""The options that several commands share, and their values."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, import_optional
from ..notation import MODES, parse_size
from .parser import did_you_mean

if TYPE_CHECKING:
    from ..hardware.devices import Device
    from ..planning.offload_config import OffloadConfig

# Fewer bytes than this are no budget: the unit was forgotten.
_FEW, _MANY_GIB = 2**16, 256
_PICTURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")
PATH = "folder, or org/name or org/name@revision of the Hugging Face hub"


def add_quant(parser: argparse.ArgumentParser, default: str) -> None:
    """Add `--quant` and `--skip-modules`; the default is only said, since None lets a checkpoint decide."""
    parser.add_argument(
        "--quant",
        choices=MODES,
        metavar="MODE",
        help=f"{', '.join(MODES)} (default: {default})",
    )
    parser.add_argument(
        "--skip-modules",
        nargs="+",
        metavar="NAME",
        help="layers not to quantize (default: the output head)",
    )


def add_placement(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where a model may go."""
    parser.add_argument(
        "--device-map",
        default="auto",
        metavar="MAP",
        help="auto, balanced, balanced_low_0, sequential, a device such as cpu or 0, or a JSON object of block: device "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--max-memory",
        nargs="+",
        default=[],
        metavar="DEVICE=SIZE",
        help="memory to use, such as 0=10GiB cpu=60GiB (default: what is free)",
    )
    parser.add_argument(
        "--offload-folder",
        metavar="FOLDER",
        help="folder for blocks that are offloaded to the disk (default: none are)",
    )
    parser.add_argument(
        "--reserve",
        type=size,
        metavar="SIZE",
        help="memory of each GPU left for activations (default: 128MiB plus the largest 4-bit layer when dequantized)",
    )
    parser.add_argument(
        "--expert-cache",
        type=_share_or_size,
        metavar="SHARE|SIZE",
        help="where the experts of a mixture are offloaded, how many of them stay on each GPU, those used last: a "
        "share such as 25%% or 0.25, or a size such as 2GiB (default: as many as it has room for)",
    )


def config(options: argparse.Namespace, mode: str) -> Any:
    """Return the quantization config of a mode and the layers to skip."""
    from ..config import BnbQuantizationConfig

    if not options.skip_modules or mode == "none":
        return BnbQuantizationConfig.from_mode(mode)
    return BnbQuantizationConfig.from_mode(mode, skip_modules=options.skip_modules)


def offload(options: argparse.Namespace, reserve: int | str | None) -> OffloadConfig:
    """Return how blocks are offloaded."""
    from ..planning.offload_config import OffloadConfig

    return OffloadConfig(reserve=reserve, expert_cache=options.expert_cache)


def _share_or_size(text: str) -> float | str:
    """Return a share, of a number from 0 to 1 or a percentage, or a size as it was typed."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return text
    if share > 1 and not text.endswith("%"):
        return size(text)
    return share if 0 <= share <= 1 else text


def max_memory(given: Sequence[str]) -> dict[Device, int | str]:
    """Return the budgets that "0=10GiB" and the like say.

    Raises:
        ConfigError: one is not of this form.
    """
    budgets: dict[Device, int | str] = {}
    for text in given:
        device, equals, given_size = text.rstrip(",").partition("=")
        if not (device and equals and given_size):
            raise ConfigError(
                f"--max-memory holds {text!r}; expected a device and a size, such as 0=10GiB or cpu=60GiB"
            )
        place = int(device) if device.isdecimal() else device
        if place in budgets:
            raise ConfigError(f"--max-memory names {device} twice; set one budget for each device")
        try:
            budgets[place] = size(given_size)
        except argparse.ArgumentTypeError as error:
            raise ConfigError(f"--max-memory holds {text!r}: {error}") from error
    return budgets


def device_map(text: str) -> Any:
    """Return a device map: a word, or what a JSON object holds.

    Raises:
        ConfigError: it is neither a strategy, a device nor such an object.
    """
    if not text.lstrip().startswith("{"):
        words = ("auto", "balanced", "balanced_low_0", "sequential", "cpu", "disk")
        if text not in words and not text.isdecimal() and not text.startswith("cuda"):
            raise ConfigError(
                f"--device-map is {text!r}{did_you_mean(text, words)}; expected {', '.join(words[:4])}, a device such "
                "as cpu, 0 or cuda:0, or a JSON object"
            )
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--device-map is not a JSON object: {error}") from error


def size(text: str) -> str:
    """Return a size as it was given, if it is one."""
    from ..errors import PlacementError

    try:
        nbytes = parse_size(text)
    except PlacementError:
        unit = next((letter.upper() for letter in text if letter in "kKmMgGtT"), "")
        number = text.rstrip("kKmMgGtTiIbB ,")
        meant = f"{number}{unit}iB" if unit and number.replace(".", "", 1).isdecimal() else ""
        hint = f" (did you mean '{meant}'?)" if meant else ""
        raise argparse.ArgumentTypeError(f"{text!r} is not a size{hint}; write bytes, or a unit as in 10GiB") from None
    number = text.strip()
    if nbytes < _FEW and not number[-1].isalpha() and float(number):
        meant = f"{number}{'GiB' if nbytes < _MANY_GIB else 'MiB'}"
        raise argparse.ArgumentTypeError(f"{text!r} means so many bytes (did you mean '{meant}'?); add a unit")
    return text


def positive(text: str) -> int:
    """Return a whole number above 0."""
    if not text.isdecimal() or not text.isascii() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def rate(text: str) -> float:
    """Return a number above 0, of GB/s."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GB/s above 0")
    return number


def add_plot(parser: argparse.ArgumentParser, what: str) -> None:
    """Add `--plot` and `--dark`."""
    parser.add_argument("--plot", metavar="FILE", help=f"draw {what} as a picture (needs matplotlib; default: none)")
    parser.add_argument("--dark", action="store_true", help="draw it for a dark background (default: for a light one)")


def require_picture(target: str | None) -> None:
    """Refuse a picture that cannot be drawn, before the work begins.

    Raises:
        ConfigError: its name has another ending, or its folder cannot be written.
        MissingDependencyError: matplotlib is not installed.
    """
    if target is None:
        return
    path = Path(target).expanduser()
    if path.suffix.lower() not in _PICTURES:
        raise ConfigError(f"--plot is '{target}'; expected a file whose name ends with one of {', '.join(_PICTURES)}")
    if path.is_dir() or not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise ConfigError(f"--plot '{target}' cannot be written: name a file in a folder that exists")
    import_optional("matplotlib", "pip install matplotlib")
