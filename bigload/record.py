"""What a saved model says of itself beside its weights: how it was quantized, which layers, and what is tied."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import BnbQuantizationConfig
from .errors import CheckpointError, ConfigError

RECORD_NAME = "bigload.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Record:
    """What `save_quantized_model` writes beside the weights.

    Attributes:
        weights: name of the file with the weights, or of their index.
        config: how the model was quantized, without "auto" and without lists of modules.
        layers: paths of the quantized layers.
        kept: paths of the layers that could have been quantized and were not.
        ties: names of the parameters that are one weight, each group once; the first is the one that is stored.
    """

    weights: str
    config: BnbQuantizationConfig
    layers: tuple[str, ...]
    kept: tuple[str, ...]
    ties: tuple[tuple[str, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """Give it as values that JSON holds."""
        return {
            "format_version": FORMAT_VERSION,
            "weights": self.weights,
            "config": self.config.to_dict(),
            "layers": list(self.layers),
            "kept": list(self.kept),
            "ties": [list(names) for names in self.ties],
        }


def read_record(weights: Path) -> Record | None:
    """Read the record of a file of weights, or of their index; None where there is none for it.

    Raises:
        CheckpointError: it is damaged, or of a version that this bigload does not know.
    """
    path = weights.parent / RECORD_NAME
    if not path.is_file():
        return None

    def wrong(what: object) -> CheckpointError:
        return CheckpointError(
            f"'{path}' is damaged: {what}; remove it to load the weights without it, or save them anew"
        )

    try:
        said = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise wrong(error) from error
    if not isinstance(said, dict) or not isinstance(said.get("format_version"), int):
        raise wrong("it names no format_version")
    if said["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"'{path}' is of format version {said['format_version']}, this bigload knows {FORMAT_VERSION}: install a "
            "newer one"
        )
    if said.get("weights") != weights.name:
        return None
    try:
        return _parsed(said)
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise wrong(f"{type(error).__name__}: {error}") from error


def _parsed(said: Mapping[str, Any]) -> Record:
    ties = [_names(names) for names in said["ties"]]
    config = BnbQuantizationConfig.from_dict(dict(said["config"]))
    return Record(said["weights"], config, _names(said["layers"]), _names(said["kept"]), tuple(ties))


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{value!r} is no list of names")
    return tuple(value)
