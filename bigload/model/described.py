"""The model that a config.json describes, built by the library that wrote it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import BigloadError, CheckpointError, reason
from . import diffusers_facts, transformers_facts

# Numbers in a config that say how many modules are built, and more than any model has.
_COUNTS = re.compile(r"(n|num)_\w*(layers?|blocks|experts)|\w+_layers|depths?|layers_per_block")
_MOST_MODULES = 100_000


def empty_model(folder: Path) -> nn.Module:
    """Build the model that a config.json, or the one in a folder, describes: without weights, in eval mode.

    Raises:
        CheckpointError: no model can be built from the config, or only by code that lies in the folder.
        MissingDependencyError: the library that the config is of is not installed.
    """
    try:
        config = json.loads((folder / "config.json" if folder.is_dir() else folder).read_bytes())
    except (OSError, ValueError, RecursionError):
        config = None  # transformers says what is wrong
    if isinstance(config, dict):
        _require_countable(config, folder)
    if not isinstance(config, dict) or not {"_class_name", "_diffusers_version"} <= config.keys():
        return transformers_facts.empty_model(folder)
    try:
        return diffusers_facts.empty_model(config)
    except BigloadError:
        raise
    except Exception as error:  # a model class may raise anything for a config that does not fit it
        raise CheckpointError(
            f"diffusers cannot build a model from the config in '{folder}': {type(error).__name__}: {reason(error)}"
        ) from error


def _require_countable(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse numbers of modules that would fill the memory with modules before a weight is looked at."""
    for name, value in config.items():
        if isinstance(value, dict):
            _require_countable(value, folder)
        elif isinstance(value, int) and value > _MOST_MODULES and _COUNTS.fullmatch(name):
            raise CheckpointError(
                f"the config in '{folder}' says {name}={value:.3g}, more than any model has: it is damaged"
            )
