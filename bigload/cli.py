"""The command line: `bigload demo`, `bigload load`, `bigload quantize` and `bigload show`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .config import MODES
from .errors import BigloadError, CheckpointError, ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0 done, 1 a `BigloadError`, which is printed without a traceback, 130 interrupted.
    """
    options = _parser().parse_args(arguments)
    # bitsandbytes warns at each cast of an int8 layer's input and of kernels that it can do without.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        options.run(options)
    except BigloadError as error:
        print(f"bigload: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bigload: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bigload", description="Load PyTorch models larger than your GPU, quantized as the weights stream in."
    )
    parser.add_argument("--version", action="version", version=f"bigload {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="load a real sentence encoder in three modes and compare what it finds")
    demo.set_defaults(run=_demo)
    load = commands.add_parser(
        "load", help="load a model from a folder in transformers' format, say how long it took, and generate if asked"
    )
    load.add_argument("path", type=Path, help="folder with config.json and safetensors")
    load.add_argument(
        "--quant", choices=MODES, help="how to quantize (default: nf4, and as it is what is quantized already)"
    )
    load.add_argument("--device-map", default="auto", help="'auto', a device such as 'cpu' or '0', or a JSON object")
    load.add_argument("--prompt", help="generate a continuation of this text")
    load.add_argument(
        "--max-new-tokens", type=_positive, default=40, help="how much to generate (default: %(default)s)"
    )
    load.set_defaults(run=_load)
    quantize = commands.add_parser("quantize", help="quantize a checkpoint into another, in a stream")
    quantize.add_argument("src", help="folder with config.json and weights")
    quantize.add_argument("dst", type=Path, help="folder to make")
    quantize.add_argument("--quant", default="nf4", choices=MODES, help="how to quantize (default: %(default)s)")
    quantize.add_argument("--max-shard-size", default="5GB", help="of the tensors in a file (default: %(default)s)")
    quantize.add_argument("--device", help="that quantizes (default: the first GPU, or the CPU where there is none)")
    quantize.add_argument("--overwrite", action="store_true", help="replace a folder that is not empty")
    quantize.set_defaults(run=_quantize)
    show = commands.add_parser("show", help="say what is in a checkpoint: files, parameters, how it is quantized")
    show.add_argument("path", help="whatever load_and_quantize_model takes as weights_location")
    show.set_defaults(run=_show)
    return parser


def _demo(options: argparse.Namespace) -> None:
    from .demo import run_demo

    run_demo()


def _load(options: argparse.Namespace) -> None:
    from .checkpoint import open_checkpoint
    from .hf import empty_model
    from .loading import load_and_quantize_model

    if not (options.path / "config.json").is_file():
        raise CheckpointError(f"'{options.path}' is not a folder with a config.json; `load` builds the model from it")
    device_map = _device_map(options.device_map)
    model = empty_model(options.path)
    prompt = None if options.prompt is None else _Prompt(model, options)  # what is wrong with it shows before the load
    mode = options.quant
    if mode is None and not open_checkpoint(options.path).is_quantized:
        mode = "nf4"
    model = load_and_quantize_model(model, mode, options.path, device_map=device_map)
    print(model.load_report)
    if prompt is not None:
        print(prompt.continued_by(model.eval()))


def _quantize(options: argparse.Namespace) -> None:
    from .offline import quantize_checkpoint
    from .show import describe_checkpoint

    quantize_checkpoint(
        options.src,
        options.dst,
        options.quant,
        max_shard_size=options.max_shard_size,
        device=options.device,
        overwrite=options.overwrite,
    )
    print(describe_checkpoint(options.dst))


def _show(options: argparse.Namespace) -> None:
    from .show import describe_checkpoint

    print(describe_checkpoint(options.path))


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _device_map(text: str) -> Any:
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--device-map is not a JSON object: {error}") from error


class _Prompt:
    """A text to continue, tokenized before the weights are loaded."""

    def __init__(self, model: Any, options: argparse.Namespace) -> None:
        from .hf import import_transformers

        if not getattr(model, "can_generate", bool)():
            raise ConfigError(f"{type(model).__name__} does not generate text; leave --prompt out")
        try:
            self._tokenizer = import_transformers().AutoTokenizer.from_pretrained(options.path, local_files_only=True)
        except Exception as error:  # tokenizers fail in many ways
            raise CheckpointError(f"'{options.path}' holds no tokenizer that transformers can load: {error}") from error
        self._tokens = self._tokenizer(options.prompt, return_tensors="pt")
        self._count = options.max_new_tokens
        if self._tokens["input_ids"].numel() == 0:
            raise ConfigError(f"--prompt {options.prompt!r} has no tokens to continue")

    def continued_by(self, model: Any) -> str:
        made = model.generate(**self._tokens.to(model.device), max_new_tokens=self._count, do_sample=False)
        return str(self._tokenizer.decode(made[0], skip_special_tokens=True))
