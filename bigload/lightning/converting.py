"""Quantizes the Linear layers of a model in place, all of them or, on any failure, none."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..config import BnbQuantizationConfig
from ..errors import CheckpointError, ConfigError, QuantizationError, listed
from ..hardware.devices import on_cpu_unless_named
from ..model.empty import like_parameter
from ..model.fp32_modules import fp32_rule
from ..model.quantizable import layers_to_quantize, plain_because_read
from ..model.quantizable_experts import ChosenExperts
from ..model.tensors import ModelTensor, tensors_of
from ..model.tree import first_paths
from ..model.view import ModelView
from ..pipeline.assembly import apply_edits, without_fast_path
from ..planning.leftover import warn_of_leftover
from ..quantization.layers import is_quantized, quantized_layers
from ..quantization.saved_experts import quantized_experts
from .in_place import Waiting, become, load_stored, quantized, stay_plain, unfilled, wait_for_values

logger = logging.getLogger(__name__)

_ADVICE = (
    "This plugin quantizes nn.Linear and subclasses that compute the same; load_and_quantize_model quantizes more; "
    "name modules to leave in ignore_modules"
)


def has_quantized(model: nn.Module) -> bool:
    """Whether a model is quantized, in whole or in part, or was loaded by bigload."""
    if quantized_layers(model) or quantized_experts(model):
        return True
    waiting = [vars(module).get("waiting") for module in model.modules()]
    if any(each is not None and each.config is not None for each in waiting):
        return True
    loaded = any("load_report" in vars(module) for module in model.modules())
    if loaded:
        logger.warning("the model was loaded by bigload without quantizing any layer, and is left as it is")
    return loaded


def loaded_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the dtype that a model with layers quantized by bigload was loaded in; None for any other."""
    dtypes = [vars(layer).get("loaded_dtype") for layer in quantized_layers(model).values()]
    return next((dtype for dtype in dtypes if dtype is not None), None)


def require_linears(model: nn.Module) -> None:
    """Check that a model can be quantized.

    Raises:
        ConfigError: it has no Linear layers.
        QuantizationError: it has PEFT's adapters, whose layers are Linear too.
    """
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        raise ConfigError(
            f"{type(model).__name__} has no Linear layers, so there is nothing to quantize: set it up with a Fabric "
            "or Trainer without this plugin"
        )
    adapted = [path for module, path in first_paths(model).items() if type(module).__module__.startswith("peft.")]
    if adapted:
        raise QuantizationError(
            f"{listed(adapted)}: of PEFT, whose adapters would be quantized too: call the plugin's "
            "convert_module(model) first, then get_peft_model"
        )


@on_cpu_unless_named()
def convert(
    model: nn.Module, config: BnbQuantizationConfig, ignored: Collection[str], device: torch.device | None
) -> None:
    """Quantize a model's Linear layers in place, and cast the rest.

    Args:
        model: with plain layers only. Unchanged if this fails.
        config: how to quantize; resolved.
        ignored: paths of modules whose layers are not quantized.
        device: where the model will be; None for where each layer is.

    Raises:
        QuantizationError: a weight has values that the format cannot represent.
        CheckpointError: it was given a state_dict that is quantized in another way.
    """
    view = ModelView(model)
    tensors = tensors_of(view)
    layers = _chosen(view, tensors, config, ignored)
    made = {layer: _made(layer, path, config, device) for path, layer in layers.items()}
    _require_no_stored(view, layers)
    for path, layer in layers.items():
        new, known = made[layer], vars(layer).get("waiting")
        if new is None:
            wait_for_values(layer, path, config)
        else:
            become(layer, new)
            if known is not None:
                known.forget_stored(layer)
    _settle_the_rest(view, tensors, config, layers)
    marked = dict.fromkeys([model, *view.pretrained])
    edits = [edit for module in view.first_paths for edit in without_fast_path(module, made)]
    edits += [(vars(module), "is_loaded_in_4bit", config.load_in_4bit) for module in marked]
    edits += [(vars(module), "is_loaded_in_8bit", config.load_in_8bit) for module in marked]
    apply_edits(edits)


def _chosen(
    view: ModelView, tensors: Sequence[ModelTensor], config: BnbQuantizationConfig, ignored: Collection[str]
) -> dict[str, Any]:
    read = plain_because_read(view, config)
    layers = layers_to_quantize(view, config, tensors, read=set(read))
    skipped = {module for path, module in view.modules.items() if _is_ignored(path, ignored)}
    layers = {path: layer for path, layer in layers.items() if layer not in skipped and isinstance(layer, nn.Linear)}
    warn_of_leftover(view, replace(config, skip_modules=[*ignored]), tensors, layers, read, ChosenExperts(), _ADVICE)
    return layers


def _is_ignored(path: str, ignored: Collection[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in ignored)


def _made(layer: Any, path: str, config: BnbQuantizationConfig, device: torch.device | None) -> nn.Module | None:
    """Make what a layer becomes; None for one that waits for its values, and for the device where they will be."""
    known: Waiting = vars(layer).get("waiting") or Waiting()
    if known.stored is not None:
        target = device or known.created_on or known.stored["weight"].device
        made = unfilled(layer, path, config, target)
        load_stored(made, known.stored, path)
        return made
    if not layer.weight.is_meta:
        return quantized(layer, path, config, device or known.created_on or layer.weight.device)
    planned = device or known.created_on
    return None if planned is None else unfilled(layer, path, config, planned)


def _require_no_stored(view: ModelView, layers: Mapping[str, Any]) -> None:
    plain = [(path, vars(module).get("waiting")) for module, path in view.first_paths.items() if path not in layers]
    stored = [path for path, known in plain if known is not None and known.stored is not None]
    if stored:
        raise CheckpointError(
            f"{listed(stored)}: the state_dict that was loaded holds these layers quantized, but they stay plain: use "
            "the ignore_modules that it was saved with"
        )


def _settle_the_rest(
    view: ModelView, tensors: Sequence[ModelTensor], config: BnbQuantizationConfig, layers: Mapping[str, Any]
) -> None:
    """Cast what is not quantized, as Lightning's "bf16-true" does, and give memory to empty layers that stay plain."""
    stays_fp32 = fp32_rule(view.modules, config.load_dtype)
    of_layers = {f"{path}.{name}".lstrip(".") for path in layers for name in ("weight", "bias")}
    for tensor in tensors:
        value, known = tensor.value, vars(view.owner(tensor.name)).get("waiting")
        if not of_layers.isdisjoint(tensor.names) or not value.is_floating_point() or not tensor.persistent:
            continue
        dtype = value.dtype if stays_fp32(tensor.name) else config.load_dtype
        if value.is_meta and known is not None and known.created_on is not None:
            real = like_parameter(value, torch.empty_like(value, dtype=dtype, device=known.created_on))  # type: ignore[arg-type]
            for name in tensor.names:
                view.owner(name)._parameters[name.rpartition(".")[2]] = real
        else:  # the same object, which an optimizer may hold; but not the memory of a caller's state_dict
            value.data = value.data.to(dtype, copy=known is not None and known.is_assigned)
    converted = set(layers.values())
    for module in view.first_paths:
        if isinstance(module, nn.Linear) and not is_quantized(module) and module not in converted:
            stay_plain(module)
