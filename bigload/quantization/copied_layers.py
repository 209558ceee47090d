"""Copies of quantized layers: each computes with its own weight, or is refused.

A layer's forward is an attribute of the instance and holds the layer. `copy.copy`, and DataParallel's replicas, would
have the forward of the layer that they were made of.
"""

from __future__ import annotations

import copy
import copyreg
import functools
from typing import Any, NoReturn

from torch import nn

from ..errors import QuantizationError


def register_copies(cls: type[nn.Module]) -> None:
    """Let `copy` and `pickle` bind the forward of a layer of this class to the copy."""
    copyreg.pickle(cls, _reduced)


def _reduced(layer: Any) -> Any:
    """Reduce a layer as `object.__reduce_ex__` does, without what holds the layer itself."""
    forward = vars(layer).get("forward")
    if not (isinstance(forward, functools.partial) and forward.args == (layer,)):
        return object.__reduce_ex__(layer, 4)
    state = layer.__getstate__()
    del state["forward"]
    if "state" in state:  # bitsandbytes writes to that of an int8 layer, as it computes
        state["state"] = copy.copy(state["state"])
    return _with_forward, (type(layer), forward.func), state


def _with_forward(cls: type[nn.Module], forward: Any) -> nn.Module:
    made = cls.__new__(cls)
    vars(made)["forward"] = functools.partial(forward, made)
    return made


def refuse_replicas(path: str) -> NoReturn:
    """Refuse `nn.DataParallel`, which would leave a layer's scales on the first GPU.

    Raises:
        QuantizationError: always.
    """
    raise QuantizationError(
        f"{path or 'the model'!r} is quantized, and torch.nn.DataParallel cannot copy it to other GPUs: load the model "
        "with device_map='balanced', which divides it among them"
    )
