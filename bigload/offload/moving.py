"""`.to()`, and all else that changes a module's tensors one by one, of a model with weights that rest elsewhere.

`to`, `cuda`, `cpu`, `half` and their like call a module's `_apply`, which calls its children's. What would leave a
weight as it is, were it on the device that computes, leaves it at rest; all else is refused before anything changed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import OffloadError
from ..model.tree import paths_above
from .forwards import Uncopyable
from .leaves import Leaf


class StayingAtRest:
    """Keeps weights at rest when the model, or a part of it, is moved or cast."""

    def __init__(self, model: nn.Module, leaves: Mapping[Leaf, torch.device]) -> None:
        """Take the place of `_apply` of the leaves, and of the modules that they are in.

        Args:
            model: is changed.
            leaves: modules with weights that rest elsewhere, with the devices that compute with them.
        """
        self._guards: list[_GuardedApply] = []
        inside: dict[str, dict[Leaf, torch.device]] = defaultdict(dict)
        for leaf, device in leaves.items():
            for path in [leaf.path, *paths_above(leaf.path)]:
                inside[path][leaf] = device
        try:
            for path, found in inside.items():
                self._guards.append(_GuardedApply(model.get_submodule(path), found))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Give the modules their own `_apply` back; once more does no harm."""
        while self._guards:
            self._guards[-1].remove()
            self._guards.pop()


class _GuardedApply(Uncopyable):
    """A module's `_apply`, which looks first what would become of the weights at rest."""

    def __init__(self, module: nn.Module, leaves: Mapping[Leaf, torch.device]) -> None:
        self._module = module
        self._own: Callable[..., Any] = module._apply
        self._before = vars(module).get("_apply")
        self._away = {name for leaf in leaves if leaf.module is module for name in leaf.parameters}
        # One weight of each dtype and device stands for all.
        self._looked_at = {
            (leaf.module.get_parameter(name).dtype, device): leaf.path
            for leaf, device in leaves.items()
            for name in leaf.parameters
        }
        vars(module)["_apply"] = self

    def remove(self) -> None:
        own = vars(self._module)
        if own.get("_apply") is self:
            own["_apply"] = self._before
            if self._before is None:
                del own["_apply"]

    def __call__(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Change all tensors of the module but those at rest.

        Raises:
            OffloadError: those would change too.
        """
        if recurse or self._away:
            for (dtype, device), path in self._looked_at.items():
                _require_unchanged(fn, dtype, device, path)
        own: dict[str, Any] = vars(self._module)
        held = own["_parameters"]
        own["_parameters"] = {name: parameter for name, parameter in held.items() if name not in self._away}
        try:
            self._own(fn, recurse)
        finally:
            held.update(own["_parameters"])  # torch may put other parameters there
            own["_parameters"] = held
        return self._module


def _require_unchanged(
    fn: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, device: torch.device, path: str
) -> None:
    made = fn(torch.empty(0, dtype=dtype, device=device))
    if (made.dtype, made.device) == (dtype, device):
        return
    change = f"be moved to {made.device}" if made.device != device else f"be cast to {made.dtype}"
    raise OffloadError(
        f"{path!r} is given its weights as it runs, in {dtype} on {device}: they cannot {change}; take the model off "
        "its engine first (model.offload.remove()), then change it"
    )
