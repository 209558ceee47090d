"""Traversals of a model, faster than torch's, which nest a generator for every level of modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """List a model's modules under all their paths, itself as "", as `named_modules(remove_duplicate=False)` does."""
    found: dict[str, nn.Module] = {}
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        found[path] = module
        if module._modules:
            prefix = f"{path}." if path else ""
            children = [(prefix + name, child) for name, child in module._modules.items() if child is not None]
            waiting.extend(reversed(children))
    return found


def first_paths(model: nn.Module) -> dict[nn.Module, str]:
    """List a model's modules, each once with the first of its paths, as `named_modules()` does."""
    return unique_modules(modules_by_path(model))


def unique_modules(modules: Mapping[str, nn.Module]) -> dict[nn.Module, str]:
    """Return each module once, with the first of its paths.

    Args:
        modules: from `modules_by_path`.
    """
    found: dict[nn.Module, str] = {}
    for path, module in modules.items():
        found.setdefault(module, path)
    return found


def paths_above(path: str) -> list[str]:
    """List the paths of the ancestors of a module or parameter, from the model, "", downwards."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(len(parts))]


def leaves(modules: dict[str, nn.Module], kind: str) -> dict[str, Any]:
    """Return parameters or buffers under all their names.

    Args:
        modules: from `modules_by_path`.
        kind: "_parameters" or "_buffers".
    """
    return {
        f"{path}.{name}" if path else name: tensor
        for path, module in modules.items()
        for name, tensor in getattr(module, kind).items()
        if tensor is not None
    }
