"""Walks over a model: torch's own pass each module through a generator for every level above it."""

from __future__ import annotations

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
    """List a model's modules, each under the first of its paths, as `named_modules()` does."""
    found: dict[nn.Module, str] = {}
    for path, module in modules_by_path(model).items():
        found.setdefault(module, path)
    return found


def paths_above(path: str) -> list[str]:
    """List the paths of the modules that a module, or a parameter, is in, from "" for the model on."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(len(parts))]


def leaves(modules: dict[str, nn.Module], kind: str) -> dict[str, Any]:
    """List parameters or buffers under all their names.

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
