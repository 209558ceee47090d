"""bigload: load PyTorch models larger than your GPU, quantized by bitsandbytes as the weights stream in."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import BnbQuantizationConfig
    from .conversion import quantize_checkpoint
    from .decoding.capture import capture_decode
    from .distributed.stages import load_pipeline_stage
    from .errors import (
        BigloadError,
        CheckpointError,
        ConfigError,
        DistributedError,
        MissingDependencyError,
        OffloadError,
        PlacementError,
        QuantizationError,
    )
    from .loading import load_and_quantize_model, release_buffers
    from .model.empty import init_empty_weights
    from .pipeline.dequantizing import dequantize_model
    from .planning.offload_config import OffloadConfig
    from .planning.planner import plan_device_map
    from .saving import save_quantized_model

__version__ = "0.1.0"

# Imported when first asked for: `bigload --version` needs no torch, which takes seconds.
_HOMES = {
    "load_and_quantize_model": "loading",
    "BnbQuantizationConfig": "config",
    "OffloadConfig": "planning.offload_config",
    "plan_device_map": "planning.planner",
    "save_quantized_model": "saving",
    "quantize_checkpoint": "conversion",
    "dequantize_model": "pipeline.dequantizing",
    "init_empty_weights": "model.empty",
    "release_buffers": "loading",
    "capture_decode": "decoding.capture",
    "load_pipeline_stage": "distributed.stages",
    "BigloadError": "errors",
    "ConfigError": "errors",
    "CheckpointError": "errors",
    "PlacementError": "errors",
    "QuantizationError": "errors",
    "OffloadError": "errors",
    "DistributedError": "errors",
    "MissingDependencyError": "errors",
}

__all__ = [
    "load_and_quantize_model",
    "BnbQuantizationConfig",
    "OffloadConfig",
    "plan_device_map",
    "save_quantized_model",
    "quantize_checkpoint",
    "dequantize_model",
    "init_empty_weights",
    "release_buffers",
    "capture_decode",
    "load_pipeline_stage",
    "BigloadError",
    "ConfigError",
    "CheckpointError",
    "PlacementError",
    "QuantizationError",
    "OffloadError",
    "DistributedError",
    "MissingDependencyError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
