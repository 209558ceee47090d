"""Hooks that move what a module is called with to the device that computes it.

They are on blocks, not on leaves: where everything is on its device already, a call costs one comparison for each
argument. Activations move where the device changes. What every block is given by name, a mask or position embeddings,
moves once for each device and forward. A model that one device computes is hooked only where callers enter it: the
model itself, and the models inside it that are called on their own. bitsandbytes' kernels read an input that is on
another device as if it were on theirs, which ends all work with CUDA in the process.

A module that holds parameters itself, beside children on other devices, computes with both. Its inputs, and what its
children return, are moved to its parameters.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.nn.utils.rnn import PackedSequence

from ..hardware.devices import CPU

# The attribute of a model that holds its hooks.
_HOOKS_ATTRIBUTE = "_bigload_device_hooks"


class DeviceHooks:
    """The hooks of one model.

    Attributes:
        ask_layers: they ask layers of the model for their device.
    """

    def __init__(self) -> None:
        self.ask_layers = False
        self._handles: list[Any] = []
        self._memo = _Memo()

    def add(
        self,
        model: nn.Module,
        devices: Mapping[str, torch.device | nn.Module],
        in_fp32: Collection[str],
        dtype: torch.dtype | None,
    ) -> None:
        """Hook the modules at the paths in `devices`, and the model, whose output is moved to where its input was.

        The arguments are those of `attach`.
        """
        model_keys = _skip_keys(model)
        for path, device in devices.items():
            module = model.get_submodule(path)
            skip_keys = model_keys | _skip_keys(module)
            self.ask_layers |= isinstance(device, nn.Module)
            move = (
                _MoveInputsToLayer(device, self._memo, skip_keys)
                if isinstance(device, nn.Module)
                else _MoveInputs(device, self._memo, skip_keys)
            )
            self._handles.append(module.register_forward_pre_hook(move, prepend=True, with_kwargs=True))
            if path in in_fp32:
                casts = _CastInputs(skip_keys, dtype)
                self._handles.append(module.register_forward_pre_hook(casts.begin, with_kwargs=True))
                self._handles.append(module.register_forward_hook(casts.end, with_kwargs=True, always_call=True))
        calls = _ModelCalls(self._memo, model_keys)
        self._handles.append(model.register_forward_pre_hook(calls.begin, prepend=True, with_kwargs=True))
        self._handles.append(model.register_forward_hook(calls.end, with_kwargs=True, always_call=True))

    def gather(self, model: nn.Module, path: str, device: torch.device, devices: Mapping[str, torch.device]) -> None:
        """Hook the children of the module at `path` that are not on its device, so that their outputs come there."""
        for child_path, child in _called(path, model.get_submodule(path)):
            inside = (at for other, at in devices.items() if f"{other}.".startswith(f"{child_path}."))
            if any(at != device for at in inside):
                moves = _MoveOutputs(device, _skip_keys(model) | _skip_keys(child))
                self._handles.append(child.register_forward_hook(moves))

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def attach(
    model: nn.Module,
    devices: Mapping[str, torch.device],
    in_fp32: Collection[str] = (),
    dtype: torch.dtype | None = None,
    *,
    entries: Mapping[str, torch.device | nn.Module] | None = None,
) -> DeviceHooks:
    """Hook a model so that each module gets its inputs on its own device, and the caller gets outputs on theirs.

    Hooks from an earlier call are removed first.

    Args:
        model: its weights are where `devices` says.
        devices: path of a module -> the device that computes it.
        in_fp32: paths of modules that compute in float32; their outputs are cast back to the dtype of their inputs.
        dtype: of the outputs of such a module where no input is floating point, as with an embedding.
        entries: path of a module that callers may call with tensors on other devices ("" is the model) -> the device
            that computes its first layer; or such a layer itself, which may be moved later.

    Returns:
        The hooks. There are none if all modules are on one device and there are no entries.
    """
    detach(model)
    hooks = DeviceHooks()
    owners: dict[str, torch.device] = {}
    hooked: dict[str, torch.device | nn.Module] = dict(entries or {})
    if len(set(devices.values())) > 1:
        modules = dict(model.named_modules(remove_duplicate=False))
        hooked |= {path: device for path, device in devices.items() if path in modules}
        owners = _owners_of_parameters(devices, modules)
        hooked |= owners
    if hooked:
        hooks.add(model, hooked, in_fp32, dtype)
        for path, device in owners.items():
            hooks.gather(model, path, device, devices)
        model.__dict__[_HOOKS_ATTRIBUTE] = hooks
    return hooks


def detach(model: nn.Module) -> None:
    """Remove the hooks that `attach` has set, if any."""
    hooks = model.__dict__.pop(_HOOKS_ATTRIBUTE, None)
    if isinstance(hooks, DeviceHooks):
        hooks.remove()


def detach_from_layers(model: nn.Module) -> None:
    """Remove the hooks of a model that ask one of its layers where it is, because that layer will be replaced."""
    hooks = model.__dict__.get(_HOOKS_ATTRIBUTE)
    if isinstance(hooks, DeviceHooks) and hooks.ask_layers:
        detach(model)


def send_to_device(values: Any, device: torch.device) -> Any:
    """Move the tensors in tuples, lists and dicts to a device; where all are there, the same object is returned."""
    return values if _is_on(values, device) else _map_tensors(values, partial(_to_device, device=device))


class _PerThread(threading.local):
    """State that each thread has for itself. A copy of the model begins with new state."""

    def __deepcopy__(self, memo: object) -> Any:
        return type(self)()

    def __reduce__(self) -> Any:
        return type(self), ()


class _Memo(_PerThread):
    """The tensors given by name that have been moved in this thread's forward.

    Attributes:
        is_on: a forward of the model is running.
        origins: the devices that the inputs of the running calls of the model were on, innermost call last.
        moved: (id of the tensor, device, whether gradients are enabled) -> (tensor, its version, the moved tensor).
    """

    def __init__(self) -> None:
        self.is_on = False
        self.origins: list[torch.device | None] = []
        self.moved: dict[tuple[int, torch.device, bool], tuple[torch.Tensor, int, torch.Tensor]] = {}

    def get(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return a tensor on a device. It is moved once, and again only after a change in place."""
        if tensor.is_inference():  # has no version
            return _to_device(tensor, device)
        # A tensor that was moved without gradients has no graph.
        key, version = (id(tensor), device, torch.is_grad_enabled()), tensor._version
        known = self.moved.get(key)
        if known is None or known[1] != version:
            # The tensor itself is kept, so that no other tensor gets its id.
            known = self.moved[key] = tensor, version, _to_device(tensor, device)
        return known[2]


class _MoveInputs:
    """A pre-hook that moves a module's inputs to its device."""

    def __init__(self, device: torch.device, memo: _Memo, skip_keys: Collection[str]) -> None:
        self._device, self._memo, self._skip_keys = device, memo, frozenset(skip_keys)

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        device, skip_keys = self._device, self._skip_keys
        if all(_is_on(value, device) for value in args) and all(
            name in skip_keys or _is_on(value, device) for name, value in kwargs.items()
        ):
            return None
        return _between_graphs(self._moved, args, kwargs)  # type: ignore[no-any-return]

    def _moved(self, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # Activations come by position. They are new for each module, so they are not kept.
        args = tuple(_map_tensors(value, partial(_to_device, device=self._device)) for value in args)
        move = partial(self._memo.get if self._memo.is_on else _to_device, device=self._device)
        skip_keys = self._skip_keys
        named = {name: value if name in skip_keys else _map_tensors(value, move) for name, value in kwargs.items()}
        return args, named


def _between_graphs(move: Callable[..., Any], *args: Any) -> Any:
    """Move tensors outside of what torch.compile compiles: Inductor takes no graph with tensors of two GPUs."""
    # What runs between two graphs would be compiled too. To import torch._dynamo takes more than a second.
    if torch.compiler.is_compiling() or "torch._dynamo" in sys.modules:
        return _run_eagerly(move, args)
    return move(*args)


@_disable_dynamo
def _run_eagerly(move: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return move(*args)


class _MoveInputsToLayer(_MoveInputs):
    """A pre-hook that moves a module's inputs to where one of its layers is now."""

    def __init__(self, layer: nn.Module, memo: _Memo, skip_keys: Collection[str]) -> None:
        self._layer = layer
        super().__init__(CPU, memo, skip_keys)

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if torch.compiler.is_compiling():  # torch itself refuses tensors of several devices then
            return None
        self._device = self._layer.get_parameter("weight").device
        return super().__call__(module, args, kwargs)


class _CastInputs:
    """Hooks on a module that computes in float32: inputs are cast to it, outputs are cast back."""

    def __init__(self, skip_keys: Collection[str], default: torch.dtype | None) -> None:
        self._skip_keys, self._default = frozenset(skip_keys), default
        self._dtypes = _DtypeStack()

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        floating = (tensor for tensor in tensors_in((args, kwargs)) if tensor.is_floating_point())
        self._dtypes.stack.append(next((tensor.dtype for tensor in floating), self._default))
        args = tuple(_map_tensors(value, _in_fp32) for value in args)
        kwargs = {name: v if name in self._skip_keys else _map_tensors(v, _in_fp32) for name, v in kwargs.items()}
        return args, kwargs

    def end(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        dtype = self._dtypes.stack.pop() if self._dtypes.stack else None
        if dtype is None or output is None:
            return None
        return _map_tensors(output, lambda tensor: tensor.to(dtype) if tensor.dtype == torch.float32 else tensor)


class _DtypeStack(_PerThread):
    """The input dtypes of the module's running calls in this thread, innermost call last."""

    def __init__(self) -> None:
        self.stack: list[torch.dtype | None] = []


def _in_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


class _ModelCalls:
    """Hooks on the model: they switch the memo on for one forward, and move outputs to where the inputs were."""

    def __init__(self, memo: _Memo, skip_keys: Collection[str]) -> None:
        self._memo, self._skip_keys = memo, frozenset(skip_keys)

    def begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._memo.moved.clear()  # hooks at the end are not called for a forward that Ctrl-C interrupted
        self._memo.is_on = True
        inputs = (args, [value for name, value in kwargs.items() if name not in self._skip_keys])
        first = next(tensors_in(inputs), None)
        self._memo.origins.append(None if first is None else first.device)

    def end(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        self._memo.moved.clear()
        self._memo.is_on = False
        device = self._memo.origins.pop() if self._memo.origins else None
        if device is None or output is None:
            return None
        return _moved(output, device, self._skip_keys)


class _MoveOutputs:
    """A hook that moves a module's outputs to the device of the module that calls it."""

    def __init__(self, device: torch.device, skip_keys: Collection[str]) -> None:
        self._device, self._skip_keys = device, frozenset(skip_keys)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return _moved(output, self._device, self._skip_keys)


def _moved(output: Any, device: torch.device, skip_keys: Collection[str]) -> Any:
    """Return an output on a device, without what is under `skip_keys` in a dict; None if it is there already."""
    is_dict = isinstance(output, dict)
    leaving = {name: value for name, value in output.items() if name not in skip_keys} if is_dict else output
    if _is_on(leaving, device):
        return None
    moved = _between_graphs(send_to_device, leaving, device)
    return _with_values(output, moved) if is_dict else moved


def _owners_of_parameters(
    devices: Mapping[str, torch.device], modules: Mapping[str, nn.Module]
) -> dict[str, torch.device]:
    """Return the modules whose own parameters have a device, beside their children, with the device of the first."""
    found: dict[str, torch.device] = {}
    for path, device in devices.items():
        owner, _, name = path.rpartition(".")
        if path not in modules and owner in modules and modules[owner]._parameters.get(name) is not None:
            found.setdefault(owner, device)
    return found


def _called(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """List the children that a module may call, with their paths: lists and dicts of modules are not called."""
    for name, child in module.named_children():
        inner = f"{path}.{name}".lstrip(".")
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _called(inner, child)
        else:
            yield inner, child


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if tensor.device == device:
        return tensor
    # Asynchronously between GPUs only: a copy to the CPU would be read before it is complete, and a tensor on the CPU
    # could change before it has been copied.
    return tensor.to(device, non_blocking=tensor.device.type == device.type != "cpu")


def _skip_keys(module: nn.Module) -> set[str]:
    """Return the names of the arguments, caches, that accelerate's and our hooks must not move."""
    names = getattr(module, "_skip_keys_device_placement", None)
    return {names} if isinstance(names, str) else set(names or ())


def _is_on(value: Any, device: torch.device) -> bool:
    if isinstance(value, torch.Tensor):
        return value.device == device
    if isinstance(value, (list, tuple)):
        return all(_is_on(inner, device) for inner in value)
    return not isinstance(value, dict) or all(_is_on(inner, device) for inner in value.values())


def _map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Change the tensors in tuples, lists and dicts; other objects, such as caches, stay as they are."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields") and not isinstance(value, PackedSequence):
        return type(value)(*(_map_tensors(inner, change) for inner in value))
    if type(value) in (list, tuple):
        return type(value)(_map_tensors(inner, change) for inner in value)
    if isinstance(value, dict):
        return _with_values(value, {key: _map_tensors(inner, change) for key, inner in value.items()})
    return value


def _with_values(table: Any, values: Mapping[Any, Any]) -> Any:
    """Copy a dict of any class, such as transformers' outputs, and replace the values of some keys."""
    made = copy.copy(table)
    for key, value in values.items():
        made[key] = value
    return made


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """List the tensors in tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from tensors_in(inner)
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors_in(inner)
