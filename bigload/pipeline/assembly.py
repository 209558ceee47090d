"""Puts loaded weights into the model in one step: all of them or, on any failure, none."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..hardware.interrupts import check_interrupt, interruptible
from ..model.empty import like_parameter
from ..model.quantizable_experts import weights_of
from ..model.tensors import ModelTensor
from ..model.view import ModelView
from ..planning.plan import Plan
from ..planning.planned_tensors import PlannedTensor
from ..quantization.experts import experts_parameter, quantized_attributes
from ..quantization.layers import make_layer
from ..quantization.quantized_weight import QuantizedWeight
from ..quantization.saved_experts import saving_attributes
from . import attributes
from .after_load import finished
from .attributes import ABSENT, Edit
from .exchange import HeldElsewhere
from .execute import LoadedTensor
from .guards import guard
from .refusals import refuse_adapters_of_parameters


class Assembly:
    """The new layers and tensors of a model: made while the weights load, then put into the model in one step."""

    def __init__(self, view: ModelView, plan: Plan) -> None:
        """Prepare for a plan's weights. The model is not changed before `commit`."""
        self._view, self._plan = view, plan
        self._weights = {f"{path}.weight".lstrip("."): (path, layer) for path, layer in plan.layers.items()}
        self._planned = {planned.tensor.name: planned for planned in plan.tensors}
        self._loaded: dict[str, LoadedTensor] = {}
        self._new_layers: dict[nn.Module, nn.Module] = {}
        self._of_experts = weights_of(plan.experts)

    def prepare(self) -> None:
        """Do what `commit` would else do first, and what can be done while weights are read: look around in the model.

        Raises:
            ConfigError: something beside its layer holds a weight that is to be quantized.
        """
        _ = self._held_elsewhere
        if self._view.model not in self._plan.layers.values():  # else the attributes are another module's
            _ = self._attributes

    @cached_property
    def _held_elsewhere(self) -> HeldElsewhere:
        return HeldElsewhere(self._view, self._plan)

    @cached_property
    def _attributes(self) -> list[Edit]:
        return attributes.attributes(self._view, self._plan)

    def add(self, name: str, value: LoadedTensor) -> None:
        """Add a loaded tensor by its first name; if it is the weight of a quantized layer, that layer is made."""
        self._loaded[name] = value
        planned = self._planned[name]
        path, layer = next((self._weights[n] for n in planned.tensor.names if n in self._weights), ("", None))
        if layer is not None:
            shape, config = planned.whole_shape, self._plan.config
            self._new_layers[layer] = make_layer(layer, value, shape, config, planned.device, path)

    def commit(self, then: Callable[[nn.Module], object] = lambda model: None) -> nn.Module:
        """Put the weights and the quantized layers into the model.

        The model changes only when everything is ready, and is restored if that is interrupted.

        Args:
            then: called with the complete model; if it fails, the model is restored too.

        Returns:
            The model, or the layer that replaces it if the model itself is the one layer to quantize.
        """
        view, new_layers = self._view, self._new_layers
        edits: list[Edit] = []
        tensors: dict[int, torch.Tensor | None] = {}
        for planned in self._plan.tensors:
            check_interrupt()
            value = self._value(planned)
            for name in planned.tensor.names:
                path, _, leaf = name.rpartition(".")
                owner = view.modules[path]
                slots: Any = owner._parameters if planned.tensor.is_parameter else owner._buffers
                if owner not in new_layers:
                    edits.append((slots, leaf, value))
                    tensors[id(slots[leaf])] = value
                elif leaf == "bias":
                    bias = self._bias(planned.tensor, value)
                    new_layers[owner]._parameters["bias"] = tensors[id(slots[leaf])] = bias
        self._refuse_what_others_do_wrong()
        edits += self._edits_of_experts()
        for module in interruptible(view.first_paths if new_layers else ()):
            edits += [
                (module._modules, key, new_layers[child]) for key, child in _children(module) if child in new_layers
            ]
            edits += without_fast_path(module, new_layers)
        edits += self._held_elsewhere.edits(new_layers, tensors)
        root = new_layers.get(view.model, view.model)
        after = view if root is view.model else ModelView(root)
        edits += self._attributes if after is view else attributes.attributes(after, self._plan)

        def finish() -> None:
            with finished(after, self._plan.after):
                then(root)

        apply_edits(edits, finish)
        return root

    def _value(self, planned: PlannedTensor) -> torch.Tensor | None:
        """Return the parameter or buffer to set; None for the weight of a quantized layer, which comes with it."""
        value, name = self._loaded.get(planned.tensor.name), planned.tensor.name
        if name in self._of_experts and isinstance(value, QuantizedWeight):
            return experts_parameter(value, self._plan.config)
        made = _value(planned.tensor, planned.device, value)
        if name in self._biases_of_experts and made is not None and len(planned.tensor.names) == 1:
            return nn.Parameter(made.data, requires_grad=False)  # as the biases of quantized layers
        return made

    @cached_property
    def _biases_of_experts(self) -> set[str]:
        experts = self._plan.experts
        return {f"{path}.{name}".lstrip(".") for path, held in experts.items() for name in held.biases}

    def _refuse_what_others_do_wrong(self) -> None:
        if self._plan.experts:
            refuse_adapters_of_parameters()
        guard(self._new_layers.values(), are_trained=self._plan.config.llm_int8_has_fp16_weight)

    def _edits_of_experts(self) -> list[Edit]:
        edits: list[Edit] = []
        for path, experts in self._plan.experts.items():
            module, computed = self._view.modules[path], self._plan.config.bnb_4bit_compute_dtype
            assert isinstance(computed, torch.dtype)  # "auto" is resolved
            own = quantized_attributes(module, experts, computed, path) | saving_attributes(module)
            edits += [(module.__dict__, name, value) for name, value in own.items()]
        return edits

    def _bias(self, tensor: ModelTensor, value: Any) -> nn.Parameter:
        """Freeze a layer's bias like its weight, as accelerate does, unless other modules share it."""
        if self._plan.config.llm_int8_has_fp16_weight or len(tensor.names) > 1:
            return value  # type: ignore[no-any-return]
        return nn.Parameter(value.data, requires_grad=False)


def _value(tensor: ModelTensor, device: torch.device, value: LoadedTensor | None) -> torch.Tensor | None:
    """Return the parameter or buffer to set; None for a quantized weight, which comes with its layer."""
    if value is None:
        return tensor.value.to(device)
    if not isinstance(value, torch.Tensor):
        return None
    old = tensor.value
    if not tensor.is_parameter:
        return value
    unchanged = not old.is_meta and value.data_ptr() == old.data_ptr() and value.dtype == old.dtype
    return old if unchanged else like_parameter(old, value)  # type: ignore[arg-type]


def without_fast_path(module: nn.Module, layers: Collection[nn.Module]) -> list[Edit]:
    """Turn off the fast path of torch's own encoder layers, which reads the weights of their Linears directly.

    Args:
        module: any.
        layers: those that are quantized.
    """
    if not isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
        return []
    if not any(inner in layers for inner in module.modules()):
        return []
    if isinstance(module, nn.TransformerEncoder):
        return [(module.__dict__, "use_nested_tensor", False)]  # only the fast path takes nested tensors
    return [(module.__dict__, "activation_relu_or_gelu", 0)]  # as the layer has with any other activation


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(key, child) for key, child in module._modules.items() if child is not None]


def apply_edits(edits: list[Edit], then: Callable[[], object] = lambda: None) -> None:
    """Make all assignments and call `then`; if anything fails or is interrupted, undo all of them."""
    before: list[Edit] = []
    try:
        for slots, key, value in interruptible(edits):
            before.append((slots, key, _get(slots, key)))
            _set(slots, key, value)
        then()
    except BaseException:  # Ctrl-C too: half a model is worse than none
        for slots, key, value in reversed(before):
            _set(slots, key, value)
        raise


def _get(slots: Any, key: str) -> Any:
    try:
        return slots[key]  # a scripted module's parameters are no dict, and have no get()
    except KeyError:
        return ABSENT


def _set(slots: Any, key: str, value: Any) -> None:
    if value is ABSENT:
        slots.pop(key, None)
    else:
        slots[key] = value
