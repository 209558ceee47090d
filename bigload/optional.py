"""Libraries that only some calls need."""

from __future__ import annotations

import importlib
from types import ModuleType

from .errors import MissingDependencyError


def import_optional(name: str, remedy: str) -> ModuleType:
    """Import a library that is not one of the core dependencies.

    Raises:
        MissingDependencyError: it is not installed; says what to install.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: its native library does not load
        raise MissingDependencyError(f"this needs {name}, which cannot be imported ({error}): {remedy}") from error
