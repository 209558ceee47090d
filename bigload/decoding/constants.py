"""Constants of Python in a captured step: `torch.tensor` copies them from host memory, for which the host waits."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# More numbers than any constant of a step has; others are left to torch, which says that it cannot capture them.
_MAX_NUMBERS = 64


# Modules whose code takes another way where such a mode is on.
_ASKING = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


def constants_in_graph(model: nn.Module, device: torch.device) -> AbstractContextManager[Any]:
    """Return what lets a step of a model be captured with its constants, where that changes nothing else of it."""
    return nullcontext() if asks_for_modes(model) else ConstantsInGraph(device)


def asks_for_modes(model: nn.Module) -> bool:
    """Whether a module of a model computes in another way where a mode of torch's functions is on."""
    return any(isinstance(module, _ASKING) for module in model.modules())


class ConstantsInGraph(TorchFunctionMode):
    """Has `torch.tensor` fill constants on the device, with the same values."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of torch, or fill a constant."""
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func is torch.tensor and device is not None and torch.device(device).type == self._device.type:
            numbers = args[0] if args else kwargs.get("data")
            if not _has_tensor(numbers):
                return _filled(torch.asarray(numbers, dtype=kwargs.get("dtype"), device="cpu"), device)
        return func(*args, **kwargs)


def _has_tensor(numbers: Any) -> bool:
    if isinstance(numbers, (list, tuple)):
        return any(map(_has_tensor, numbers))
    return not isinstance(numbers, (int, float, complex, bool))


def _filled(values: torch.Tensor, device: Any) -> torch.Tensor:
    numbers = values.flatten().tolist()
    if len(numbers) > _MAX_NUMBERS:
        return values.to(device)
    if len(set(map(repr, numbers))) == 1:  # 0.0 and -0.0 are equal, but not the same
        return torch.full(values.shape, numbers[0], dtype=values.dtype, device=device)
    filled = [torch.full((), number, dtype=values.dtype, device=device) for number in numbers]
    return torch.stack(filled).view(values.shape) if filled else torch.empty_like(values, device=device)
