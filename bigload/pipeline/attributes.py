"""The attributes that other libraries look for on a loaded model."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..model import transformers_facts
from ..model.quantizable import plain_linears
from ..model.view import ModelView
from ..planning.plan import Plan

# One assignment: a module's own dict of attributes, parameters, buffers or modules; the key; the new value, or that
# there is to be none.
Edit = tuple[dict[str, Any], str, Any]
ABSENT = object()


def attributes(view: ModelView, plan: Plan) -> list[Edit]:
    """Return what accelerate sets on a loaded model, and for a model of transformers what its own loader sets.

    The first is read by PEFT and Trainer on any model. The second come all or none: `is_quantized` alone makes
    Trainer refuse the model, and `save_pretrained` writes the quantization_config from which `from_pretrained` reloads.
    """
    model, config, quantized = view.model, plan.config, bool(plan.layers)
    own = {
        "is_loaded_in_4bit": config.load_in_4bit and quantized,
        "is_loaded_in_8bit": config.load_in_8bit and quantized,
        "hf_device_map": {path: _as_in_maps(device) for path, device in plan.execution_map.items()},
    }
    edits: list[Edit] = [(model.__dict__, name, value) for name, value in own.items()]
    if quantized and transformers_facts.is_pretrained(model):
        edits += _of_transformers(view, plan)
    return edits


def _of_transformers(view: ModelView, plan: Plan) -> list[Edit]:
    model: Any = view.model
    quantization = plan.config.to_transformers()
    quantization.llm_int8_skip_modules = skip_list(plain_linears(view), plan.layers)
    bits = 4 if plan.config.load_in_4bit else 8
    room = importlib.import_module(f"transformers.quantizers.quantizer_bnb_{bits}bit")
    quantizer = getattr(room, f"Bnb{bits}BitHfQuantizer")(quantization, pre_quantized=False)
    own = {"is_quantized": True, "quantization_method": quantization.quant_method, "hf_quantizer": quantizer}
    copies = _copied_configs(view, is_quantized=True)
    copies[id(model.config)].quantization_config = quantization
    return [(model.__dict__, name, value) for name, value in own.items()] + _with_configs(view, copies)


def clear_attributes(model: nn.Module) -> list[Edit]:
    """Take back what `attributes` gave, of a model that is quantized no more."""
    own: dict[str, Any] = {"is_loaded_in_4bit": False, "is_loaded_in_8bit": False}
    own |= dict.fromkeys(("is_quantized", "quantization_method", "hf_quantizer"), ABSENT)
    view = ModelView(model)
    marked = dict.fromkeys([model, *view.pretrained])
    edits = [(vars(module), name, value) for module in marked for name, value in own.items() if name in vars(module)]
    copies = _copied_configs(view, is_quantized=False)
    for config in copies.values():
        if hasattr(config, "model_type"):
            vars(config).pop("quantization_config", None)
    return edits + _with_configs(view, copies)


def _copied_configs(view: ModelView, *, is_quantized: bool) -> dict[int, Any]:
    """Copy the configs in a model: another may have been built from the same object. Gives the copies by that's id."""
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
    """Name the layers left alone one by one, so that transformers leaves the same ones alone when it reloads.

    It takes an entry as a regular expression from the start, or as an ending: one that would take a quantized layer too
    is anchored at both ends.

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
    # The string "cpu" would say offloaded: PEFT dispatches such a model anew, and save_pretrained warns of it.
    return device if device.type == "cpu" else device.index
