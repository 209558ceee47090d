"""The model that a config.json describes, built by the library that wrote it."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from ..errors import BigloadError, CheckpointError, reason
from . import diffusers_facts, transformers_facts


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
