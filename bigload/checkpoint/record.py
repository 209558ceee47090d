"""bigload.json, beside a saved model's weights: how the model was quantized, which layers, and what is tied."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..config import BnbQuantizationConfig
from ..errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

RECORD_NAME = "bigload.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Record:
    """What `save_quantized_model` writes beside the weights.

    Attributes:
        layout: identifies the weights it belongs to: see `layout_of`.
        config: how the model was quantized, without the lists of modules.
        layers: paths of the quantized layers.
        kept: paths of the layers that could have been quantized but were not.
        ties: the names of each group of tied parameters; the weight is stored by the first.
        as_loaded: paths of the modules whose tensors are stored as their own `_load_from_state_dict` left them, so that
            it must not change them again.
        attributes: module path -> what its own loading had set on it, beside tensors.
        experts: paths of the modules whose fused experts are quantized, as (E, out_features, in_features).
    """

    layout: str
    config: BnbQuantizationConfig
    layers: tuple[str, ...]
    kept: tuple[str, ...]
    ties: tuple[tuple[str, ...], ...]
    as_loaded: tuple[str, ...] = ()
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    experts: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "format_version": FORMAT_VERSION,
            "layout": self.layout,
            "config": {name: self.config.to_dict()[name] for name in _fields(self.config)},
            "layers": list(self.layers),
            "kept": list(self.kept),
            "ties": [list(names) for names in self.ties],
            **({"as_loaded": list(self.as_loaded)} if self.as_loaded else {}),
            **({"attributes": self.attributes} if self.attributes else {}),
            **({"experts": list(self.experts)} if self.experts else {}),
        }


def layout_of(tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]]) -> str:
    """Return a hash of tensors' names, dtypes and shapes, in any order, which ties a record to its weights."""
    lines = sorted(f"{name} {dtype} {list(shape)}" for name, dtype, shape in tensors)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_record(folder: Path, layout: Callable[[], str]) -> Record | None:
    """Read the record in a folder; None where there is none, or where it belongs to weights of another layout.

    Args:
        folder: that may hold it.
        layout: returns `layout_of` the tensors there, which takes time where there are tens of thousands.

    Raises:
        CheckpointError: it is damaged, or its format version is unknown.
    """
    path = folder / RECORD_NAME
    if not path.is_file():
        return None

    def wrong(what: object) -> CheckpointError:
        return CheckpointError(
            f"'{path}' is damaged: {what}; remove it to load the weights without it, or save the model again"
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
    if said.get("layout") != layout():
        logger.warning("'%s' was written with other weights than those beside it: it is ignored", path)
        return None
    try:
        return _parsed(said)
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise wrong(f"{type(error).__name__}: {error}") from error


def _fields(config: BnbQuantizationConfig) -> list[str]:
    """Return the names of the fields that are used in a config's mode."""
    modes = ("load_in_8bit", "llm_int8") if config.load_in_8bit else ("load_in_4bit", "bnb_4bit")
    return [name for name in config.to_dict() if name.startswith((*modes, "torch_dtype"))]


def _parsed(said: Mapping[str, Any]) -> Record:
    ties, as_loaded = [_names(names) for names in said["ties"]], _names(said.get("as_loaded", []))
    config = BnbQuantizationConfig.from_dict(dict(said["config"]))
    attributes = said.get("attributes", {})
    if not isinstance(attributes, dict) or not all(isinstance(own, dict) for own in attributes.values()):
        raise TypeError(f"{attributes!r} is not a dict of attributes by module")
    layers, kept = _names(said["layers"]), _names(said["kept"])
    experts = _names(said.get("experts", []))
    return Record(said["layout"], config, layers, kept, tuple(ties), as_loaded, attributes, experts)


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{value!r} is not a list of names")
    return tuple(value)
