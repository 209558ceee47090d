"""`bigload show`: says what is in a checkpoint."""

from __future__ import annotations

import argparse
from typing import Any

from .locations import weights_location
from .messages import for_the_shell
from .parser import add_command


def add_to(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "show",
        run,
        help="print what is in a checkpoint: files, parameters, how it is quantized",
        description="Print what is in a checkpoint, from its headers: files, parameters, bytes, how it is quantized.",
        examples=("bigload show org/name", "bigload show ./model/model.safetensors"),
    )
    parser.add_argument("path", help="folder, file of weights or index, or org/name[@revision] of the hub")


def run(options: argparse.Namespace) -> None:
    """Print the description."""
    from ..checkpoint.describe import describe_checkpoint
    from ..notation import output_width, wrapped

    for line in describe_checkpoint(weights_location(options, options.path)).splitlines():
        print("\n".join(wrapped(for_the_shell(line, options.shown), output_width())))
