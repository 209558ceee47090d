"""Runs a command: its messages, its exit status, and what ends it early.

Importing torch takes seconds, so each command imports what it needs only when it runs.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from .. import __version__
from ..errors import BigloadError, reason
from . import load, plan, quantize, show
from .messages import for_the_shell
from .parser import Parser, add_command

OK, FAILED, INTERRUPTED, CLOSED = 0, 1, 128 + signal.SIGINT, 128 + signal.SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: of the command; None for those of the process.

    Returns:
        The exit status: 0 for success, 1 for an error, which is one line, 130 for Ctrl-C, 141 if what reads the output
        has gone. (Wrong arguments end the process with 2, as argparse does.)
    """
    options = argparse.Namespace(shown={}, quiet=False)
    try:
        try:
            with _any_text():
                _run(options, arguments)
        finally:
            _flush()
        status = OK
    except KeyboardInterrupt as interrupt:
        _complain("interrupted" + "".join(f"; {text}" for text in interrupt.args), options)
        status = INTERRUPTED
    except BrokenPipeError:
        status = CLOSED
    except BigloadError as error:
        _complain(Exception.__str__(error), options)  # without what was being loaded, which was typed
        status = FAILED
    except OSError as error:
        _complain(reason(error), options)
        status = FAILED
    except Exception as error:
        if "BIGLOAD_TRACEBACK" in os.environ:
            raise
        _complain(_unexpected(error), options)
        status = FAILED
    if arguments is None:  # the process ends now
        _end_quietly()
    return status


def _run(options: argparse.Namespace, arguments: Sequence[str] | None) -> None:
    _parser().parse_args(arguments, options)
    # bitsandbytes warns about each cast of an int8 layer's input, and about kernels that it does not need.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with _warnings(options):
        options.run(options)


def _parser() -> Parser:
    parser = Parser(
        prog="bigload",
        description="Load PyTorch models larger than your GPU, quantized while the weights stream in.",
        examples=(
            "bigload plan org/name --max-memory 0=8GiB cpu=32GiB",
            'bigload load org/name --prompt "The capital is"',
            "bigload quantize org/name name-nf4",
            "bigload show name-nf4",
        ),
    )
    parser.add_argument("--version", action="version", version=f"bigload {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    add_command(
        commands,
        "demo",
        _demo,
        help="load a real sentence encoder in each mode and compare the results",
        description="Load a small sentence encoder in fp32, int8, nf4 and nf4-dq, and print sizes, times and results.",
        examples=("bigload demo",),
    )
    for command in (load, plan, quantize, show):
        command.add_to(commands)
    return parser


def _demo(options: argparse.Namespace) -> None:
    from .demo import run_demo

    run_demo()


def _unexpected(error: Exception) -> str:
    said = (str(error).splitlines() or [""])[0]
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return f"out of memory: {said or 'none is left'}; a smaller --quant or --max-memory takes less"
    return f"{type(error).__name__}: {said}; an unexpected error: BIGLOAD_TRACEBACK=1 shows where it happened"


def _complain(text: str, options: argparse.Namespace) -> None:
    with suppress(OSError, ValueError):  # nobody may be left to read it
        print(f"bigload: {for_the_shell(text, options.shown)}", file=sys.stderr, flush=True)


class _Warnings(logging.Handler):
    """Prints the package's warnings as the command line prints its errors."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(logging.WARNING)
        self._options = options

    def emit(self, record: logging.LogRecord) -> None:
        if not self._options.quiet:
            _complain(f"warning: {record.getMessage()}", self._options)


@contextmanager
def _warnings(options: argparse.Namespace) -> Iterator[None]:
    logger, handler = logging.getLogger(__package__.partition(".")[0]), _Warnings(options)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def _any_text() -> Iterator[None]:
    """Write a question mark for what the output's encoding lacks, such as a letter of a generated text in ASCII."""
    stream: Any = sys.stdout
    usual = getattr(stream, "errors", None)
    if usual != "strict" or not hasattr(stream, "reconfigure"):
        yield
        return
    stream.reconfigure(errors="replace")
    try:
        yield
    finally:
        with suppress(OSError, ValueError):  # it is flushed first, which fails where nobody reads
            stream.reconfigure(errors=usual)


def _flush() -> None:
    """Write what is buffered, while an error can still be told."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _end_quietly() -> None:
    """Leave nothing for the end of the interpreter to complain about: a Ctrl-C, or output that nobody reads."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    streams: list[Any] = [sys.stdout, sys.stderr]
    for stream in streams:
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
