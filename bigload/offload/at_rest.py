"""`state_dict`, `load_state_dict` and `.to()` of modules whose weights are offloaded.

`to`, `cuda`, `cpu`, `half` and the like call a module's `_apply`, which calls that of its children. For an offloaded
weight the call is tried on an empty tensor on the device that computes. If that tensor does not change, the weight
stays at rest; otherwise the call is refused before anything changes. `state_dict` returns the weights at rest, and what
`load_state_dict` loads is used from the next call on.
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
    """Keep weights at rest when the model, or a part of it, is moved or cast."""

    def __init__(self, model: nn.Module, leaves: Mapping[Leaf, torch.device]) -> None:
        """Override `_apply` of the leaves and of the modules that contain them.

        Args:
            model: changed in place.
            leaves: the modules with offloaded weights, each with the device that computes it.
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
        """Restore the modules' own `_apply`; calling it again does nothing."""
        remove_all(self._guards)


class _ApplyGuard(MethodOverride):
    def __init__(self, module: nn.Module, leaves: Mapping[Leaf, torch.device]) -> None:
        self._own: Callable[..., Any] = module._apply
        self._away = {name for leaf in leaves if leaf.module is module for name in leaf.parameters}
        # One weight stands for all of its dtype and device.
        self._looked_at = {
            (leaf.module.get_parameter(name).dtype, device): leaf.path
            for leaf, device in leaves.items()
            for name in leaf.parameters
        }
        super().__init__(module, "_apply")

    def __call__(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Apply `fn` to all tensors of the module except those at rest.

        Raises:
            OffloadError: `fn` would change those too.
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
        f"the weights of {path!r} are offloaded and streamed, in {dtype} on {device}: they cannot {change}; call "
        "model.offload.remove() first, then change the model"
    )


def hook_state_dicts(weights: Residency, pool: SlotPool) -> list[Any]:
    """Hook a leaf so that `state_dict` returns its weights at rest, and `load_state_dict` changes them.

    Returns:
        The handles that remove the hooks.
    """
    module, store = weights.leaf.module, weights.group.store
    return [
        module.register_state_dict_post_hook(functools.partial(_show_at_rest, pool, store)),  # type: ignore[no-untyped-call]
        module._register_load_state_dict_pre_hook(functools.partial(_prepare_to_load, weights)),  # type: ignore[no-untyped-call]
        module.register_load_state_dict_post_hook(_RefetchAfterLoad(pool, weights.group)),  # type: ignore[no-untyped-call]
    ]


def _prepare_to_load(weights: Residency, state: Mapping[str, object], prefix: str, *_: object) -> None:
    leaf = weights.leaf
    if not any(prefix + name in state for name in leaf.parameters):
        return
    if isinstance(weights.group.store, FileGroup):
        raise OffloadError(
            f"the weights of {leaf.path!r} are in files, which load_state_dict does not change; call "
            "model.offload.remove() first, then load the state_dict"
        )
    if weights.is_used():
        raise OffloadError(
            f"the weights of {leaf.path!r} are in use on the device: load the state_dict after its forward"
        )
    weights.swap_out()


class _RefetchAfterLoad:
    def __init__(self, pool: SlotPool, group: Group) -> None:
        self._pool, self._group = weakref.ref(pool), group

    def __call__(self, module: nn.Module, keys: object) -> None:
        pool = self._pool()
        if pool is not None:
            pool.forget(self._group)


def _show_at_rest(
    pool: SlotPool, store: Store, module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: object
) -> None:
    store.require_unchanged()
    # While the leaf runs, its tensors are those in a slot, which will be overwritten.
    memories = {slot.memory.untyped_storage().data_ptr() for slot in pool.slots}
    for name, tensor in state.items():
        is_own = name.startswith(prefix) and type(tensor) is torch.Tensor
        if is_own and tensor.untyped_storage().data_ptr() in memories:
            state[name] = store.at_rest(tensor)
