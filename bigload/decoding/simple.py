"""Classes of values that a step only reads."""

from __future__ import annotations

from enum import Enum

import torch

SIMPLE = (int, float, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size, Enum)
