"""A snapshot of a model's modules, listed once for all steps of a load."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..inspection.weight_readers import Reader, names_used, reader
from .transformers_facts import is_pretrained
from .tree import leaves, modules_by_path, unique_modules


class ModelView:
    """A snapshot of a model's modules. It does not follow later changes: make a new view after one.

    Attributes:
        model: the model.
        modules: path -> module, shared ones under every path; the model itself is "".
    """

    def __init__(self, model: nn.Module) -> None:
        """List the modules.

        Raises:
            ConfigError: `model` is not an nn.Module.
        """
        require_module(model)
        self.model = model
        self.modules = modules_by_path(model)
        self._weight_reads: dict[torch.dtype | None, dict[nn.Module, set[str]]] = {}

    @cached_property
    def first_paths(self) -> dict[nn.Module, str]:
        """Each module once, with the first of its paths."""
        return unique_modules(self.modules)

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Parameters under all their names."""
        return leaves(self.modules, "_parameters")

    @cached_property
    def buffers(self) -> dict[str, Any]:
        """Buffers under all their names."""
        return leaves(self.modules, "_buffers")

    @cached_property
    def pretrained(self) -> list[Any]:
        """The modules, the model included, that are models of transformers."""
        return [module for module in self.first_paths if is_pretrained(module)]

    @cached_property
    def read_by_owner(self) -> set[nn.Module]:
        """The modules whose weight another module reads without calling their forward."""
        return {module for module, read in self.weight_reads(None).items() if "values" in read}

    @cached_property
    def _readers(self) -> dict[nn.Module, Reader]:
        return {found.owner: found for found in map(reader, self.first_paths) if found is not None}

    def reads_below(self, module: nn.Module) -> bool:
        """Whether a module's own methods read the values of its own weight, or of one below it."""
        found = self._readers.get(module)
        return found is not None and bool(found.paths_read())

    def weight_reads(self, stored: torch.dtype | None) -> dict[nn.Module, set[str]]:
        """Return what other modules read of each module's weight: "values", "dtype", "shape" or "cast".

        Args:
            stored: the dtype that a quantized weight shows; a read that is guarded against it does not count.
        """
        if stored not in self._weight_reads:
            found: dict[nn.Module, set[str]] = {}
            for one in self._readers.values():
                for read in one.reads(stored):
                    if read.getter is None or names_used(self.first_paths, read.getter):
                        found.setdefault(read.module, set()).add(read.what)
            self._weight_reads[stored] = found
        return self._weight_reads[stored]

    def owner(self, name: str) -> nn.Module:
        """Return the module that holds a parameter or buffer."""
        return self.modules[name.rpartition(".")[0]]


def require_module(model: object) -> None:
    """Check that a model is one.

    Raises:
        ConfigError: it is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        found = f"the class {model.__name__}: call it" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ConfigError(f"model must be an nn.Module, but it is {found}")


def view_of(model: nn.Module | ModelView) -> ModelView:
    """Return a new view of a model; a view is returned unchanged."""
    return model if isinstance(model, ModelView) else ModelView(model)
