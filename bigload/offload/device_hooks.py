"""A model whose parts compute on several devices, or of which part is streamed to one: what goes in is brought there.

A hook on each part, not on each leaf: what is there already costs a comparison. Activations move where the device
changes. What every part is given by name, a mask or position embeddings, moves once per device and forward. Where one
device computes, the hooks are on its entries alone: the model, and the models in it that are called by themselves.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

# Where the hooks of a model are kept, on the model itself.
_KEPT_AS = "_bigload_device_hooks"


class DeviceHooks:
    """The hooks of a model."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._memo = _Memo()

    def add(
        self,
        model: nn.Module,
        devices: Mapping[str, torch.device],
        in_fp32: Collection[str],
        dtype: torch.dtype | None,
    ) -> None:
        """Hook the parts of a model, and the model itself, where its outputs leave it."""
        skipped = _skip_keys(model)
        for path, device in devices.items():
            part = model.get_submodule(path)
            left = skipped | _skip_keys(part)
            hook = _MoveInputs(device, self._memo, left)
            self._handles.append(part.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
            if path in in_fp32:
                casts = _CastInputs(left, dtype)
                self._handles.append(part.register_forward_pre_hook(casts.begin, with_kwargs=True))
                self._handles.append(part.register_forward_hook(casts.end, with_kwargs=True, always_call=True))
        ends = _ModelCall(self._memo, skipped)
        self._handles.append(model.register_forward_pre_hook(ends.begin, prepend=True, with_kwargs=True))
        self._handles.append(model.register_forward_hook(ends.end, with_kwargs=True, always_call=True))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def attach(
    model: nn.Module,
    devices: Mapping[str, torch.device],
    in_fp32: Collection[str] = (),
    dtype: torch.dtype | None = None,
    *,
    entries: Mapping[str, torch.device] | None = None,
) -> DeviceHooks:
    """Let each part of a model find what it is given on its own device, and the caller what comes out on theirs.

    Args:
        model: its weights are where `devices` says; hooks that it has from an earlier call are taken off.
        devices: path of a part -> the device that computes it.
        in_fp32: paths of parts that compute in float32, and give what goes into them.
        dtype: that they give where nothing floating goes in, as into an embedding.
        entries: path of a module that a caller may call with what lies elsewhere, "" for the model -> the device that
            computes the first of it.

    Returns:
        The hooks: none, where all is on one device and there are no entries.
    """
    detach(model)
    hooks = DeviceHooks()
    hooked = dict(entries or {})
    if len(set(devices.values())) > 1:
        modules = dict(model.named_modules(remove_duplicate=False))
        hooked |= {path: device for path, device in devices.items() if path in modules}
    if hooked:
        hooks.add(model, hooked, in_fp32, dtype)
        model.__dict__[_KEPT_AS] = hooks
    return hooks


def detach(model: nn.Module) -> None:
    """Take the hooks off that a model has from `connect`, if it has any."""
    hooks = model.__dict__.pop(_KEPT_AS, None)
    if isinstance(hooks, DeviceHooks):
        hooks.remove()


def send_to_device(values: Any, device: torch.device) -> Any:
    """Move the tensors in tuples, lists and dicts to a device, if they are not all there."""
    return values if _is_on(values, device) else _map_tensors(values, lambda tensor: _to_device(tensor, device))


class _PerThread(threading.local):
    """State of a hook that each thread has for itself; a copy of the model begins with its own."""

    def __deepcopy__(self, memo: object) -> Any:
        return type(self)()

    def __reduce__(self) -> Any:
        return type(self), ()


class _Memo(_PerThread):
    """What has been moved by name in this thread's forward: by the tensor's identity and the device.

    Attributes:
        origins: of the calls of the model that go on, the inner ones last: where what they were given was.
    """

    def __init__(self) -> None:
        self.is_on = False
        self.origins: list[torch.device | None] = []
        self.moved: dict[tuple[int, torch.device, bool], tuple[torch.Tensor, int, torch.Tensor]] = {}

    def get(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return a tensor on a device, moved once for as long as it is not changed in place."""
        if tensor.is_inference():  # nobody counts the writes to it
            return _to_device(tensor, device)
        # What was moved without gradients has lost them.
        key, version = (id(tensor), device, torch.is_grad_enabled()), tensor._version
        known = self.moved.get(key)
        if known is None or known[1] != version:
            # The tensor itself is kept, so that no other gets its id.
            known = self.moved[key] = tensor, version, _to_device(tensor, device)
        return known[2]


class _MoveInputs:
    """A hook that brings what a part is given to its device."""

    def __init__(self, device: torch.device, memo: _Memo, skipped: Collection[str]) -> None:
        self._device, self._memo, self._skip_keys = device, memo, frozenset(skipped)

    def __call__(self, part: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        device, skipped = self._device, self._skip_keys
        if all(_is_on(value, device) for value in args) and all(
            name in skipped or _is_on(value, device) for name, value in kwargs.items()
        ):
            return None
        # By position come the activations, which are new for each part: they are not kept.
        args = tuple(_map_tensors(value, lambda tensor: _to_device(tensor, device)) for value in args)
        kept = self._memo.get if self._memo.is_on and not torch.compiler.is_compiling() else _to_device
        named = {
            name: value if name in skipped else _map_tensors(value, lambda tensor: kept(tensor, device))
            for name, value in kwargs.items()
        }
        return args, named


class _CastInputs:
    """Hooks on a part that computes in float32: what goes in is cast, and what comes out is cast back."""

    def __init__(self, skipped: Collection[str], usual: torch.dtype | None) -> None:
        self._skip_keys, self._usual = frozenset(skipped), usual
        self._dtypes = _Dtypes()

    def begin(self, part: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        floating = (tensor for tensor in _tensors((args, kwargs)) if tensor.is_floating_point())
        self._dtypes.of_calls.append(next((tensor.dtype for tensor in floating), self._usual))
        args = tuple(_map_tensors(value, _in_fp32) for value in args)
        kwargs = {name: v if name in self._skip_keys else _map_tensors(v, _in_fp32) for name, v in kwargs.items()}
        return args, kwargs

    def end(self, part: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        dtype = self._dtypes.of_calls.pop() if self._dtypes.of_calls else None
        if dtype is None or output is None:
            return None
        return _map_tensors(output, lambda tensor: tensor.to(dtype) if tensor.dtype == torch.float32 else tensor)


class _Dtypes(_PerThread):
    """What the calls that go on in this thread were given, the inner ones last."""

    def __init__(self) -> None:
        self.of_calls: list[torch.dtype | None] = []


def _in_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


class _ModelCall:
    """Hooks on the model: what was moved by name is kept for one forward, and what comes out goes where input was."""

    def __init__(self, memo: _Memo, skipped: Collection[str]) -> None:
        self._memo, self._skip_keys = memo, frozenset(skipped)

    def begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._memo.moved.clear()  # of a forward that was interrupted: hooks at the end are not called then
        self._memo.is_on = True
        given = (args, [value for name, value in kwargs.items() if name not in self._skip_keys])
        first = next(_tensors(given), None)
        self._memo.origins.append(None if first is None else first.device)

    def end(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        self._memo.moved.clear()
        self._memo.is_on = False
        device = self._memo.origins.pop() if self._memo.origins else None
        if device is None or output is None:
            return None
        is_named = isinstance(output, dict)
        leaving = {name: value for name, value in output.items() if name not in self._skip_keys} if is_named else output
        made = send_to_device(leaving, device)
        if made is leaving:
            return None
        return _with_values(output, made) if is_named else made


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Bring a tensor to a device; gradients come back the same way."""
    if tensor.device == device:
        return tensor
    # Between GPUs only: to the CPU it would be read before it is there, and from there changed before it has been read.
    return tensor.to(device, non_blocking=tensor.device.type == device.type != "cpu")


def _skip_keys(module: nn.Module) -> set[str]:
    """Return the names of arguments that a module says must be left where they are: caches."""
    names = getattr(module, "_skip_keys_device_placement", None)
    return {names} if isinstance(names, str) else set(names or ())


def _is_on(value: Any, device: torch.device) -> bool:
    if isinstance(value, torch.Tensor):
        return value.device == device
    if isinstance(value, (list, tuple)):
        return all(_is_on(inner, device) for inner in value)
    return not isinstance(value, dict) or all(_is_on(inner, device) for inner in value.values())


def _map_tensors(value: Any, move: Any) -> Any:
    """Move the tensors in tuples, lists and dicts; other objects, caches for instance, stay as they are."""
    if isinstance(value, torch.Tensor):
        return move(value)
    if isinstance(value, tuple) and hasattr(value, "_fields") and not isinstance(value, PackedSequence):
        return type(value)(*(_map_tensors(inner, move) for inner in value))
    if type(value) in (list, tuple):
        return type(value)(_map_tensors(inner, move) for inner in value)
    if isinstance(value, dict):
        return _with_values(value, {key: _map_tensors(inner, move) for key, inner in value.items()})
    return value


def _with_values(table: Any, values: Mapping[Any, Any]) -> Any:
    """Copy a dict, of whatever class, transformers' outputs for instance, with other values for some of its keys."""
    made = copy.copy(table)
    for key, value in values.items():
        made[key] = value
    return made


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
