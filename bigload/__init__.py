"""bigload: load PyTorch models larger than your GPU, quantized by bitsandbytes as the weights stream in."""

from .config import BnbQuantizationConfig, OffloadConfig
from .dequantize import dequantize_model
from .empty import init_empty_weights
from .errors import (
    BigloadError,
    CheckpointError,
    ConfigError,
    MissingDependencyError,
    OffloadError,
    PlacementError,
    QuantizationError,
)
from .loading import load_and_quantize_model
from .offline import quantize_checkpoint
from .planning import plan_device_map
from .ring import release_buffers
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
