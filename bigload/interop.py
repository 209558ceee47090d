"""The attributes that other libraries look for on a loaded model."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from . import hf
from .modules import plain_linears
from .placement import Plan

# One assignment: a dict of attributes, parameters or modules; the key; the new value.
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
    config = plan.config.to_transformers()
    # Named one by one, so that a reload leaves the same layers alone whatever its own defaults are.
    config.llm_int8_skip_modules = [path for path in plain_linears(model) if path not in plan.layers]
    bits = 4 if plan.config.load_in_4bit else 8
    room = importlib.import_module(f"transformers.quantizers.quantizer_bnb_{bits}bit")
    quantizer = getattr(room, f"Bnb{bits}BitHfQuantizer")(config, pre_quantized=False)
    own = {"is_quantized": True, "quantization_method": config.quant_method, "hf_quantizer": quantizer}
    edits: list[Edit] = [(model.__dict__, name, value) for name, value in own.items()]
    edits.append((model.config.__dict__, "quantization_config", config))
    return edits + [(module.config.__dict__, "_is_quantized", True) for module in hf.pretrained_modules(model)]


def _as_in_maps(device: torch.device) -> int | str:
    mapped: Mapping[str, int | str] = {"cpu": "cpu"}
    return mapped.get(device.type, device.index)
