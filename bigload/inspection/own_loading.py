"""What modules say about their own loading, followed as `load_state_dict` follows it, without changing the model.

`nn.Module.load_state_dict` calls a module's `_load_from_state_dict` and its hooks, which may rename keys, compute
values or set attributes, and `set_extra_state`. Here they run on a stand-in of the module and a state_dict of tensors
on meta. What then lies in the stand-in says what each of the module's tensors is loaded from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .stand_ins import (
    CannotFollow,
    NoValues,
    Uses,
    holds_tensors,
    is_changed,
    loading_hooks,
    memory_of,
    plain_containers,
    restored,
    stand_in,
    tensors_in,
)

EXTRA_STATE = "_extra_state"
# An attribute of a module, with the names of those that its own loading has set: they are saved with the model.
SET_BY_LOADING = "_set_by_loading"

# Their own rules concern buffers of old checkpoints: they are followed only where a buffer has no value of its own.
_NORMS = (nn.modules.batchnorm._NormBase,)
# Hold for the module that is followed, not for what it loads.
_CONTAINERS = ("_parameters", "_buffers", "_modules", "_load_state_dict_pre_hooks", "set_extra_state")


@functools.cache
def has_extra_state(cls: type[nn.Module]) -> bool:
    """Whether modules of a class load extra state."""
    return getattr(cls, "set_extra_state", None) is not nn.Module.set_extra_state


def saves_extra_state(module: nn.Module) -> bool:
    """Whether a module's class saves extra state."""
    own: Any = getattr(type(module), "get_extra_state", None)
    return own is not nn.Module.get_extra_state


def has_own_loading(module: nn.Module) -> bool:
    """Whether a module has a `_load_from_state_dict` of its own, or hooks that run before it."""
    own = vars(module)
    if "_load_from_state_dict" in own or (own.get("_load_state_dict_pre_hooks") and loading_hooks(module)):
        return True
    cls: Any = type(module)
    if not _class_has_own_loading(cls) or isinstance(module, torch.jit.ScriptModule):
        return False
    return not isinstance(module, _NORMS) or any(b is not None and b.is_meta for b in module._buffers.values())


@functools.cache
def _class_has_own_loading(cls: type) -> bool:
    return getattr(cls, "_load_from_state_dict", None) is not nn.Module._load_from_state_dict


def rule_of(module: nn.Module) -> str:
    """Name a module's own rule, for a message."""
    named = [getattr(wrapped.hook, "__qualname__", repr(wrapped.hook)) for wrapped in loading_hooks(module).values()]
    cls: Any = type(module)
    if _class_has_own_loading(cls) or "_load_from_state_dict" in vars(module):
        named.append(f"{cls.__name__}._load_from_state_dict")
    return " and ".join(named)


@dataclass
class Outcome:
    """What a module's own loading did.

    Attributes:
        state: the state_dict of the module and its children, as the children will load it.
        values: the module's own tensors by name, where something was loaded into them.
        extra: what `set_extra_state` was called with, if it was.
        attributes: what the rule set on the module, other than tensors.
        missing: keys that it reported as missing.
        errors: what it reported as wrong.
        used: keys of the tensors whose values it used.
        written: names of the module's own tensors that it wrote to in place.
    """

    state: dict[str, Any]
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    extra: list[Any] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)


def follow(
    module: nn.Module,
    prefix: str,
    state: Mapping[str, Any],
    metadata: Mapping[str, Any],
    written: Mapping[str, torch.Tensor] | None = None,
) -> Outcome:
    """Run a module's own loading on a stand-in of it. The module is not changed.

    Args:
        module: whose own tensors, not its children's, are loaded.
        prefix: of its keys: its path and a dot, or "".
        state: the state_dict of the module and its children; on meta, or where the values matter real.
        metadata: the module's, from the state_dict.
        written: real tensors for those of the module's own that the rule writes to; the others are on meta.

    Raises:
        CannotFollow: the rule needs values of tensors on meta, or changes the module's children.
    """
    outcome = Outcome(dict(state))
    copied = stand_in(module, written or {})
    copied.__dict__["set_extra_state"] = outcome.extra.append
    own, before = tensors_in(copied), _attributes(copied)
    contents = {name: value.copy() for name, value in plain_containers(copied).items()}
    versions = {name: tensor._version for name, tensor in own.items()}
    uses = Uses(
        {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}, own, tensors_in(module)
    )
    # The tensors take what is loaded as it is, so that one that is not changed can be recognised.
    said = {**metadata, "assign_to_params_buffers": True}
    try:
        with restored(module) as changed, torch.device("cpu"), uses, torch.no_grad():
            copied._load_from_state_dict(outcome.state, prefix, said, True, outcome.missing, [], outcome.errors)
    except CannotFollow:
        raise
    except Exception as error:  # a rule may raise anything
        raise CannotFollow(f"{type(error).__name__}: {error}") from error
    after, held = _attributes(copied), tensors_in(copied)
    if held.keys() != own.keys() or copied._modules != module._modules:
        raise CannotFollow("it adds or removes parameters, buffers or modules")
    outcome.attributes = {
        name: value
        for name, value in after.items()
        if before.get(name, before) is not value or (name in contents and is_changed(value, contents[name]))
    } | changed
    if any(map(holds_tensors, outcome.attributes.values())):
        raise CannotFollow(f"it keeps tensors in {', '.join(outcome.attributes)}")
    outcome.values = {
        name: value
        for name, value in held.items()
        if value is not own[name] or value._version > versions[name] or name in uses.changed
    }
    put = [value for name, value in outcome.values.items() if value is not own[name]]
    uses.note_parts([*put, *outcome.state.values(), *outcome.extra])
    outcome.used, outcome.written = uses.keys, uses.written
    if not written and any(own_value(module, name).is_meta for name in uses.read):
        raise CannotFollow("it uses values that the module had before, which are on meta")
    return outcome


def has_own_load_state_dict(model: nn.Module) -> bool:
    """Whether a model's class loads state_dicts by a method of its own."""
    own: Any = getattr(type(model), "load_state_dict", None)
    return own is not nn.Module.load_state_dict and not isinstance(model, torch.jit.ScriptModule)


def passed_on(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Run a model's own `load_state_dict` and return the state_dict that it gives to nn.Module's.

    Args:
        model: left as it was.
        state: tensors on meta.

    Raises:
        CannotFollow: it uses values of tensors, or does not call nn.Module's method.
    """
    taken: list[dict[str, Any]] = []

    def take(local_state: dict[str, Any], prefix: str, *_: Any) -> None:
        if not prefix:
            taken.append(dict(local_state))

    copied = _without_loading(model, take)
    try:
        with restored(model), torch.device("cpu"), NoValues(), torch.no_grad():
            copied.load_state_dict(dict(state), strict=False)
    except CannotFollow:
        raise
    except Exception as error:  # a model's own code may raise anything
        raise CannotFollow(f"{type(error).__name__}: {error}") from error
    if len(taken) != 1:
        raise CannotFollow("it does not call nn.Module's load_state_dict once")
    return taken[0]


def _without_loading(module: nn.Module, take: Callable[..., None]) -> nn.Module:
    """Copy a module and its children; where they would load their tensors, `take` is called."""
    new = stand_in(module, {})
    new.__dict__["_load_from_state_dict"] = take
    new.__dict__["_modules"] = {
        name: None if child is None else _without_loading(child, take) for name, child in module._modules.items()
    }
    new.__dict__["_load_state_dict_post_hooks"] = {}
    return new


def changed_when_loaded_again(
    modules: Mapping[str, nn.Module], saved: Mapping[str, tuple[torch.dtype, Sequence[int]]], *, as_held: bool
) -> list[str]:
    """Return the paths of the modules whose own loading would change what is saved of them.

    Args:
        modules: of the model, by path.
        saved: the dtype and shape of each saved tensor, by name.
        as_held: tensors are saved as the modules hold them, not as their own `state_dict` returns them.
    """
    found = []
    for path, module in modules.items():
        if not has_own_loading(module) or type(module).__module__.startswith("bitsandbytes."):
            continue
        if not as_held and _has_own_saving(module):
            continue
        prefix = f"{path}." if path else ""
        state = {
            n: torch.empty(shape, dtype=d, device="meta") for n, (d, shape) in saved.items() if n.startswith(prefix)
        }
        try:
            outcome = follow(module, prefix, state, {})
        except CannotFollow:
            found.append(path)
            continue
        results = {**outcome.state, **{f"{prefix}{name}": value for name, value in outcome.values.items()}}
        unchanged = {key: memory_of(value) for key, value in state.items()}
        if outcome.used or any(
            isinstance(value, torch.Tensor) and unchanged.get(key) != memory_of(value) for key, value in results.items()
        ):
            found.append(path)
    return found


def _has_own_saving(module: nn.Module) -> bool:
    save = getattr(type(module), "_save_to_state_dict", None)
    return save is not nn.Module._save_to_state_dict or bool(module._state_dict_hooks or module._state_dict_pre_hooks)


def own_value(module: nn.Module, name: str) -> torch.Tensor:
    """Return a module's own parameter or buffer."""
    return tensors_in(module)[name]


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _CONTAINERS}


def try_post_hooks(module: nn.Module, missing: list[str], unexpected: list[str]) -> None:
    """Run the hooks that follow a module's loading, to see that they need no weights and what keys they take away.

    Args:
        module: left as it was.
        missing, unexpected: of the whole model; changed as the hooks do.

    Raises:
        CannotFollow: a hook uses weights, or changes which tensors the module holds.
    """
    held, modules = tensors_in(module), dict(module._modules)
    try:
        with restored(module), NoValues():
            run_post_hooks(module, missing, unexpected)
            after, children = tensors_in(module), dict(module._modules)
    except CannotFollow:
        raise
    except Exception as error:  # a hook may raise anything
        raise CannotFollow(f"{type(error).__name__}: {error}") from error
    same = held.keys() == after.keys() and all(after[name] is tensor for name, tensor in held.items())
    if not same or children != modules:
        raise CannotFollow("it changes which parameters, buffers or modules there are")


def run_post_hooks(module: nn.Module, missing: list[str], unexpected: list[str]) -> None:
    """Run the hooks that follow a module's loading.

    Raises:
        TypeError: a hook returns something, which torch does not allow.
    """
    keys = nn.modules.module._IncompatibleKeys(missing, unexpected)
    for hook in module._load_state_dict_post_hooks.values():
        if hook(module, keys) is not None:
            raise TypeError("a hook after load_state_dict must return None, and change the keys it is given")
