"""`bigload load`: loads a model, and generates text if asked."""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, counted, reason
from .arguments import (
    PATH,
    add_placement,
    add_plot,
    add_quant,
    config,
    device_map,
    max_memory,
    offload,
    positive,
    require_picture,
)
from .locations import model_folder, note
from .parser import add_command

_USUAL_TOKENS = 40


def add_to(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "load",
        run,
        help="load a model, print how long it took, generate text if asked",
        description=(
            "Build the model that a config.json describes, load its weights, and print how long that took and what it "
            "needs. What does not fit on the GPU is streamed to it from host memory and, with --offload-folder, from "
            "the disk."
        ),
        examples=(
            "bigload load org/name",
            "bigload load ./model --quant int8 --device-map cpu",
            'bigload load ./model --prompt "Once upon a time"',
            "bigload load ./model --max-memory 0=8GiB cpu=32GiB",
        ),
    )
    parser.add_argument("path", help=f"{PATH}, with config.json and safetensors")
    add_quant(parser, "nf4; a quantized checkpoint is loaded as it is")
    add_placement(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="generate a continuation of this text (default: none)")
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help=f"how many tokens to generate (default: {_USUAL_TOKENS})",
    )
    add_plot(parser, "what the load did when")


def run(options: argparse.Namespace) -> None:
    """Load the model, and print its report and the continuation of the prompt."""
    if options.max_new_tokens and options.prompt is None:
        raise ConfigError("--max-new-tokens has no effect without --prompt: pass both, or neither")
    placed, budgets = device_map(options.device_map), max_memory(options.max_memory)
    require_picture(options.plot)
    from ..loading import load_and_quantize_model
    from ..model.described import empty_model
    from ..notation import output_width, wrapped
    from ..planning.plan import summary
    from .pictures import draw_load

    folder = model_folder(options, options.path)
    note(options, options.offload_folder)
    model: Any = empty_model(folder)
    prompt = None if options.prompt is None else _Prompt(model, folder, options)  # fails before the load
    mode = options.quant
    if mode is None and not is_quantized(folder):
        mode = "nf4"
    model = load_and_quantize_model(
        model,
        None if mode is None else config(options, mode),
        folder,
        device_map=placed,
        max_memory=budgets,
        offload_folder=options.offload_folder,
        offload=offload(options, options.reserve),
    )
    report: Any = model.load_report
    lines = [str(report)]
    if "offload" in vars(model):
        lines += [line for line in summary(model.offload.plan) if "streamed" in line or "offloaded" in line]
    print("\n".join(each for line in lines for each in wrapped(line, output_width())))
    if options.plot is not None:
        draw_load(report, Path(options.plot).expanduser(), options.path, dark=options.dark)
    if prompt is not None:
        print(prompt.continued_by(model.eval()))


def is_quantized(folder: Path) -> bool:
    """Whether the weights in a folder are stored quantized."""
    from ..checkpoint.checkpoint import open_checkpoint

    return open_checkpoint(folder).is_quantized


class _Prompt:
    """A text to continue, tokenized before the weights are loaded."""

    def __init__(self, model: Any, folder: Path, options: argparse.Namespace) -> None:
        from ..model.transformers_facts import import_transformers

        if not getattr(model, "can_generate", bool)():
            raise ConfigError(f"{type(model).__name__} does not generate text; leave --prompt out")
        try:
            self._tokenizer = import_transformers().AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # tokenizers fail in many ways
            if "trust_remote_code" in str(error):
                raise CheckpointError(
                    f"the tokenizer in '{folder}' is made by code of its own, which bigload does not run: leave "
                    "--prompt out"
                ) from None
            raise CheckpointError(
                f"'{folder}' holds no tokenizer that transformers can load: {reason(error)}; leave --prompt out"
            ) from error
        self._tokens = self._tokenizer(options.prompt, return_tensors="pt")
        self._count = options.max_new_tokens or _USUAL_TOKENS
        if self._tokens["input_ids"].numel() == 0:
            raise ConfigError(f"--prompt {options.prompt!r} has no tokens to continue")

    def continued_by(self, model: Any) -> str:
        """Return how fast tokens were generated, in a line, and below it the text."""
        from ..decoding.capture import capture_decode
        from ..decoding.obstacles import is_capturable

        tokens = self._tokens.to(model.device)
        how: dict[str, Any] = {"max_new_tokens": self._count, "do_sample": False}
        with ExitStack() as stack:
            capture = None
            if is_capturable(model):
                capture = stack.enter_context(capture_decode(model))
                how["cache_implementation"] = "static"
            begun = time.perf_counter()
            text = self._tokenizer.decode((made := model.generate(**tokens, **how))[0], skip_special_tokens=True)
            seconds = time.perf_counter() - begun
            count = made.shape[1] - tokens["input_ids"].shape[1]
            rate = f"{counted(count, 'token')} generated in {seconds:.2f} s, {count / seconds:.1f} tokens/s"
            if capture is not None and capture.stats().captures:
                rate += f", {capture.stats().capture_s:.2f} s of it to capture decode steps"
        return f"{rate}\n{text}"
