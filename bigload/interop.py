"""The attributes that other libraries look for on a loaded model."""

from __future__ import annotations

import copy
import importlib
import re
from typing import Any

import torch
from torch import nn

from . import hf
from .modules import plain_linears
from .placement import Plan

# One assignment: a module's own dict of attributes, parameters, buffers or modules; the key; the new value.
Edit = tuple[dict[str, Any], str, Any]


def attributes(model: nn.Module, plan: Plan) -> list[Edit]:
    """Give what accelerate sets on a loaded model, and for a model of transformers what its own loader sets.

    The first is read by PEFT and Trainer on any model. The second come all or none: `is_quantized` alone makes
    Trainer refuse the model, and `save_pretrained` writes the quantization_config from which `from_pretrained` reloads.
    """
    config, quantized = plan.config, bool(plan.layers)
    own = {
        "is_loaded_in_4bit": config.load_in_4bit and quantized,
        "is_loaded_in_8bit": config.load_in_8bit and quantized,
        "hf_device_map": {path: _as_in_maps(device) for path, device in plan.device_map.items()},
    }
    edits: list[Edit] = [(model.__dict__, name, value) for name, value in own.items()]
    if quantized and hf.is_pretrained(model):
        edits += _of_transformers(model, plan)
    return edits


def _of_transformers(model: Any, plan: Plan) -> list[Edit]:
    quantization = plan.config.to_transformers()
    quantization.llm_int8_skip_modules = _skip_list(model, plan)
    bits = 4 if plan.config.load_in_4bit else 8
    room = importlib.import_module(f"transformers.quantizers.quantizer_bnb_{bits}bit")
    quantizer = getattr(room, f"Bnb{bits}BitHfQuantizer")(quantization, pre_quantized=False)
    own = {"is_quantized": True, "quantization_method": quantization.quant_method, "hf_quantizer": quantizer}
    # Copies of the configs: another model may have been built from the same object.
    copies: dict[int, Any] = {}
    for module in hf.pretrained_modules(model):
        copy.deepcopy(module.config, copies)._is_quantized = True
    copies[id(model.config)].quantization_config = quantization
    edits: list[Edit] = [(model.__dict__, name, value) for name, value in own.items()]
    for module in model.modules():
        for name, value in module.__dict__.items():
            if id(value) in copies and hasattr(value, "model_type"):
                edits.append((module.__dict__, name, copies[id(value)]))
    return edits


def _skip_list(model: nn.Module, plan: Plan) -> list[str]:
    """Name the layers left alone one by one, so that transformers leaves the same ones alone when it reloads.

    It takes an entry as a regular expression from the start, or as an ending: one that would take a quantized layer too
    is anchored at both ends.
    """
    names = [path for path in plain_linears(model) if path not in plan.layers]
    return [
        f"^{re.escape(name)}$" if any(re.match(name, path) or path.endswith(name) for path in plan.layers) else name
        for name in names
    ]


def _as_in_maps(device: torch.device) -> int | torch.device:
    # The string "cpu" would say offloaded: PEFT dispatches such a model anew, and save_pretrained warns of it.
    return device if device.type == "cpu" else device.index
