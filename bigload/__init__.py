"""bigload: load PyTorch models larger than your GPU, quantized by bitsandbytes as the weights stream in."""

from .config import BnbQuantizationConfig
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
from .ring import release_buffers

__version__ = "0.1.0"

__all__ = [
    "load_and_quantize_model",
    "BnbQuantizationConfig",
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
