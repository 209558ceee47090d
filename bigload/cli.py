"""The command line: `bigload demo`, `load`, `plan`, `quantize` and `show`.

Importing torch takes seconds, so each command imports what it needs only when it runs.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import BigloadError, CheckpointError, ConfigError
from .modes import MODES

if TYPE_CHECKING:
    from .hardware.devices import Device
    from .planning.plan import Plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0 for success, 1 for a `BigloadError`, which is printed without a traceback, 130 for Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    # bitsandbytes warns about each cast of an int8 layer's input, and about kernels that it does not need.
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
    demo = commands.add_parser("demo", help="load a real sentence encoder in three modes and compare the results")
    demo.set_defaults(run=_demo)
    load = commands.add_parser(
        "load",
        help="load a model of transformers or diffusers from a folder, print how long it took, generate text if asked",
    )
    load.add_argument("path", type=Path, help="folder with config.json and safetensors")
    load.add_argument(
        "--quant", choices=MODES, help="quantization mode (default: nf4; a quantized checkpoint is loaded as it is)"
    )
    load.add_argument(
        "--device-map",
        default="auto",
        help="'auto', a device such as 'cpu' or '0', or a JSON object (default: %(default)s)",
    )
    _add_budgets(load)
    load.add_argument("--prompt", help="generate a continuation of this text")
    load.add_argument(
        "--max-new-tokens", type=_positive, default=40, help="how many tokens to generate (default: %(default)s)"
    )
    load.set_defaults(run=_load)
    _add_plan(commands)
    quantize = commands.add_parser("quantize", help="quantize a checkpoint into a new one, without loading the model")
    quantize.add_argument("src", help="folder with config.json and weights")
    quantize.add_argument("dst", type=Path, help="folder to create")
    quantize.add_argument("--quant", default="nf4", choices=MODES, help="quantization mode (default: %(default)s)")
    quantize.add_argument(
        "--max-shard-size", default="5GB", help="largest size of the tensors in a file (default: %(default)s)"
    )
    quantize.add_argument(
        "--device", help="device that quantizes (default: the current GPU, or the CPU if there is none)"
    )
    quantize.add_argument("--overwrite", action="store_true", help="replace a folder that is not empty")
    quantize.set_defaults(run=_quantize)
    show = commands.add_parser("show", help="print what is in a checkpoint: files, parameters, how it is quantized")
    show.add_argument("path", help="any weights_location of load_and_quantize_model")
    show.set_defaults(run=_show)
    return parser


def _add_budgets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-memory",
        nargs="+",
        default=[],
        metavar="DEVICE=SIZE",
        help="memory to use, such as 0=10GiB cpu=60GiB (default: what is free); `plan` may name absent devices",
    )
    parser.add_argument("--offload-folder", help="folder for blocks that are offloaded to the disk")


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser("plan", help="print what a model needs of GPUs, CPU and disk, without loading it")
    plan.add_argument("path", type=Path, help="folder with config.json, with or without weights, or a config.json")
    plan.add_argument(
        "--quant", choices=MODES, help="quantization mode (default: nf4; a quantized checkpoint stays as it is)"
    )
    plan.add_argument("--device-map", default="auto", help="as for `load` (default: %(default)s)")
    _add_budgets(plan)
    plan.add_argument(
        "--reserve",
        help="memory of each GPU for activations (default: 128MiB and the largest 4-bit layer, dequantized)",
    )
    plan.add_argument("--link-gbps", type=float, help="GB/s of the link to a GPU (default: measured if there is a GPU)")
    plan.add_argument("--plot", type=Path, metavar="PNG", help="draw the plan into a file; needs matplotlib")
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")
    plan.set_defaults(run=_plan)


def _demo(options: argparse.Namespace) -> None:
    from .demo import run_demo

    run_demo()


def _load(options: argparse.Namespace) -> None:
    from .loading import load_and_quantize_model
    from .model.described import empty_model

    if not (options.path / "config.json").is_file():
        raise CheckpointError(f"'{options.path}' is not a folder with a config.json; `load` builds the model from it")
    device_map = _device_map(options.device_map)
    model = empty_model(options.path)
    prompt = None if options.prompt is None else _Prompt(model, options)  # fails before the load
    mode = options.quant
    if mode is None and not _is_quantized(options.path):
        mode = "nf4"
    model = load_and_quantize_model(
        model,
        mode,
        options.path,
        device_map=device_map,
        max_memory=_max_memory(options.max_memory),
        offload_folder=options.offload_folder,
    )
    print(model.load_report)
    if prompt is not None:
        print(prompt.continued_by(model.eval()))


def _plan(options: argparse.Namespace) -> None:
    from .checkpoint.folders import WEIGHTS
    from .model.described import empty_model
    from .planning.offload_config import OffloadConfig
    from .planning.plan import plan_table
    from .planning.planner import plan_device_map
    from .planning.report import draw_plan, plan_json

    folder = options.path
    has_weights = folder.is_dir() and any(WEIGHTS.fullmatch(path.name) for path in folder.iterdir())
    if not (folder / "config.json" if folder.is_dir() else folder).is_file():
        raise CheckpointError(
            f"'{folder}' is neither a config.json nor a folder with one; `plan` builds the model from it"
        )
    quant = options.quant or (None if has_weights and _is_quantized(folder) else "nf4")
    plan = plan_device_map(
        empty_model(folder),
        quant,
        folder if has_weights else None,
        _device_map(options.device_map),
        max_memory=_max_memory(options.max_memory),
        offload_folder=options.offload_folder,
        offload=OffloadConfig(reserve=options.reserve),
    )
    link = options.link_gbps or _measured_link(plan)
    print(json.dumps(plan_json(plan, link), indent=2) if options.json else plan_table(plan, link))
    if options.plot is not None:
        draw_plan(plan, options.plot)


def _is_quantized(path: Path) -> bool:
    from .checkpoint.checkpoint import open_checkpoint

    return open_checkpoint(path).is_quantized


def _measured_link(plan: Plan) -> float | None:
    import torch

    from .hardware.bandwidth import link_gb_per_s

    return link_gb_per_s(torch.device("cuda", 0)) if plan.streamed_bytes and torch.cuda.is_available() else None


def _max_memory(given: Sequence[str]) -> dict[Device, int | str]:
    pairs = [text.partition("=") for text in given]
    wrong = [
        text for text, (device, equals, size) in zip(given, pairs, strict=True) if not (device and equals and size)
    ]
    if wrong:
        raise ConfigError(
            f"--max-memory holds {wrong[0]!r}; expected a device and a size, such as 0=10GiB or cpu=60GiB"
        )
    return {int(device) if device.isdecimal() else device: size for device, _, size in pairs}


def _quantize(options: argparse.Namespace) -> None:
    from .checkpoint.describe import describe_checkpoint
    from .conversion import quantize_checkpoint

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
    from .checkpoint.describe import describe_checkpoint

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
        from .model.transformers_facts import import_transformers

        if not getattr(model, "can_generate", bool)():
            raise ConfigError(f"{type(model).__name__} does not generate text; leave --prompt out")
        try:
            self._tokenizer = import_transformers().AutoTokenizer.from_pretrained(
                options.path, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # tokenizers fail in many ways
            if "trust_remote_code" in str(error):
                raise CheckpointError(
                    f"the tokenizer in '{options.path}' is made by code of its own, which bigload does not run: leave "
                    "--prompt out"
                ) from None
            raise CheckpointError(f"'{options.path}' holds no tokenizer that transformers can load: {error}") from error
        self._tokens = self._tokenizer(options.prompt, return_tensors="pt")
        self._count = options.max_new_tokens
        if self._tokens["input_ids"].numel() == 0:
            raise ConfigError(f"--prompt {options.prompt!r} has no tokens to continue")

    def continued_by(self, model: Any) -> str:
        made = model.generate(**self._tokens.to(model.device), max_new_tokens=self._count, do_sample=False)
        return str(self._tokenizer.decode(made[0], skip_special_tokens=True))
