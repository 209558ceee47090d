"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from .checkpoints import SIZES, make_checkpoint
from .load import PEERS, compare, measure, table


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    make = commands.add_parser("make", help="write a synthetic Llama checkpoint")
    make.add_argument("size", choices=SIZES)
    make.add_argument("folder", type=Path)
    load = commands.add_parser("load", help="time loads of a checkpoint, peer by peer")
    load.add_argument("folder", type=Path)
    load.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    load.add_argument("--modes", nargs="+", default=["nf4", "int8"])
    load.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    load.add_argument("--out", type=Path, help="where the result goes, as JSON")
    report = commands.add_parser("report", help="a result file as a Markdown table")
    report.add_argument("file", type=Path)
    one = commands.add_parser("one", help="one load, in this process; what `load` calls")
    for name in ("folder", "peer", "mode", "device"):
        one.add_argument(name, type=Path if name == "folder" else str)
    options = parser.parse_args()
    if options.command == "make":
        print(make_checkpoint(options.size, options.folder))
    elif options.command == "one":
        print(json.dumps(measure(options.folder, options.peer, options.mode, options.device)))
    elif options.command == "report":
        print(table(json.loads(options.file.read_text())))
    else:
        compare(options.folder, options.peers, options.modes, options.device, options.out)


if __name__ == "__main__":
    main()
