"""Stand-ins of modules: a module's own code runs on them without changing it, and what it uses is noted."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_USUAL = frozenset(vars(nn.Module()))
# Functions that look at a tensor and not at its values.
_LOOKS = {"__get__", "requires_grad_", "size", "dim", "numel", "is_floating_point", "is_complex", "element_size"}
# Methods that give a tensor new values without using the old ones.
_WHOLE_WRITES = {"copy_", "fill_", "zero_", "resize_", "resize_as_"}


def loading_hooks(module: nn.Module) -> dict[int, Any]:
    """Return the hooks that run before a module is loaded, without those that bigload sets on offloaded modules."""
    hooks: Mapping[int, Any] = module._load_state_dict_pre_hooks
    return {
        key: wrapped
        for key, wrapped in hooks.items()
        if not (getattr(getattr(wrapped.hook, "func", None), "__module__", None) or "").startswith("bigload.")
    }


class CannotFollow(Exception):  # noqa: N818 - says why a rule cannot be followed; not an error by itself
    """A module's own loading needs values, or does what cannot be repeated."""


def stand_in(module: nn.Module, written: Mapping[str, torch.Tensor]) -> nn.Module:
    """Copy a module without its values; what is set on the copy is not set on the module."""
    new = object.__new__(type(module))
    new.__dict__.update(vars(module))
    for kind in ("_parameters", "_buffers"):
        own: Mapping[str, torch.Tensor | None] = getattr(module, kind)
        new.__dict__[kind] = {
            name: None if t is None else _without_value(t, written.get(name)) for name, t in own.items()
        }
    new.__dict__["_modules"] = dict(module._modules)
    new.__dict__.update({name: value.copy() for name, value in plain_containers(module).items()})
    hooks = {key: _rebound(wrapped, module, new) for key, wrapped in loading_hooks(module).items()}
    new.__dict__["_load_state_dict_pre_hooks"] = hooks
    return new


def plain_containers(module: nn.Module) -> dict[str, Any]:
    """Return the lists, dicts and sets that are attributes of a module, and hold no modules or tensors."""
    own = {
        name: value for name, value in vars(module).items() if name not in _USUAL and type(value) in (list, dict, set)
    }
    return {name: value for name, value in own.items() if not any(map(_is_live, _items(value)))}


def is_changed(container: Any, before: Any) -> bool:
    """Whether a container holds other things than before."""
    try:
        return bool(container != before)
    except Exception:  # tensors that were put there, or objects that cannot be compared
        return True


def _items(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def _is_live(value: Any) -> bool:
    return isinstance(value, (nn.Module, torch.Tensor)) or callable(value)


def _without_value(tensor: torch.Tensor, value: torch.Tensor | None) -> torch.Tensor:
    data = torch.empty_like(tensor, device="meta").detach() if value is None else value
    return nn.Parameter(data, requires_grad=False) if isinstance(tensor, nn.Parameter) else data


def _rebound(wrapped: Any, module: nn.Module, new: nn.Module) -> Callable[..., Any]:
    """Return a hook that is called with the stand-in instead of the module."""
    hook = wrapped.hook
    if isinstance(hook, types.MethodType) and hook.__self__ is module:
        hook = types.MethodType(hook.__func__, new)
    return functools.partial(hook, new) if wrapped.with_module else hook


@contextmanager
def restored(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Undo what the block sets on a module, which its hooks may hold; the result says then what that was."""
    own, changed = vars(module), dict[str, Any]()
    before = dict(own)
    held = {kind: dict(own[kind]) for kind in ("_parameters", "_buffers", "_modules")}
    contents = [(name, value, value.copy()) for name, value in plain_containers(module).items()]
    try:
        yield changed
    finally:
        for name, container, content in contents:
            if is_changed(container, content):
                changed[name] = container.copy()
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(content)
        changed |= {name: value for name, value in own.items() if before.get(name, before) is not value}
        own.clear()
        own.update(before)
        for kind, values in held.items():
            own[kind].clear()
            own[kind].update(values)


def tensors_in(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return a module's own parameters and buffers."""
    both = [*module._parameters.items(), *module._buffers.items()]
    return {name: tensor for name, tensor in both if tensor is not None}


def holds_tensors(value: Any) -> bool:
    """Whether a value is a tensor or holds one."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple, set)):
        return any(map(holds_tensors, value))
    return isinstance(value, torch.Tensor)


def memory_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Identify what a tensor shows: equal for a tensor and a parameter made of it, not for a part of it."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


class Uses(TorchFunctionMode):
    """Notes which tensors' values are used.

    Attributes:
        keys: keys of those of the state_dict.
        read: names of the module's own tensors whose values are used.
        written: names of the module's own tensors that may be written to.
        changed: names of those that are, through `tensor.data` too, which counts no version.

    Raises:
        CannotFollow: when the module's real tensors are written to, which a hook may hold beside those of the stand-in.
    """

    def __init__(
        self, state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], real: Mapping[str, torch.Tensor]
    ) -> None:
        super().__init__()
        self._real = _by_storage(real)
        self._state, self._whole = _by_storage(state), {memory_of(tensor) for tensor in state.values()}
        self._own = _by_storage(own)
        self._overwritten = set[str]()  # the values that they had before matter no more
        self.keys, self.read, self.written, self.changed = set[str](), set[str](), set[str](), set[str]()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name not in _LOOKS:
            rest = [*args, *(kwargs or {}).values()]
            is_in_place = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
            if is_in_place and args and isinstance(args[0], torch.Tensor):
                self.changed |= self._named(self._own, args[0])
                if self._named(self._real, args[0]):
                    raise CannotFollow(f"it calls {name} on a tensor of the module, past the one that is loaded")
            if name in _WHOLE_WRITES and args and isinstance(args[0], torch.Tensor):
                if args[0].untyped_storage().nbytes() == args[0].nbytes:
                    self._overwritten |= self._named(self._own, args[0])
                self.written |= self._named(self._own, args[0])
                self.keys |= self._named(self._state, args[0])
                rest = [] if name == "resize_as_" else rest[1:]
            self._note(rest)
        return func(*args, **(kwargs or {}))

    def note_parts(self, values: Iterable[Any]) -> None:
        """Note the tensors that some results are parts or views of."""
        self._note(v for v in values if isinstance(v, torch.Tensor) and memory_of(v) not in self._whole)

    def _note(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, torch.Tensor):
                self.keys |= self._named(self._state, value)
                own = self._named(self._own, value)
                self.read |= own - self._overwritten
                self.written |= own
            elif isinstance(value, (list, tuple)):
                self._note(value)

    @staticmethod
    def _named(names: Mapping[int, str], tensor: torch.Tensor) -> set[str]:
        storage = tensor.untyped_storage()._cdata
        return {names[storage]} if storage in names else set()


def _by_storage(tensors: Mapping[str, torch.Tensor]) -> dict[int, str]:
    return {tensor.untyped_storage()._cdata: name for name, tensor in tensors.items()}


class NoValues(TorchFunctionMode):
    """Refuses to compute with tensors."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") not in _LOOKS and holds_tensors([*args, *(kwargs or {}).values()]):
            raise CannotFollow(f"it calls {getattr(func, '__name__', func)} on tensors")
        return func(*args, **(kwargs or {}))
