"""bigload: load PyTorch models larger than your GPU, quantized by bitsandbytes as the weights stream in."""

from .config import BnbQuantizationConfig, OffloadConfig
from .conversion import quantize_checkpoint
from .dequantizing import dequantize_model
from .errors import (
    BigloadError,
    CheckpointError,
    ConfigError,
    MissingDependencyError,
    OffloadError,
    PlacementError,
    QuantizationError,
)
from .io.ring import release_buffers
from .loading import load_and_quantize_model
from .model.empty import init_empty_weights
from .planning.planner import plan_device_map
from .saving import save_quantized_model

__version__ = "0.1.0"

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
    "BigloadError",
    "ConfigError",
    "CheckpointError",
    "PlacementError",
    "QuantizationError",
    "OffloadError",
    "MissingDependencyError",
]
