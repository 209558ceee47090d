"""What modules say about their own saving: hooks and methods that change what a `state_dict` holds."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from types import FunctionType
from typing import Any

import torch
from torch import nn

from .own_loading import SET_BY_LOADING, Outcome, follow, has_own_loading, saves_extra_state
from .stand_ins import CannotFollow

# The parts of a quantized weight beside its packed values.
_PART = re.compile(r"(?<![^.])(weight\..+|SCB|weight_format)$")
_UNSET = object()


def saving_rules(module: nn.Module) -> list[str]:
    """Name a module's hooks and methods that change its state_dict; bigload's and bitsandbytes' own do not count."""
    hooks = (*module._state_dict_hooks.values(), *module._state_dict_pre_hooks.values())
    named = [getattr(hook, "__qualname__", repr(hook)) for hook in hooks if not _is_ours(hook)]
    cls: Any = type(module)
    if not cls.__module__.startswith("bitsandbytes."):
        for name in ("state_dict", "_save_to_state_dict"):
            own = vars(module).get(name)
            is_own = (own is not None and not _is_ours(getattr(own, "func", own))) or (
                getattr(cls, name) is not getattr(nn.Module, name)
            )
            named += [f"{cls.__name__}.{name}"] if is_own else []
    return named


def _is_ours(hook: Any) -> bool:
    module = hook.__module__ if isinstance(hook, FunctionType) else type(hook).__module__
    return module.startswith("bigload.")


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


_Saved = Mapping[str, tuple[torch.dtype, Sequence[int]]]
_Attributes = dict[str, dict[str, Any]]


def attributes_set_by_loading(modules: Mapping[str, nn.Module], saved: _Saved) -> _Attributes:
    """Return what modules' own loading has set on them, or would set, beside tensors: by path and name."""
    found: _Attributes = {}
    for path, module in modules.items():
        names = [*vars(module).get(SET_BY_LOADING, ())]
        if has_own_loading(module) and not type(module).__module__.startswith("bitsandbytes."):
            outcome = _followed(path, module, saved)
            names += [] if outcome is None else outcome.attributes
        held = {name: vars(module)[name] for name in names if name in vars(module) and name != SET_BY_LOADING}
        if held:
            found[path] = held
    return found


def kept_attributes(
    attributes: Mapping[str, Mapping[str, Any]],
    modules: Mapping[str, nn.Module],
    saved: _Saved,
    skipped: Collection[str],
) -> tuple[_Attributes, list[str]]:
    """Divide what modules' own loading has set on them by whether it comes back.

    Args:
        attributes: path -> name -> value.
        modules: of the model, by path.
        saved: the dtype and shape of each saved tensor, by name.
        skipped: the paths of modules whose own loading will not run on what is saved.

    Returns:
        What JSON can hold; and the names of attributes that neither JSON nor the modules' own loading, or extra state,
        brings back.
    """
    kept: _Attributes = {}
    lost = []
    for path, own in attributes.items():
        plain = {name: value for name, value in own.items() if _is_json(value)}
        rest = {name: value for name, value in own.items() if name not in plain}
        if plain:
            kept[path] = plain
        if rest and not saves_extra_state(modules[path]):
            again = {} if path in skipped else _set_again(path, modules[path], saved, rest)
            lost += [f"{path}.{name}".lstrip(".") for name, value in rest.items() if not _is_equal(again, name, value)]
    return kept, lost


def _set_again(path: str, module: nn.Module, saved: _Saved, names: Iterable[str]) -> Mapping[str, Any]:
    """Return what a module's own loading sets on it, also where that is what it has now."""
    own, before = vars(module), dict(vars(module))
    own.update(dict.fromkeys(names, _UNSET))
    try:
        outcome = _followed(path, module, saved)
    finally:
        own.update(before)
    return {} if outcome is None else outcome.attributes


def _followed(path: str, module: nn.Module, saved: _Saved) -> Outcome | None:
    prefix = f"{path}." if path else ""
    state = {n: torch.empty(shape, dtype=d, device="meta") for n, (d, shape) in saved.items() if n.startswith(prefix)}
    try:
        return follow(module, prefix, state, {})
    except CannotFollow:
        return None


def _is_equal(again: Mapping[str, Any], name: str, value: Any) -> bool:
    return name in again and type(again[name]) is type(value) and again[name] == value


def _is_json(value: Any) -> bool:
    """Whether JSON gives a value back as it is."""
    if type(value) is list:
        return all(map(_is_json, value))
    if type(value) is dict:
        return all(type(key) is str and _is_json(held) for key, held in value.items())
    return value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))


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
