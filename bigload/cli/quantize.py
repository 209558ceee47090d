"""`bigload quantize`: quantizes a checkpoint into a new one."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from .arguments import PATH, add_quant, config, size
from .locations import note, weights_location
from .messages import for_the_shell
from .parser import add_command


def add_to(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "quantize",
        run,
        help="quantize a checkpoint into a new one, without loading the model",
        description=(
            "Quantize a checkpoint into a new folder, file by file, without loading the model. A run that is "
            "interrupted or killed leaves its finished files in .NAME.partial beside the new folder, and the same "
            "command goes on from there."
        ),
        examples=(
            "bigload quantize org/name name-nf4",
            "bigload quantize ./model ./model-int8 --quant int8 --device cpu",
        ),
    )
    parser.add_argument("src", help=f"{PATH}, with config.json and weights")
    parser.add_argument("dst", help="folder to create")
    add_quant(parser, "nf4")
    parser.add_argument(
        "--max-shard-size",
        type=size,
        default="5GB",
        metavar="SIZE",
        help="largest size of the tensors in a file (default: %(default)s)",
    )
    parser.add_argument(
        "--device", help="device that quantizes (default: the current GPU, or the CPU if there is none)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is not empty (default: no)")


def run(options: argparse.Namespace) -> None:
    """Quantize the checkpoint, and print what was written."""
    from ..checkpoint.describe import describe_checkpoint
    from ..conversion import quantize_checkpoint
    from ..notation import output_width, wrapped

    note(options, options.dst)
    try:
        quantize_checkpoint(
            weights_location(options, options.src),
            options.dst,
            config(options, options.quant or "nf4"),
            max_shard_size=options.max_shard_size,
            device=options.device,
            overwrite=options.overwrite,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(*_how_to_go_on(options)) from None
    for line in describe_checkpoint(options.dst).splitlines():
        print("\n".join(wrapped(for_the_shell(line, options.shown), output_width())))


def _how_to_go_on(options: argparse.Namespace) -> list[str]:
    target = Path(options.dst).expanduser()
    target = target.resolve() if target.name in ("", "..") else target
    partial = target.with_name(f".{target.name}.partial")
    if not partial.is_dir():
        return []
    words = [options.src, options.dst, *(["--quant", options.quant] if options.quant else [])]
    for flag, value in (("--skip-modules", options.skip_modules), ("--device", options.device)):
        words += [] if not value else [flag, *([value] if isinstance(value, str) else value)]
    words += [] if options.max_shard_size == "5GB" else ["--max-shard-size", options.max_shard_size]
    command = shlex.join(["bigload", "quantize", *words, *(["--overwrite"] if options.overwrite else [])])
    return [f"what is finished is in '{partial}', and this goes on from there: {command}"]
