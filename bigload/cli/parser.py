"""Reads the command line: its errors are one line with what was meant, its help has examples and fits the terminal."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from ..notation import MODES, nearest_mode


class Parser(argparse.ArgumentParser):
    """A parser of argparse that says what may have been meant, and shows examples."""

    def __init__(self, *, examples: Sequence[str] = (), **options: Any) -> None:
        epilog = "\n".join(["examples:", *(f"  {line}" for line in examples)]) if examples else None
        self._given: list[str] = []
        super().__init__(epilog=epilog, formatter_class=_HelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """End the process with status 2 and one line; with the help, where nothing was given at all."""
        if not self._given and self._subparsers is not None:
            self.print_help()
            self.exit(2)
        known = [flag for action in self._actions for flag in action.option_strings]
        unknown = [word for word in self._given if word.startswith("--") and not _is_known(word, known)]
        if unknown and "are required" in message:  # what is missing may be what was misspelt
            message = no_such_option(unknown[0], known)
        greedy = [flag for action in self._actions if action.nargs == "+" for flag in action.option_strings]
        taken = [flag for flag in greedy if flag in self._given]
        if taken and "are required" in message:
            message += f", before {taken[0]}, which takes all that follows it"
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None, **options: Any) -> Any:
        """Parse the arguments that are known; remember what was given, for the errors."""
        self._given = list(args or ())
        return super().parse_known_args(args, namespace, **options)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments; what is left over is an error that names the nearest option."""
        options, left = self.parse_known_args(args, namespace)
        if left:
            parser: Parser = getattr(options, "parser", self)
            flags = [word for word in left if word.startswith("-")]
            if not flags:
                parser.error(f"{left[0]!r} is one argument too many")
            known = [flag for action in parser._actions for flag in action.option_strings]
            parser.error(no_such_option(flags[0], known))
        return options

    def _print_message(self, message: str, file: Any = None) -> None:
        """Write a message; argparse itself says nothing of one that cannot be written."""
        if message and file is not None:
            file.write(message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse what is not among the choices."""
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        if action.metavar == "COMMAND":
            flags = [flag for each in self._actions for flag in each.option_strings]
            meant = did_you_mean(str(value), [*choices, *flags])
            raise argparse.ArgumentError(None, f"{value!r} is not a command{meant}; choose {', '.join(choices)}")
        mode = nearest_mode(str(value)) if action.choices is MODES else None
        meant = did_you_mean(str(value), choices) if mode is None else f" (did you mean '{mode}'?)"
        raise argparse.ArgumentError(action, f"{value!r} is not a value for it{meant}; choose {', '.join(choices)}")


class _HelpFormatter(argparse.HelpFormatter):
    """Wraps paragraphs, and leaves lines that are indented as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = [[line] if line.startswith("  ") else textwrap.wrap(line, width) or [""] for line in text.splitlines()]
        return "\n".join(indent + line for wrapped in lines for line in wrapped)


def no_such_option(word: str, known: Iterable[str]) -> str:
    """Return the message for an option that there is not."""
    word = word.partition("=")[0]
    if len(word) == 2:  # -q: an option in full that begins so
        near = next((flag for flag in known if flag.startswith(f"-{word}")), None)
        return f"there is no option {word}" + (f" (did you mean '{near}'?)" if near else "")
    return f"there is no option {word}{did_you_mean(word, known)}"


def _is_known(word: str, known: Iterable[str]) -> bool:
    """Whether argparse takes a word for an option; it takes the beginning of one for the whole."""
    return any(flag.startswith(word.partition("=")[0]) for flag in known)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the nearest of some words, or nothing."""
    near = get_close_matches(word.lower(), list(known), n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], None],
    *,
    help: str,
    description: str,
    examples: Sequence[str] = (),
) -> Parser:
    """Add the parser of a command, and return it.

    Args:
        commands: the action that holds the commands.
        name: of the command.
        run: what runs it.
        help: a line for the list of commands.
        description: of the command, for its own help.
        examples: command lines.
    """
    parser: Parser = commands.add_parser(name, help=help, description=description, examples=examples)
    parser.set_defaults(run=run, parser=parser)
    return parser
