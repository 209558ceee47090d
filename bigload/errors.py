"""What can go wrong, as exceptions.

Each also derives from the builtin that accelerate raises in its place, so that an ``except ValueError`` written for
accelerate keeps working.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class BigloadError(Exception):
    """The root of all errors that bigload raises on purpose.

    Attributes:
        context: what was being done when the error arose, added by the outermost layer; empty before that.
    """

    context: str = ""

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\n  ({self.context})" if self.context else message


class ConfigError(BigloadError, ValueError):
    """A quantization config or an argument that cannot mean anything."""


class CheckpointError(BigloadError, RuntimeError):
    """A checkpoint that cannot be read, or that does not fit the model.

    Attributes:
        missing_keys: parameters of the model without a source in the checkpoint.
        unexpected_keys: tensors of the checkpoint that the model has no place for.
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
    """A device map or a budget that the model cannot be placed by."""


class QuantizationError(BigloadError, RuntimeError):
    """A weight that cannot be quantized as asked."""


class OffloadError(BigloadError, RuntimeError):
    """Weights off the GPU that cannot be kept or brought back."""


class MissingDependencyError(BigloadError, ImportError):
    """A library that this call needs is not installed."""


def counted(count: int, noun: str) -> str:
    """Write a count with its noun: "1 tensor", "2 tensors"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listed(names: Iterable[str], limit: int = 10) -> str:
    """Quote names for a message, the first ``limit`` of them and a count of the rest."""
    quoted = [repr(name) for name in names]
    more = f" and {len(quoted) - limit} more" if len(quoted) > limit else ""
    return ", ".join(quoted[:limit]) + more
