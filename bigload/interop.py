"""The attributes that other libraries look for on a loaded model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .config import BnbQuantizationConfig


def attributes(
    config: BnbQuantizationConfig, device_map: Mapping[str, torch.device], *, quantized: bool
) -> dict[str, Any]:
    """Give what accelerate sets on a loaded model, which PEFT and Trainer read.

    Args:
        config: how the model was quantized.
        device_map: block path -> the device that computes it.
        quantized: whether any layer was; the flags say what is, not what was asked for.
    """
    return {
        "is_loaded_in_4bit": config.load_in_4bit and quantized,
        "is_loaded_in_8bit": config.load_in_8bit and quantized,
        "hf_device_map": {path: _as_in_maps(device) for path, device in device_map.items()},
    }


def _as_in_maps(device: torch.device) -> int | str:
    return "cpu" if device.type == "cpu" else device.index
