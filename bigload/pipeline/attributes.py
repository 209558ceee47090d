"""The attributes that accelerate, transformers, diffusers, PEFT and Trainer look for on a loaded model."""

from __future__ import annotations

import copy
import functools
import importlib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..checkpoint.scaled.tensor import ScaledTensor
from ..model import diffusers_facts, transformers_facts
from ..model.quantizable import plain_linears
from ..model.view import ModelView
from ..planning.plan import Plan
from .refusals import refuse_save

# One assignment: a module's dict of attributes, parameters, buffers or modules, or what acts as one; the key; the new
# value, or ABSENT to delete the key.
Edit = tuple[Any, str, Any]
ABSENT = object()


def attributes(view: ModelView, plan: Plan) -> list[Edit]:
    """Return the assignments that accelerate makes on a loaded model, and those of the model's own library's loader.

    PEFT and Trainer read accelerate's attributes on any model. Those of transformers must be complete: Trainer refuses
    a model that has only `is_quantized`, and `save_pretrained` writes the quantization_config for `from_pretrained`.
    """
    model, config, quantized = view.model, plan.config, bool(plan.layers or plan.experts)
    own = {
        "is_loaded_in_4bit": config.load_in_4bit and quantized,
        "is_loaded_in_8bit": config.load_in_8bit and quantized,
        "hf_device_map": {path: _as_in_maps(device) for path, device in plan.execution_map.items()},
    }
    edits: list[Edit] = [(model.__dict__, name, value) for name, value in own.items()]
    if quantized and transformers_facts.is_pretrained(model):
        edits += _of_transformers(view, plan)
    elif quantized and diffusers_facts.is_diffusers(model):
        edits += _of_diffusers(view, plan)
    elif transformers_facts.is_pretrained(model) and _is_transcoded(plan):
        edits += _with_configs(view, _configs_without_quantization(view))
    return edits


def _is_transcoded(plan: Plan) -> bool:
    """Whether the weights were stored in fp8 or the like, as the model's config still says."""
    return any(isinstance(source.tensor, ScaledTensor) for planned in plan.tensors for source in planned.sources)


def _of_transformers(view: ModelView, plan: Plan) -> list[Edit]:
    model: Any = view.model
    quantization = plan.config.to_transformers()
    quantization.llm_int8_skip_modules = skip_list(plain_linears(view), plan.layers)
    bits = 4 if plan.config.load_in_4bit else 8
    module = importlib.import_module(f"transformers.quantizers.quantizer_bnb_{bits}bit")
    made = getattr(module, f"Bnb{bits}BitHfQuantizer")
    if plan.config.llm_int8_has_fp16_weight:
        made = _training(made)
    quantizer = made(quantization, pre_quantized=False)
    if plan.experts:
        quantizer.is_serializable = functools.partial(refuse_save, next(iter(plan.experts)))
    own = {"is_quantized": True, "quantization_method": quantization.quant_method, "hf_quantizer": quantizer}
    copies = _copied_configs(view, is_quantized=True)
    copies[id(model.config)].quantization_config = quantization
    return [(model.__dict__, name, value) for name, value in own.items()] + _with_configs(view, copies)


@functools.cache
def _training(quantizer: type) -> type:
    """Return a class of quantizers that tells Trainer to train the weights themselves, which it refuses otherwise."""
    own = {"__module__": quantizer.__module__, "is_qat_trainable": True, "__reduce__": _reduced}
    return type(quantizer.__name__, (quantizer,), own)


def _reduced(quantizer: Any) -> Any:
    return _revived, (type(quantizer).__base__, vars(quantizer))


def _revived(quantizer: type, attributes: dict[str, Any]) -> Any:
    made: Any = object.__new__(_training(quantizer))
    vars(made).update(attributes)
    return made


def _of_diffusers(view: ModelView, plan: Plan) -> list[Edit]:
    quantization = plan.config.to_diffusers()
    quantization.llm_int8_skip_modules = diffusers_facts.skip_list(view.modules, plan.layers.values())
    own = diffusers_facts.attributes_of_quantized(view.model, quantization, plan.config.load_dtype)
    return [(view.model.__dict__, name, value) for name, value in own.items()]


def clear_attributes(model: nn.Module) -> list[Edit]:
    """Return the assignments that undo those of `attributes`, for a model that is no longer quantized."""
    own: dict[str, Any] = {"is_loaded_in_4bit": False, "is_loaded_in_8bit": False}
    own |= dict.fromkeys(("is_quantized", "quantization_method", "hf_quantizer"), ABSENT)
    view = ModelView(model)
    marked = dict.fromkeys([model, *view.pretrained])
    edits = [(vars(module), name, value) for module in marked for name, value in own.items() if name in vars(module)]
    copies = _configs_without_quantization(view)
    if diffusers_facts.is_diffusers(model):
        edits += [(vars(model), name, ABSENT) for name in diffusers_facts.SERIALIZABLE if name in vars(model)]
        edits.append((vars(model), "_internal_dict", diffusers_facts.config_without_quantization(model)))
    return edits + _with_configs(view, copies)


def _configs_without_quantization(view: ModelView) -> dict[int, Any]:
    """Copy the configs in a model, as those of one that is not quantized."""
    copies = _copied_configs(view, is_quantized=False)
    for config in copies.values():
        if hasattr(config, "model_type"):
            vars(config).pop("quantization_config", None)
    return copies


def _copied_configs(view: ModelView, *, is_quantized: bool) -> dict[int, Any]:
    """Copy the configs in a model, since other models may share them. Returns id of each original -> the copy."""
    copies: dict[int, Any] = {}
    for module in view.pretrained:
        copy.deepcopy(module.config, copies)._is_quantized = is_quantized
    return copies


def _with_configs(view: ModelView, copies: Mapping[int, Any]) -> list[Edit]:
    return [
        (module.__dict__, name, copies[id(value)])
        for module in view.first_paths
        for name, value in module.__dict__.items()
        if id(value) in copies and hasattr(value, "model_type")
    ]


def skip_list(linears: Iterable[str], quantized: Collection[str]) -> list[str]:
    """List all layers that are not quantized, so that transformers skips the same ones when it loads the model.

    transformers matches an entry as a regular expression at the start of a path, or as the end of a path. An entry that
    would match a quantized layer too is anchored at both ends.

    Args:
        linears: paths of the layers that could be quantized.
        quantized: paths of those that are.
    """
    return [
        f"^{re.escape(name)}$" if any(re.match(name, path) or path.endswith(name) for path in quantized) else name
        for name in linears
        if name not in quantized
    ]


def _as_in_maps(device: torch.device) -> int | torch.device:
    # The string "cpu" means offloaded: PEFT would dispatch such a model again, and save_pretrained warns about it.
    return device if device.type == "cpu" else device.index
