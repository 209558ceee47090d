"""Imports of libraries that only some functions need."""

from __future__ import annotations

import importlib
from types import ModuleType

from .errors import MissingDependencyError


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
