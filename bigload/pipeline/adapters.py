"""PEFT's adapters of quantized layers, refused where they would compute with packed bytes as if these were values.

What PEFT supports on bitsandbytes' layers (its classes in modules named `bnb`, and those with a `quantization_backend`)
is right here. Of its other classes some only call the layer, which is right too; others read its weight, which is an
error of shapes in 4 bit, and noise in int8, without a word. None of these can merge.
"""

from __future__ import annotations

import functools
import sys
import weakref
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode

from ..errors import QuantizationError
from ..model.empty import once
from ..quantization.layers import is_quantized, quantized_layers

# DEFT begins with values that it computes from the weight; UniLoRA casts its scales to the weight's dtype, to zeros.
_BEGIN_WRONG = ("peft.tuners.deft.", "peft.tuners.unilora.")
# Their merges into bitsandbytes' layers are wrong in PEFT 0.21: those of int8 are lost, those of 4 bit are an error.
_MERGES_WRONG = ("peft.tuners.randlora.",)

# The weight of each layer that is being adapted, and where its bytes were before. A weight may hold its layer.
_weights: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[torch.Tensor], int]] = weakref.WeakKeyDictionary()


@once
def refuse_adapters_of_packed_weights() -> None:
    """From now on, look at the adapters that PEFT puts around layers of bitsandbytes; called once."""
    register_module_module_registration_hook(_look_at)


def _look_at(module: Any, name: str, child: Any) -> None:
    if "peft" not in sys.modules:
        return
    if name == "base_layer" and _is_of_peft(module) and _is_packed(child):
        _note_weight(child)
    elif name == "original_module" and any(kind.endswith(".ModulesToSaveWrapper") for kind in _kinds(module)):
        _refuse_trained_copy(child)
    elif _is_of_peft(child):
        layer = child
        while isinstance(layer, nn.Module) and "base_layer" in layer._modules:
            layer = layer._modules["base_layer"]
        if layer is not child and _is_packed(layer):
            _refuse_what_is_wrong(child, layer)
            if hasattr(child, "update_layer"):  # which adds another adapter, without another module
                vars(child)["update_layer"] = functools.partial(_update_layer, child)
        elif layer is not child and _is_made(layer):
            _refuse_merges(child, layer)  # PEFT would dequantize the main weights, which are no int8


def _kinds(module: Any) -> list[str]:
    """Return the names of a module's class and of those that it is derived from, where they are PEFT's."""
    classes = type(module).__mro__
    return [f"{cls.__module__}.{cls.__name__}" for cls in classes if cls.__module__.startswith("peft.")]


def _is_of_peft(module: Any) -> bool:
    return any(cls.__module__.startswith("peft.") for cls in type(module).__mro__)


def _note_weight(layer: Any) -> None:
    weight = layer._parameters["weight"]
    _weights[layer] = weakref.ref(weight), weight.data_ptr()


def _update_layer(adapter: Any, *given: Any, **named: Any) -> None:
    """Add another adapter to a packed layer that has one, and refuse what is wrong then too."""
    layer = adapter.get_base_layer()
    _note_weight(layer)
    type(adapter).update_layer(adapter, *given, **named)
    _refuse_what_is_wrong(adapter, layer)


def _is_made(layer: Any) -> bool:
    """Whether a module is a layer of bitsandbytes that bigload made."""
    return isinstance(layer, nn.Module) and "loaded_as" in vars(layer) and is_quantized(layer)


def _is_packed(layer: Any) -> bool:
    """The same, with a packed weight: not one of int8 training."""
    return _is_made(layer) and not getattr(layer._parameters["weight"], "has_fp16_weights", False)


def _refuse_trained_copy(module: nn.Module) -> None:
    for layer in quantized_layers(module).values():
        if _is_packed(layer):
            raise QuantizationError(
                f"{layer.loaded_as!r} is quantized, and PEFT's modules_to_save would train a copy of it: name it in "
                "target_modules, which adapts it, or in skip_modules (in Lightning's plugin ignore_modules), so that "
                "it stays plain"
            )


def _refuse_what_is_wrong(adapter: Any, layer: Any) -> None:
    """Refuse an adapter that is complete but for its parent; or only its merges.

    Raises:
        QuantizationError: it reads packed bytes, or has written over them.
    """
    path, kinds = layer.loaded_as, _kinds(adapter)
    known, place = _weights.pop(layer, (None, 0))
    weight = None if known is None else known()
    if weight is not None and weight is layer._parameters["weight"] and weight.data_ptr() != place:
        raise QuantizationError(
            f"{path!r} is quantized, and PEFT has written over its packed bytes as if they were values, as LoftQ does: "
            "load the model again, and leave init_lora_weights as it is, or set it to 'gaussian' or 'olora'"
        )
    is_supported = any(".bnb." in kind for kind in kinds) or getattr(adapter, "quantization_backend", None)
    begins_wrong = any(kind.startswith(_BEGIN_WRONG) for kind in kinds)
    if not is_supported and (begins_wrong or _reads_weight(adapter, layer)):
        raise QuantizationError(
            f"{path!r} is quantized, and PEFT's {_kind(adapter)} would compute with its packed bytes as if they were "
            f"values: use LoRA, or name {path!r} in skip_modules (in Lightning's plugin ignore_modules), so that it "
            "stays plain"
        )
    if not is_supported or any(kind.startswith(_MERGES_WRONG) for kind in kinds):
        _refuse_merges(adapter, layer)


def _kind(adapter: Any) -> str:
    return f"{type(adapter).__module__}.{type(adapter).__name__}"


def _refuse_merges(adapter: Any, layer: Any) -> None:
    vars(adapter)["merge"] = functools.partial(_refuse_merge, layer.loaded_as, _kind(adapter))


def _refuse_merge(path: str, kind: str, *_: Any, **__: Any) -> NoReturn:
    raise QuantizationError(
        f"{path!r} is quantized, and PEFT's {kind} cannot merge into its weight: keep the adapter beside it, or "
        "load the model unquantized to merge"
    )


# Class, and whether the layer is in 4 bit -> what was found.
_found: dict[tuple[type, bool], bool] = {}


def _reads_weight(adapter: Any, layer: Any) -> bool:
    """Whether the forward of an adapter reads the weight of its layer, found by running it once for each class.

    The layer itself gives zeros meanwhile: a streamed weight stays where it is.
    """
    key = type(adapter), not hasattr(layer, "state")
    if key not in _found:
        weight, own = layer._parameters["weight"], vars(layer)["forward"]
        x = torch.ones(1, layer.in_features, device=weight.device)
        reads, failed = _Reads(weight), False
        devices = [weight.device] if weight.device.type == "cuda" else []
        vars(layer)["forward"] = lambda x, *_, **__: x.new_zeros(*x.shape[:-1], layer.out_features)
        try:
            with torch.random.fork_rng(devices), torch.no_grad(), reads:
                adapter(x)
        except Exception:  # of any kind: of shapes, of dtypes, or because the adapter wants more than an input
            failed = True
        finally:
            vars(layer)["forward"] = own
        _found[key] = reads.values or (failed and reads.touched)
    return _found[key]


# Functions whose result is the same bytes, or no bytes.
_MOVES = frozenset({"__get__", "__set__", "to", "cpu", "cuda", "detach", "contiguous", "clone", "requires_grad_"})


class _Reads(TorchFunctionMode):
    """Notes whether code computes with a packed weight; what bitsandbytes does with it does not count.

    Attributes:
        values: it does.
        touched: it looks at the weight, if only at its shape or dtype.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self._dtype, self._storages = weight.dtype, {weight.untyped_storage()._cdata}
        self.values = self.touched = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if getattr(func, "namespace", "") != "bitsandbytes" and any(map(self._is_weight, args)):
            self.touched = True
            if getattr(func, "__name__", "") not in _MOVES:
                self.values = True
            elif isinstance(made, torch.Tensor):
                self.values |= made.dtype != self._dtype
                self._storages.add(made.untyped_storage()._cdata)
        return made

    def _is_weight(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.untyped_storage()._cdata in self._storages
