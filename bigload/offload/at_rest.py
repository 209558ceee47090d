"""What PyTorch does to modules whose weights rest elsewhere: their state_dicts, and `.to()`.

`to`, `cuda`, `cpu`, `half` and their like call a module's `_apply`, which calls its children's. What would leave a
weight as it is, were it on the device that computes, leaves it at rest; all else is refused before anything changed.
A state_dict that is taken shows the weights at rest, and one that is loaded counts at once.
"""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import OffloadError
from ..hardware.pinned import Store
from ..model.tree import paths_above
from .files import FileGroup
from .leaves import Group, Leaf, MethodOverride, remove_all
from .residency import Residency
from .slot_pool import SlotPool


class ApplyGuards:
    """Keeps weights at rest when the model, or a part of it, is moved or cast."""

    def __init__(self, model: nn.Module, leaves: Mapping[Leaf, torch.device]) -> None:
        """Take the place of `_apply` of the leaves, and of the modules that they are in.

        Args:
            model: is changed.
            leaves: modules with weights that rest elsewhere, with the devices that compute with them.
        """
        self._guards: list[_ApplyGuard] = []
        inside: dict[str, dict[Leaf, torch.device]] = defaultdict(dict)
        for leaf, device in leaves.items():
            for path in [leaf.path, *paths_above(leaf.path)]:
                inside[path][leaf] = device
        try:
            for path, found in inside.items():
                self._guards.append(_ApplyGuard(model.get_submodule(path), found))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Return the modules their own `_apply` back; once more does no harm."""
        remove_all(self._guards)


class _ApplyGuard(MethodOverride):
    """A module's `_apply`, which looks first what would become of the weights at rest."""

    def __init__(self, module: nn.Module, leaves: Mapping[Leaf, torch.device]) -> None:
        self._own: Callable[..., Any] = module._apply
        self._away = {name for leaf in leaves if leaf.module is module for name in leaf.parameters}
        # One weight of each dtype and device stands for all.
        self._looked_at = {
            (leaf.module.get_parameter(name).dtype, device): leaf.path
            for leaf, device in leaves.items()
            for name in leaf.parameters
        }
        super().__init__(module, "_apply")

    def __call__(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Change all tensors of the module but those at rest.

        Raises:
            OffloadError: those would change too.
        """
        if recurse or self._away:
            for (dtype, device), path in self._looked_at.items():
                _require_unchanged(fn, dtype, device, path)
        own: dict[str, Any] = vars(self.module)
        held = own["_parameters"]
        own["_parameters"] = {name: parameter for name, parameter in held.items() if name not in self._away}
        try:
            self._own(fn, recurse)
        finally:
            held.update(own["_parameters"])  # torch may put other parameters there
            own["_parameters"] = held
        return self.module


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


def hook_state_dicts(weights: Residency, pool: SlotPool) -> list[Any]:
    """Let state_dicts of a leaf be those of its weights at rest, and what is loaded into it count at once.

    Returns:
        What takes the hooks off.
    """
    module, store = weights.leaf.module, weights.group.store
    return [
        module.register_state_dict_post_hook(functools.partial(_show_at_rest, pool, store)),  # type: ignore[no-untyped-call]
        module._register_load_state_dict_pre_hook(functools.partial(_prepare_to_load, weights)),  # type: ignore[no-untyped-call]
        module.register_load_state_dict_post_hook(_RefetchAfterLoad(pool, weights.group)),  # type: ignore[no-untyped-call]
    ]


def _prepare_to_load(weights: Residency, state: Mapping[str, object], prefix: str, *_: object) -> None:
    """Make ready to load a state_dict into a leaf, or refuse it.

    Raises:
        OffloadError: its weights lie in files, which are never written, or are on the device for a call.
    """
    leaf = weights.leaf
    if not any(prefix + name in state for name in leaf.parameters):
        return
    if isinstance(weights.group.store, FileGroup):
        raise OffloadError(
            f"the weights of {leaf.path!r} lie in files, which a load_state_dict does not change; take the model off "
            "its engine first (model.offload.remove()), then load them"
        )
    if weights.is_used():
        raise OffloadError(f"the weights of {leaf.path!r} are on the device for now: load a state_dict when it has run")
    weights.swap_out()


class _RefetchAfterLoad:
    """A hook that has a group copied anew when a state_dict was loaded into one of its leaves."""

    def __init__(self, pool: SlotPool, group: Group) -> None:
        self._pool, self._group = weakref.ref(pool), group

    def __call__(self, module: nn.Module, keys: object) -> None:
        pool = self._pool()
        if pool is not None:
            pool.forget(self._group)


def _show_at_rest(
    pool: SlotPool, store: Store, module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: object
) -> None:
    """Return a state_dict that is taken while a leaf runs the tensors that will not be overwritten.

    Raises:
        OffloadError: they lie in a file that is not what it was.
    """
    store.require_unchanged()
    memories = {slot.memory.untyped_storage().data_ptr() for slot in pool.slots}
    for name, tensor in state.items():
        is_own = name.startswith(prefix) and type(tensor) is torch.Tensor
        if is_own and tensor.untyped_storage().data_ptr() in memories:
            state[name] = store.at_rest(tensor)
