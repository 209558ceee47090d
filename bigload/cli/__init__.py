"""The command line: `bigload demo`, `load`, `plan`, `quantize` and `show`."""

from .program import main

__all__ = ["main"]
