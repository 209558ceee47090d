"""Models built to be quantized: their Linear layers take no memory if they are built empty."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import QuantizationError, listed
from ..model.empty import like_parameter, once
from .in_place import wait_for_conversion


class _Building(threading.local):
    """The contexts that this thread is in: for each, whether it builds models without initial values."""

    def __init__(self) -> None:
        self.is_empty: list[bool] = []


_building = _Building()

# The layer of each weight that is on meta instead of the device where it was built.
_layer_of = WeakIdKeyDictionary()


@contextmanager
def linears_to_quantize() -> Iterator[None]:
    """Let the Linear layers that this thread builds wait for their conversion.

    If `nn.init` is switched off, as Lightning's `empty_init=True` does, their weights take no memory.
    """
    _install_hooks()
    _building.is_empty.append(_init_is_off())
    try:
        yield
    finally:
        _building.is_empty.pop()


def _init_is_off() -> bool:
    probe = torch.ones(1, device="cpu")
    nn.init.constant_(probe, 0)  # zeros_ asks no mode
    return bool(probe.item())


@once
def _install_hooks() -> None:
    register_module_parameter_registration_hook(_registered)  # type: ignore[arg-type]
    register_optimizer_step_pre_hook(_require_filled)


def _registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """Return the parameter to register instead, or None to keep the one that is given."""
    if parameter is None or isinstance(parameter, nn.UninitializedParameter):
        return None
    if parameter.is_meta and parameter in _layer_of:
        return _shared(module, parameter)
    is_new = name == "weight" and isinstance(module, nn.Linear) and "weight" not in module._parameters
    if not is_new or not _building.is_empty:
        return None
    assert isinstance(module, nn.Linear)
    is_made_empty = _building.is_empty[-1] and not parameter.is_meta
    wait_for_conversion(module, parameter.device if is_made_empty else None)
    if not is_made_empty:
        return None
    empty = like_parameter(parameter, torch.empty_like(parameter, device="meta"))
    _layer_of[empty] = weakref.ref(module)
    return empty


def _shared(module: nn.Module, parameter: nn.Parameter) -> nn.Parameter | None:
    """Give memory to the weight of an empty layer that another module shares: it is not quantized."""
    layer = _layer_of[parameter]()
    if layer is None or layer is module:
        return None
    del _layer_of[parameter]
    real = like_parameter(parameter, torch.empty_like(parameter, device=layer.waiting.created_on))
    layer._parameters["weight"] = real
    return real


def _require_filled(optimizer: Any, *_: Any) -> None:
    """Check that an optimizer, before its step, does not hold the empty weight of a layer that has another one now.

    Raises:
        QuantizationError: it does, and the weight is to be trained.
    """
    empty = [p for group in optimizer.param_groups for p in group["params"] if p.is_meta and p in _layer_of]
    layers = [layer for layer in (_layer_of[p]() for p in empty) if layer is not None]
    untrained = [repr(layer) for layer in layers if layer.weight.requires_grad]
    if untrained:
        raise QuantizationError(
            f"{listed(untrained)}: built empty, and the optimizer was made before the weight had memory, so that it "
            "would not train it: make the optimizer after fabric.setup(model), and call "
            "fabric.setup_optimizers(optimizer)"
        )
