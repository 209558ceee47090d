"""The exceptions, and the import of libraries that only some functions need.

Each also derives from the builtin that accelerate raises in the same case, so that an `except ValueError` written for
accelerate keeps working.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from types import ModuleType


class BigloadError(Exception):
    """The base class of bigload's errors.

    Attributes:
        context: what was being done, such as "loading 'model/' with device_map='auto'"; shown after the message.
    """

    context: str = ""

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\n  ({self.context})" if self.context else message


class ConfigError(BigloadError, ValueError):
    """A quantization config or an argument is invalid."""


class CheckpointError(BigloadError, RuntimeError):
    """A checkpoint cannot be read or written, or does not fit the model.

    Attributes:
        missing_keys: the model's parameters that are not in the checkpoint.
        unexpected_keys: the checkpoint's tensors that are not in the model.
        mismatched_shapes: parameter -> (shape in the checkpoint, shape in the model).
    """

    def __init__(
        self,
        message: str,
        *,
        missing_keys: Iterable[str] = (),
        unexpected_keys: Iterable[str] = (),
        mismatched_shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
    ) -> None:
        super().__init__(message)
        self.missing_keys = list(missing_keys)
        self.unexpected_keys = list(unexpected_keys)
        self.mismatched_shapes = dict(mismatched_shapes or {})


class PlacementError(BigloadError, ValueError):
    """A device map or a memory budget cannot be met."""


class QuantizationError(BigloadError, RuntimeError):
    """A weight cannot be quantized as asked, or a quantized layer cannot be used as asked."""


class OffloadError(BigloadError, RuntimeError):
    """Offloaded weights cannot be stored, read or streamed."""


class MissingDependencyError(BigloadError, ImportError):
    """A library that this function needs is not installed."""


def counted(count: int, noun: str) -> str:
    """Return a count with its noun: "1 tensor", "2 tensors"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listed(names: Iterable[str], limit: int = 10) -> str:
    """Quote the first `limit` names for a message, and count the rest."""
    quoted = [repr(name) for name in names]
    more = f" and {len(quoted) - limit} more" if len(quoted) > limit else ""
    return ", ".join(quoted[:limit]) + more


def import_optional(name: str, remedy: str) -> ModuleType:
    """Import a library that may not be installed.

    Args:
        name: the module.
        remedy: what the error tells the user to do.

    Raises:
        MissingDependencyError: it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: its native library cannot be loaded
        raise MissingDependencyError(f"this needs {name}, which cannot be imported ({error}): {remedy}") from error
