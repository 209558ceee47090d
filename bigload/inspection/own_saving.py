"""What modules say about their own saving: hooks and methods that change what a `state_dict` holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from .own_loading import follow, has_own_loading
from .stand_ins import CannotFollow

# The parts of a quantized weight beside its packed values.
_PART = re.compile(r"(?<![^.])(weight\..+|SCB|weight_format)$")


def saving_rules(module: nn.Module) -> list[str]:
    """Name a module's hooks and methods that change its state_dict; bigload's and bitsandbytes' own do not count."""
    hooks = (*module._state_dict_hooks.values(), *module._state_dict_pre_hooks.values())
    named = [getattr(hook, "__qualname__", repr(hook)) for hook in hooks if not _is_ours(hook)]
    cls: Any = type(module)
    if not cls.__module__.startswith("bitsandbytes."):
        for name in ("state_dict", "_save_to_state_dict"):
            is_own = name in vars(module) or getattr(cls, name) is not getattr(nn.Module, name)
            named += [f"{cls.__name__}.{name}"] if is_own else []
    return named


def _is_ours(hook: Any) -> bool:
    return type(hook).__module__.startswith("bigload.")


def weights_changed_by_saving(
    modules: Mapping[str, nn.Module], layers: Mapping[str, Any], state: Mapping[str, Any]
) -> dict[str, list[str]]:
    """Find the quantized weights that modules' own saving changes so that loading would not find them.

    Names may change if the modules' own loading changes them back, and all parts of a weight keep together.

    Args:
        modules: of the model, by path.
        layers: its quantized layers, by path.
        state: the model's state_dict.

    Returns:
        Path of the layer -> the paths of the modules whose saving may have changed its weight.
    """
    ruled = {path for path, module in modules.items() if saving_rules(module)}
    found, renamed = {}, dict[str, str]()
    for path, layer in layers.items() if ruled else ():
        above = [one for one in _and_above(path) if one in ruled]
        key = _key_of(path, layer, state) if above else f"{path}.weight"
        if key is None:
            found[path] = above
        elif above and key != f"{path}.weight".lstrip("."):
            renamed[path] = key
    if renamed:
        loaded = _as_loaded(modules, state)
        for path, key in renamed.items():
            if loaded.get(f"{path}.weight".lstrip(".")) != key:
                found[path] = [one for one in _and_above(path) if one in ruled]
    return found


def _key_of(path: str, layer: Any, state: Mapping[str, Any]) -> str | None:
    """Return the key of a quantized weight, if all of its parts have keys that go with it."""
    parts: dict[str, Any] = {}
    type(layer)._save_to_state_dict(layer, parts, "", False)
    parts.pop("bias", None)
    memory = parts["weight"].data_ptr()
    same = [key for key, value in state.items() if isinstance(value, torch.Tensor) and value.data_ptr() == memory]
    for key in dict.fromkeys([f"{path}.weight".lstrip("."), *same]):
        stem = key.removesuffix("weight")
        if all(_is_same(state.get(f"{stem}{part}"), value) for part, value in parts.items()):
            return key
    return None


def _is_same(saved: Any, part: Any) -> bool:
    if not (isinstance(saved, torch.Tensor) and isinstance(part, torch.Tensor)):
        return type(saved) is type(part) and bool(saved == part)
    if (saved.dtype, saved.shape) != (part.dtype, part.shape):
        return False
    return saved.data_ptr() == part.data_ptr() or torch.equal(saved, part.to(saved.device))


def _as_loaded(modules: Mapping[str, nn.Module], state: Mapping[str, Any]) -> dict[str, str]:
    """Follow the modules' own loading of what is saved.

    Returns:
        The name that a weight has then -> the key that it is saved under.
    """
    known: dict[str, Any] = {
        key: torch.empty(value.shape, dtype=value.dtype, device="meta")
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and not _PART.search(key)
    }
    keys = {id(stand_in): key for key, stand_in in known.items()}
    kept = list(known.values())  # no other object gets the id of one
    for path, module in modules.items():
        if has_own_loading(module) and not type(module).__module__.startswith("bitsandbytes."):
            prefix = f"{path}." if path else ""
            local = {key: value for key, value in known.items() if key.startswith(prefix)}
            for key in local:
                del known[key]
            with suppress(CannotFollow):
                known |= follow(module, prefix, local, {}).state
    del kept
    return {name: keys[id(value)] for name, value in known.items() if id(value) in keys}


def _and_above(path: str) -> Iterable[str]:
    """Return a path and those of the modules that contain it, from the model, "", downwards."""
    parts = path.split(".") if path else []
    return [".".join(parts[:count]) for count in range(len(parts) + 1)]
