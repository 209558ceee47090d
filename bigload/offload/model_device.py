"""The `device` of an offloaded model: the one that computes it, not the one that holds its weights at rest.

In transformers, `model.device` is the device of the first parameter, which is the CPU for an embedding in host memory.
It is a property of the class, so the model's class is replaced by a subclass of the same name that overrides it, as
torch's FSDP2 and parametrizations replace classes too. `parameters()` stays as it is, since optimizers depend on its
order and `dtype` on its first parameter. The subclass also refuses to resize a streamed embedding, which transformers
would replace by a new module on the CPU.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import OffloadError
from ..model import transformers_facts
from ..model.tree import first_paths, modules_by_path, paths_above
from ..planning.plan import Plan
from ..quantization.layers import is_quantized
from .forwards import StreamedForward, forward_override_of

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
        return entries_of_whole(model)
    return {path: device for path in _called(model) if (device := plan.device_of(path)) is not None}


def entries_of_whole(model: nn.Module) -> dict[str, nn.Module]:
    """List the modules that callers may call, of a model that is on one device, and may be moved to another one.

    Returns:
        Path -> a quantized layer in the module, which tells the device. Modules without one are left out: torch itself
        refuses an input on another device there.
    """
    layers = {path: module for module, path in first_paths(model).items() if is_quantized(module)}
    first = {above: path for path in reversed(layers) for above in [path, *paths_above(path)]}
    return {path: layers[first[path]] for path in _called(model) if path in first}


def _called(model: nn.Module) -> list[str]:
    return [path for module, path in first_paths(model).items() if not path or _has_device_property(module)]


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
