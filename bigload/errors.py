"""The exceptions, and the import of libraries that only some functions need.

Each also derives from the builtin that accelerate raises in the same case, so that an `except ValueError` written for
accelerate keeps working.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType


class BigloadError(Exception):
    """The base class of bigload's errors.

    Attributes:
        context: what was being done, such as "loading 'model/' with device_map='auto'"; shown after the message.

    Examples:
        >>> import bigload
        >>> try:
        ...     bigload.BnbQuantizationConfig.from_mode("nf5")
        ... except bigload.BigloadError as error:
        ...     print(error)
        unknown quantization mode 'nf5' (did you mean 'nf4'?); choose one of nf4, nf4-dq, ...
    """

    context: str = ""

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\n  ({self.context})" if self.context else message


class ConfigError(BigloadError, ValueError):
    """A quantization config or an argument is invalid.

    Examples:
        >>> import bigload
        >>> bigload.BnbQuantizationConfig(load_in_4bit=True, bnb_4bit_blocksize=48)
        Traceback (most recent call last):
        bigload.errors.ConfigError: bnb_4bit_blocksize must be one of (32, 64, ..., 4096), but it is 48
    """


class CheckpointError(BigloadError, RuntimeError):
    """A checkpoint cannot be read or written, or does not fit the model.

    Attributes:
        missing_keys: the model's parameters that are not in the checkpoint.
        unexpected_keys: the checkpoint's tensors that are not in the model.
        mismatched_shapes: parameter -> (shape in the checkpoint, shape in the model).

    Examples:
        >>> import bigload, torch
        >>> from safetensors.torch import save_file
        >>> save_file({"weight": torch.ones(8, 8)}, "no-bias.safetensors")
        >>> with bigload.init_empty_weights():
        ...     layer = torch.nn.Linear(8, 8)
        >>> try:
        ...     bigload.load_and_quantize_model(layer, "nf4", "no-bias.safetensors")
        ... except bigload.CheckpointError as error:
        ...     print(error.missing_keys)
        ['bias']
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
    """A device map or a memory budget cannot be met.

    Examples:
        >>> import bigload, torch
        >>> layers = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> bigload.load_and_quantize_model(layers, "nf4", device_map="cpu", max_memory={"cpu": "1KiB"})
        Traceback (most recent call last):
        bigload.errors.PlacementError: the model needs 4.59 KiB on cpu, max_memory allows 1.00 KiB, ...
    """


class QuantizationError(BigloadError, RuntimeError):
    """A weight cannot be quantized as asked, or a quantized layer cannot be used as asked.

    Examples:
        >>> import bigload, torch
        >>> layers = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> layers[0].weight.data[0, 0] = torch.nan
        >>> bigload.load_and_quantize_model(layers, "nf4")
        Traceback (most recent call last):
        bigload.errors.QuantizationError: '0.weight': values that are not finite ...
    """


class OffloadError(BigloadError, RuntimeError):
    """Offloaded weights cannot be stored, read or streamed.

    Examples:
        >>> import bigload, copy, torch
        >>> layers = torch.nn.Sequential(torch.nn.Linear(1024, 2048), torch.nn.Linear(2048, 8))
        >>> model = bigload.load_and_quantize_model(
        ...     layers, "nf4", device_map={"": "cpu", "0": "disk"}, offload_folder="offload"
        ... )
        >>> copy.deepcopy(model)
        Traceback (most recent call last):
        bigload.errors.OffloadError: a model with offloaded weights cannot be copied or pickled; ...
    """


class DistributedError(BigloadError, RuntimeError):
    """Something that several processes do together has failed in one of them, or they do not agree.

    Attributes:
        ranks: the global ranks of the processes that failed, did not answer, or differ.

    Examples:
        >>> import bigload
        >>> raise bigload.DistributedError("rank 1 did not answer within 600 s", ranks=[1])
        Traceback (most recent call last):
        bigload.errors.DistributedError: rank 1 did not answer within 600 s
    """

    def __init__(self, message: str, *, ranks: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.ranks = list(ranks)


class MissingDependencyError(BigloadError, ImportError):
    """A library that this function needs is not installed.

    Examples:
        >>> from bigload.errors import import_optional
        >>> import_optional("no_such_library", "pip install no-such-library")
        Traceback (most recent call last):
        bigload.errors.MissingDependencyError: this needs no_such_library, which cannot be imported ...
    """


_LONG = 160  # characters of a message that is not cut


def counted(count: int, noun: str) -> str:
    """Return a count with its noun: "1 tensor", "2 tensors"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listed(names: Iterable[str], limit: int = 10) -> str:
    """Quote the first `limit` names for a message, and count the rest."""
    quoted = [repr(name) for name in names]
    more = f" and {len(quoted) - limit} more" if len(quoted) > limit else ""
    return ", ".join(quoted[:limit]) + more


def reason(error: BaseException) -> str:
    """Return what an error of the system or of another library says, in one sentence; no file of ours is named."""
    if isinstance(error, OSError) and error.strerror:
        file = str(error.filename or "")
        return error.strerror if Path(file).name.startswith(".") or not file else f"{error.strerror}: '{file}'"
    said = " ".join(str(error).split()) or type(error).__name__
    first = said.partition(". ")[0].rstrip(".")
    return said if len(said) <= _LONG else first


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
