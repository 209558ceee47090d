"""The `device` of an offloaded model: the one that computes it, not the one that holds its weights at rest.

In transformers, `model.device` is the device of the first parameter, which is the CPU for an embedding in host memory.
It is a property of the class, so the model's class is replaced by a subclass of the same name that overrides it, as
torch's FSDP2 and parametrizations replace classes too. `parameters()` stays as it is, since optimizers depend on its
order and `dtype` on its first parameter. The subclass also refuses to resize a streamed embedding, which transformers
would replace by a new module on the CPU.

`to`, `cuda`, `cpu`, `half` and the like call a module's `_apply`, which calls that of its children. For an offloaded
weight the call is tried on an empty tensor on the device that computes. If that tensor does not change, the weight
stays at rest; otherwise the call is refused before anything changes. So it is for a model on several devices, whose
hooks would go on moving what its modules are called with. A single layer may also be moved to where its weight says
that it is, the CPU, as PEFT moves int8 layers with their adapters: it stays what it is.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NoReturn

import torch
from torch import nn

from ..errors import OffloadError, listed
from ..hardware.devices import CPU
from ..model import transformers_facts
from ..model.tree import first_paths, modules_by_path, paths_above
from ..planning.plan import Plan
from ..quantization.layers import is_quantized
from .forwards import StreamedForward, forward_override_of, require_readable
from .leaves import Leaf, MethodOverride, refuse_copy, remove_all, without_overrides

# The attribute of a module that names the device that computes it.
_DEVICE_ATTRIBUTE = "_bigload_device"
# `inspect` finds a class and its source by these.
_CLASS_ATTRIBUTES = ("__module__", "__qualname__", "__doc__", "__firstlineno__")


def entries(model: nn.Module, plan: Plan) -> Mapping[str, torch.device | nn.Module]:
    """List the modules that callers may call with tensors on other devices.

    Args:
        model: a loaded model.
        plan: its plan.

    Returns:
        Path -> the device that computes its first layer, of the model ("") and of the models of transformers in it. If
        the whole model is on the one device that computes it, the result is that of `entries_of_whole`.
    """
    if not plan.offloaded and len(set(plan.execution_map.values())) == 1:
        return entries_of_whole(model) if plan.layers else {}
    return {path: device for path in _called(first_paths(model)) if (device := plan.device_of(path)) is not None}


def entries_of_whole(model: nn.Module) -> dict[str, nn.Module]:
    """List the modules that callers may call, of a model that is on one device, and may be moved to another one.

    Returns:
        Path -> a quantized layer in the module, which tells the device. Modules without one are left out: torch itself
        refuses an input on another device there.
    """
    paths = first_paths(model)
    first = {path: _first_quantized(paths, path) for path in _called(paths)}
    return {path: layer for path, layer in first.items() if layer is not None}


def _first_quantized(paths: Mapping[nn.Module, str], inside: str) -> nn.Module | None:
    prefix = f"{inside}." if inside else ""
    below = (module for module, path in paths.items() if path == inside or path.startswith(prefix))
    return next(filter(is_quantized, below), None)


def _called(paths: Mapping[nn.Module, str]) -> list[str]:
    return [path for module, path in paths.items() if not path or _has_device_property(module)]


class ModelDevices:
    """Makes an offloaded model, and the models in it, report the devices that compute them."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        """Replace the classes of the models that have offloaded weights; for the others `device` is right anyway.

        Args:
            model: changed in place.
            plan: its plan.
        """
        self._before: list[tuple[nn.Module, Any]] = []
        modules = modules_by_path(model)
        away = [planned.tensor.name for placed in plan.offloaded for planned in placed.unit.offloaded]
        try:
            for path in {path for name in away for path in paths_above(name)}:
                device = plan.device_of(path)
                if device is not None and _has_device_property(modules[path]):
                    self._replace_class(modules[path], device)
        except BaseException:
            self.remove()
            raise

    def _replace_class(self, module: nn.Module, device: torch.device) -> None:
        own: Any = type(module)
        self._before.append((module, own))
        vars(module)[_DEVICE_ATTRIBUTE] = device
        module.__class__ = _with_compute_device(own)

    def remove(self) -> None:
        """Restore the modules' own classes; may be called again."""
        while self._before:
            module, own = self._before[-1]
            if type(module) is _with_compute_device(own):  # else others have replaced it since
                module.__class__ = own
            vars(module).pop(_DEVICE_ATTRIBUTE, None)
            self._before.pop()


class ApplyGuards:
    """Keep weights at rest when the model, or a part of it, is moved or cast, and let parts of it be copied."""

    def __init__(self, model: nn.Module, leaves: Mapping[Leaf, torch.device]) -> None:
        """Override `_apply` and what copies the leaves and the modules that contain them.

        Args:
            model: changed in place.
            leaves: the modules with offloaded weights, each with the device that computes it.
        """
        self._guards: list[MethodOverride] = []
        inside: dict[str, dict[Leaf, torch.device]] = defaultdict(dict)
        for leaf, device in leaves.items():
            for path in [leaf.path, *paths_above(leaf.path)]:
                inside[path][leaf] = device
        try:
            for path, found in inside.items():
                module = model.get_submodule(path)
                self._guards.append(_ApplyGuard(module, found))
                self._guards.append(_Copy(path, module, found))
                self._guards.append(_State(module, is_leaf=any(leaf.module is module for leaf in found)))
                self._guards.append(_Replica(module))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Restore the modules' own methods; calling it again does nothing."""
        remove_all(self._guards)


class _ApplyGuard(MethodOverride):
    def __init__(self, module: nn.Module, leaves: Mapping[Leaf, torch.device]) -> None:
        self._own: Callable[..., Any] = module._apply
        self._away = {name for leaf in leaves if leaf.module is module for name in leaf.parameters}
        self._is_layer = any(leaf.module is module and leaf.path for leaf in leaves)  # and not the whole model
        self._leaves = leaves
        super().__init__(module, "_apply")

    def __call__(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Apply `fn` to all tensors of the module except those at rest.

        Raises:
            OffloadError: `fn` would change those too.
        """
        if self._is_layer and self._is_where_it_rests(fn):
            move, fn = fn, lambda tensor: move(tensor).to(tensor.device)  # a resident bias stays where it is used
        elif recurse or self._away:
            # One weight stands for all of its dtype and device.
            looked_at = {
                (leaf.module.get_parameter(name).dtype, device): leaf.path
                for leaf, device in self._leaves.items()
                for name in leaf.parameters
            }
            for (dtype, device), path in looked_at.items():
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

    def _is_where_it_rests(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        """Whether `fn` leaves the layer's weights as they are where they rest."""
        kinds = {self.module.get_parameter(name).dtype for name in self._away}
        made = [(dtype, fn(torch.empty(0, dtype=dtype, device=CPU))) for dtype in kinds]
        return all((tensor.dtype, tensor.device) == (dtype, CPU) for dtype, tensor in made)


class _Copy(MethodOverride):
    """Copies a part of a model as it would be without offloading, onto the device that computes it.

    PEFT copies layers that it trains as a whole (`modules_to_save`), or computes with (DoRA).
    """

    def __init__(self, path: str, module: nn.Module, leaves: Mapping[Leaf, torch.device]) -> None:
        self._path = path
        self._devices = {device for leaf, device in leaves.items() if leaf.module is module}
        super().__init__(module, "__deepcopy__")

    def __call__(self, memo: dict[int, Any]) -> nn.Module:
        """Copy the module.

        Raises:
            OffloadError: it is the whole model, or a file with its weights has changed.
        """
        if not self._path:
            refuse_copy()
        require_readable(self.module)
        token = _IS_COPIED_DEEP.set(True)
        try:
            reduced: Any = self.module.__reduce_ex__(4)
        finally:
            _IS_COPIED_DEEP.reset(token)
        make, given, state = reduced[:3]
        made: Any = make(*given)
        memo[id(self.module)] = made
        made.__setstate__(copy.deepcopy(state, memo))
        for device in self._devices:
            made.to(device)
        return made  # type: ignore[no-any-return]


_IS_COPIED_DEEP: ContextVar[bool] = ContextVar("_IS_COPIED_DEEP", default=False)


class _State(MethodOverride):
    """The state of a module that is copied or pickled, without the overrides, which are bound to the original.

    A shallow copy of a leaf would hold weights at rest that nothing brings to the device: it is refused.
    """

    def __init__(self, module: nn.Module, *, is_leaf: bool) -> None:
        self._own: Callable[[], dict[str, Any]] = module.__getstate__
        self._is_leaf = is_leaf
        super().__init__(module, "__getstate__")

    def __call__(self) -> dict[str, Any]:
        """Return the state.

        Raises:
            OffloadError: a leaf is copied by `copy.copy`, or pickled.
        """
        if self._is_leaf and not _IS_COPIED_DEEP.get():
            refuse_copy()
        return without_overrides(self._own())


class _Replica(MethodOverride):
    """Refuses DataParallel's replicas: their forwards would be those of the original."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, "_replicate_for_data_parallel")

    def __call__(self) -> NoReturn:
        """Refuse.

        Raises:
            OffloadError: always.
        """
        raise OffloadError(
            "torch.nn.DataParallel cannot copy a model with offloaded weights to other GPUs: load it with "
            "device_map='balanced', which divides it among them"
        )


def refuse_moves(model: nn.Module, devices: Sequence[torch.device]) -> None:
    """Refuse to move a model that is on several devices to one of them."""
    # As a partial of a module-level function it is copied and pickled with the model.
    vars(model)["_apply"] = functools.partial(_apply_where_it_is, model, tuple(dict.fromkeys(devices)))


def allow_moves(model: nn.Module) -> None:
    """Undo `refuse_moves`, if it was called."""
    if getattr(vars(model).get("_apply"), "func", None) is _apply_where_it_is:
        del vars(model)["_apply"]


def _apply_where_it_is(
    model: nn.Module,
    devices: tuple[torch.device, ...],
    fn: Callable[[torch.Tensor], torch.Tensor],
    recurse: bool = True,
) -> nn.Module:
    """Change all tensors of a model that is on several devices, as `nn.Module._apply` does, but move none.

    Raises:
        OffloadError: `fn` would move some.
    """
    moved = [made for device in devices if (made := fn(torch.empty(0, device=device)).device) != device]
    if moved:
        raise OffloadError(
            f"the model is on {listed(map(str, devices))} and cannot be moved to {moved[0]}: use it where it is, since "
            "its inputs are moved; or load it with device_map={'': device}"
        )
    apply: Callable[..., nn.Module] = type(model)._apply
    return apply(model, fn, recurse)


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


class ComputeDeviceMixin:
    """The first base of the subclass that replaces a model's class."""

    def __init_subclass__(cls) -> None:
        """Do not call the model's own `__init_subclass__`, which may register or check new kinds of model."""

    @property
    def device(self) -> torch.device:
        """The device that computes the model's first layer."""
        device = getattr(self, _DEVICE_ATTRIBUTE, None)
        return super().device if device is None else device  # type: ignore[misc,no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as the model's own class, whose `device` is right for a copy."""
        made = super().__reduce_ex__(protocol)
        if isinstance(made, str):
            return made
        function, given, *more = made
        own = tuple(type(self).__bases__[1] if one is type(self) else one for one in given)
        # pickle refuses copyreg's own function with a class that is not the object's.
        return (_new if function is copyreg.__newobj__ else function, own, *more)  # type: ignore[attr-defined]


def _new(cls: Any, *given: Any) -> Any:
    return cls.__new__(cls, *given)


@functools.cache
def _with_compute_device(own: Any) -> Any:
    if issubclass(own, ComputeDeviceMixin):
        return own
    kept = {name: vars(own)[name] for name in _CLASS_ATTRIBUTES if name in vars(own)}
    if hasattr(own, "resize_token_embeddings"):
        kept["resize_token_embeddings"] = _resizing(own.resize_token_embeddings)
    return type(own)(own.__name__, (ComputeDeviceMixin, own), kept)


def _resizing(resize: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(resize)
    def resize_token_embeddings(model: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(resize).bind(model, *args, **kwargs).arguments
        _require_resizable(model, given.get("new_num_tokens"), given.get("pad_to_multiple_of"))
        return resize(model, *args, **kwargs)

    return resize_token_embeddings


def _require_resizable(model: Any, rows: int | None, multiple: int | None) -> None:
    """Refuse to resize an embedding or a head that is streamed; one that the CPU computes may be resized.

    Args:
        model: a model of transformers.
        rows: the number of tokens that was asked for; None keeps the present number.
        multiple: the number is rounded up to a multiple of this.

    Raises:
        OffloadError: the embedding or the head is streamed, and its size would change.
    """
    if rows is None and multiple is None:
        return
    for module in (model.get_input_embeddings(), transformers_facts.output_head(model)):
        forward = forward_override_of(module) if isinstance(module, nn.Module) else None
        if not isinstance(forward, StreamedForward):
            continue
        present = forward.module.get_parameter("weight").shape[0]
        wanted, step = rows or present, multiple or 1
        if -(-wanted // step) * step != present:
            raise OffloadError(
                f"{forward.path!r} is streamed and cannot be resized from {present} tokens; call "
                "model.offload.remove() first, or load it with a device_map that keeps it on its device"
            )


def _has_device_property(module: nn.Module) -> bool:
    # As the models of transformers and diffusers have.
    return isinstance(getattr(type(module), "device", None), property)
