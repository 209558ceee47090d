"""What an offloaded model says is its device: the one that computes it, not where its weights rest.

transformers' `device` is that of a model's first parameter, which for an embedding in host memory is the CPU. It is a
property of the class, so the class is exchanged for one of the same name that answers otherwise, as torch's FSDP2 and
its parametrizations exchange classes too. `parameters()` stays as it is: its order is that of optimizers and of
`named_parameters()`, and its first is what `dtype` is read from. The class also refuses to resize what is streamed,
which would be exchanged for a module that lies where the old one rests.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import OffloadError
from ..model import transformers_facts
from ..model.tree import first_paths, modules_by_path, paths_above
from ..planning.plan import Plan
from .forwards import StreamedForward, forward_override_of

# Where a module keeps the device that computes it.
_DEVICE_ATTRIBUTE = "_bigload_device"
# What `inspect` finds a class and its source by.
_CLASS_ATTRIBUTES = ("__module__", "__qualname__", "__doc__", "__firstlineno__")


def entries(model: nn.Module, plan: Plan) -> dict[str, torch.device]:
    """List the modules that may be called with what lies elsewhere, with the device that computes the first of each.

    Args:
        model: loaded.
        plan: by which.

    Returns:
        Path -> device, of the model ("") and the models of transformers in it; nothing, where all of it lies on the
        one device that computes.
    """
    if not plan.offloaded and len(set(plan.execution_map.values())) == 1:
        return {}
    called = [path for module, path in first_paths(model).items() if not path or _has_device_property(module)]
    return {path: device for path in called if (device := plan.device_of(path)) is not None}


class ModelDevices:
    """The models in an offloaded model, itself included, say which device computes them."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        """Exchange the classes of those that have weights elsewhere; the others say so by themselves.

        Args:
            model: is changed.
            plan: where its weights rest, and what computes with them.
        """
        self._before: list[tuple[nn.Module, Any]] = []
        modules = modules_by_path(model)
        away = [planned.tensor.name for placed in plan.offloaded for planned in placed.unit.offloaded]
        try:
            for path in {path for name in away for path in paths_above(name)}:
                device = plan.device_of(path)
                if device is not None and _has_device_property(modules[path]):
                    self._exchange(modules[path], device)
        except BaseException:
            self.remove()
            raise

    def _exchange(self, module: nn.Module, device: torch.device) -> None:
        own: Any = type(module)
        self._before.append((module, own))
        vars(module)[_DEVICE_ATTRIBUTE] = device
        module.__class__ = _with_compute_device(own)

    def remove(self) -> None:
        """Return the modules their own classes back; once more does no harm."""
        while self._before:
            module, own = self._before[-1]
            if type(module) is _with_compute_device(own):  # and no other has exchanged it since
                module.__class__ = own
            vars(module).pop(_DEVICE_ATTRIBUTE, None)
            self._before.pop()


class ComputeDeviceMixin:
    """Comes before a model's own class, in a class that has that one's name."""

    def __init_subclass__(cls) -> None:
        """Keep it from bases that list, or check, what derives from them: this is no new kind of model."""

    @property
    def device(self) -> torch.device:
        """The device that computes the first of the model."""
        device = getattr(self, _DEVICE_ATTRIBUTE, None)
        return super().device if device is None else device  # type: ignore[misc,no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy as the own class: a copy has its weights where they say that they are."""
        made = super().__reduce_ex__(protocol)
        if isinstance(made, str):
            return made
        function, given, *more = made
        own = tuple(type(self).__bases__[1] if one is type(self) else one for one in given)
        # pickle would have copyreg's own function make nothing but what it was given.
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
    """Refuse to resize an embedding or a head that is streamed; one that looks up on the host may be.

    Args:
        model: of transformers.
        rows: that are wanted; None for those that there are.
        multiple: that their number is rounded up to.

    Raises:
        OffloadError: says which is streamed.
    """
    if rows is None and multiple is None:
        return
    for module in (model.get_input_embeddings(), transformers_facts.output_head(model)):
        forward = forward_override_of(module) if isinstance(module, nn.Module) else None
        if not isinstance(forward, StreamedForward):
            continue
        there = forward.module.get_parameter("weight").shape[0]
        wanted, step = rows or there, multiple or 1
        if -(-wanted // step) * step != there:
            raise OffloadError(
                f"{forward.path!r} is streamed and cannot be resized from {there} tokens; take the model off its "
                "engine first (model.offload.remove()), then resize it, or load it with a device_map that keeps it on "
                "its device"
            )


def _has_device_property(module: nn.Module) -> bool:
    """Whether a module has a `device` that its class finds out, as those of transformers and diffusers do."""
    return isinstance(getattr(type(module), "device", None), property)
