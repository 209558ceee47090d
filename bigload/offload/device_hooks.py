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

import sys
import threading
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch._compile import _disable_dynamo

from ..errors import OffloadError
from ..hardware.devices import CPU
from ..hardware.nested_tensors import is_on, map_tensors, once, send_to_device, tensors_in, to_device, with_values
from ..inspection.callers import called_at, destinations, owners_of_parameters
from .model_device import allow_moves, refuse_moves

# The attribute of a model that holds its hooks.
_HOOKS_ATTRIBUTE = "_bigload_device_hooks"

_Value = TypeVar("_Value")


class DeviceHooks:
    """The hooks of one model.

    Attributes:
        ask_layers: they ask layers of the model for their device.
        dtypes_on_gpu: name of a tensor that the CPU computes in float32 -> the dtype that it has on a GPU.
    """

    def __init__(self) -> None:
        self.ask_layers = False
        self.dtypes_on_gpu: Mapping[str, torch.dtype] = {}
        self._handles: list[Any] = []
        self._memo = _Memo()

    def add(
        self,
        model: nn.Module,
        devices: Mapping[str, torch.device | nn.Module],
        in_fp32: Collection[str],
        dtype: torch.dtype | None,
        returning: Collection[str],
    ) -> None:
        """Hook the modules at the paths in `devices`, and the model, whose output is moved to where its input was.

        The arguments are those of `attach`, and the paths of modules whose outputs are moved back too.
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
                casts = _CastInputs(skip_keys, dtype, only_looks_up=_only_looks_up(module))
                self._handles.append(module.register_forward_pre_hook(casts.begin, with_kwargs=True))
                self._handles.append(module.register_forward_hook(casts.end, with_kwargs=True, always_call=True))
            if path in returning:
                self._add_around(module, _ReturnOutputs(skip_keys))
        self._add_around(model, _ModelCalls(self._memo, model_keys))

    def _add_around(self, module: nn.Module, calls: _ReturnOutputs) -> None:
        self._handles.append(module.register_forward_pre_hook(calls.begin, prepend=True, with_kwargs=True))
        self._handles.append(module.register_forward_hook(calls.end, with_kwargs=True, always_call=True))

    def gather(self, model: nn.Module, outputs: Mapping[str, torch.device]) -> None:
        """Move what the modules at these paths return."""
        for path, device in outputs.items():
            module, (parent, _, name) = model.get_submodule(path), path.rpartition(".")
            moves = _MoveOutputs(device, _skip_keys(model) | _skip_keys(module), model.get_submodule(parent), name)
            self._handles.append(module.register_forward_hook(moves))

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
    hooked: dict[str, torch.device | nn.Module] = dict(entries or {})
    returning: set[str] = set()
    if len(set(devices.values())) > 1:
        modules = dict(model.named_modules(remove_duplicate=False))
        for path, device in devices.items():
            called = dict(called_at(path, modules[path])) if path in modules else {}
            hooked |= dict.fromkeys(called, device)
            returning |= {*called} - {path}
        in_fp32 = {called for path in in_fp32 for called, _ in called_at(path, modules[path])}
        hooked |= owners_of_parameters(devices, modules)
    if hooked:
        hooks.add(model, hooked, in_fp32, dtype, returning)
        if len(set(devices.values())) > 1:
            first = next(iter(devices.values()))
            main = hooked.get("", first)
            hooks.gather(model, destinations(devices, modules, main if isinstance(main, torch.device) else first))
            refuse_moves(model, [*devices.values()])  # the hooks would go on moving what its modules are called with
        model.__dict__[_HOOKS_ATTRIBUTE] = hooks
    return hooks


def detach(model: nn.Module) -> None:
    """Remove the hooks that `attach` has set, if any."""
    hooks = model.__dict__.pop(_HOOKS_ATTRIBUTE, None)
    if isinstance(hooks, DeviceHooks):
        hooks.remove()
        allow_moves(model)


def dtypes_on_gpu(model: nn.Module) -> Mapping[str, torch.dtype]:
    """Return name -> the dtype on a GPU, of the tensors of a model that the CPU computes in float32 beside a GPU."""
    hooks = model.__dict__.get(_HOOKS_ATTRIBUTE)
    return hooks.dtypes_on_gpu if isinstance(hooks, DeviceHooks) else {}


def detach_from_layers(model: nn.Module) -> None:
    """Remove the hooks of a model that ask one of its layers where it is, because that layer will be replaced."""
    hooks = model.__dict__.get(_HOOKS_ATTRIBUTE)
    if isinstance(hooks, DeviceHooks) and hooks.ask_layers:
        detach(model)


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
        moved: (id of the tensor, device, whether gradients are enabled) -> (tensor, its version, the moved tensor).
    """

    def __init__(self) -> None:
        self.is_on = False
        self.moved: dict[tuple[int, torch.device, bool], tuple[torch.Tensor, int, torch.Tensor]] = {}

    def get(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return a tensor on a device. It is moved once, and again only after a change in place."""
        if tensor.is_inference():  # has no version
            return to_device(tensor, device)
        # A tensor that was moved without gradients has no graph.
        key, version = (id(tensor), device, torch.is_grad_enabled()), tensor._version
        known = self.moved.get(key)
        if known is None or known[1] != version:
            # The tensor itself is kept, so that no other tensor gets its id.
            known = self.moved[key] = tensor, version, to_device(tensor, device)
        return known[2]


class _MoveInputs:
    """A pre-hook that moves a module's inputs to its device."""

    def __init__(self, device: torch.device, memo: _Memo, skip_keys: Collection[str]) -> None:
        self._device, self._memo, self._skip_keys = device, memo, frozenset(skip_keys)

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        device, skip_keys = self._device, self._skip_keys
        if all(is_on(value, device) for value in args) and all(
            name in skip_keys or is_on(value, device) for name, value in kwargs.items()
        ):
            return None
        return _between_graphs(self._moved, args, kwargs)  # type: ignore[no-any-return]

    def _moved(self, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # Activations come by position. They are new for each module, so they are not kept.
        args = map_tensors(args, once(partial(to_device, device=self._device)))
        move = partial(self._memo.get if self._memo.is_on else to_device, device=self._device)
        skip_keys = self._skip_keys
        named = {name: value if name in skip_keys else map_tensors(value, move) for name, value in kwargs.items()}
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
        if self._device.type == "meta" and "_hf_hook" in vars(self._layer):  # accelerate moves the layer and its inputs
            return None
        return super().__call__(module, args, kwargs)


class _CastInputs:
    """Hooks on a module that computes in float32: inputs are cast to it, outputs are cast back.

    What a module that only looks up returns has the dtype of its table, also where it is called with a mask in float32.
    """

    def __init__(self, skip_keys: Collection[str], default: torch.dtype | None, *, only_looks_up: bool) -> None:
        self._skip_keys, self._default, self._only_looks_up = frozenset(skip_keys), default, only_looks_up
        self._dtypes = _Stack[torch.dtype]()

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        inputs = () if self._only_looks_up else tensors_in((args, kwargs))
        self._dtypes.push(next((each.dtype for each in inputs if each.is_floating_point()), self._default))
        args = tuple(map_tensors(value, _in_fp32) for value in args)
        kwargs = {name: v if name in self._skip_keys else map_tensors(v, _in_fp32) for name, v in kwargs.items()}
        return args, kwargs

    def end(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        dtype = self._dtypes.pop()
        if dtype is None or output is None:
            return None
        return map_tensors(output, lambda tensor: tensor.to(dtype) if tensor.dtype == torch.float32 else tensor)


def _only_looks_up(module: nn.Module) -> bool:
    """Whether all weights of a module are tables of embeddings."""
    owners = [each for each in module.modules() if each._parameters]
    return bool(owners) and all(isinstance(each, nn.Embedding | nn.EmbeddingBag) for each in owners)


class _Stack(_PerThread, Generic[_Value]):
    """What is known of the inputs of the module's running calls in this thread, innermost call last."""

    def __init__(self) -> None:
        self._values: list[_Value | None] = []

    def push(self, value: _Value | None) -> None:
        self._values.append(value)

    def pop(self) -> _Value | None:
        return self._values.pop() if self._values else None


def _in_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


class _ReturnOutputs:
    """Hooks on a module that move its outputs to where its inputs were."""

    def __init__(self, skip_keys: Collection[str]) -> None:
        self._skip_keys = frozenset(skip_keys)
        self._origins = _Stack[torch.device]()

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        inputs = (args, [value for name, value in kwargs.items() if name not in self._skip_keys])
        first = next(tensors_in(inputs), None)
        self._origins.push(None if first is None else first.device)

    def end(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        device = self._origins.pop()
        if device is None or output is None:
            return None
        return _moved(output, device, self._skip_keys)


class _MoveOutputs:
    """A hook that moves a module's outputs to where the forward that calls it needs them."""

    def __init__(self, device: torch.device, skip_keys: Collection[str], parent: nn.Module, name: str) -> None:
        self._device, self._skip_keys = device, frozenset(skip_keys)
        self._parent, self._name = parent, name

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._parent._modules.get(self._name) is not module:
            return None  # PEFT has put a layer around it, which adds to its output on its device
        return _moved(output, self._device, self._skip_keys)


def _moved(output: Any, device: torch.device, skip_keys: Collection[str]) -> Any:
    """Return an output on a device, without what is under `skip_keys` in a dict; None if it is there already."""
    is_dict = isinstance(output, dict)
    leaving = {name: value for name, value in output.items() if name not in skip_keys} if is_dict else output
    if is_on(leaving, device):
        return None
    moved = _between_graphs(send_to_device, leaving, device)
    return with_values(output, moved) if is_dict else moved


class _ModelCalls(_ReturnOutputs):
    """These hooks on the model, which also switch the memo on for one forward."""

    def __init__(self, memo: _Memo, skip_keys: Collection[str]) -> None:
        super().__init__(skip_keys)
        self._memo = memo

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._memo.moved.clear()  # hooks at the end are not called for a forward that Ctrl-C interrupted
        self._memo.is_on = True
        if "_hf_hook" in vars(module):
            _require_scales(module)
        super().begin(module, args, kwargs)

    def end(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        self._memo.moved.clear()
        self._memo.is_on = False
        return super().end(module, args, kwargs, output)


def _require_scales(model: nn.Module) -> None:
    """Refuse 4-bit layers that accelerate offloads: it puts their scales on meta with the weight, and keeps no others.

    Raises:
        OffloadError: the model has such a layer.
    """
    for path, module in model.named_modules():
        weight = module._parameters.get("weight") if "_hf_hook" in vars(module) else None
        state = None if weight is None else getattr(weight, "quant_state", None)
        if state is not None and state.absmax.is_meta:
            raise OffloadError(
                f"{path!r} is quantized to 4 bit, and accelerate has offloaded it (enable_sequential_cpu_offload, "
                "cpu_offload ...), which loses its scales: load the model again; then move it as a whole, with "
                "enable_model_cpu_offload(), or let bigload stream its blocks, with a device_map"
            )


def _skip_keys(module: nn.Module) -> set[str]:
    """Return the names of the arguments, caches, that accelerate's and our hooks must not move."""
    names = getattr(module, "_skip_keys_device_placement", None)
    return {names} if isinstance(names, str) else set(names or ())
