"""Copies of quantized layers: each computes with its own weight, or is refused.

A layer's forward is an attribute of the instance and holds the layer, as what saves and loads its state may be.
`copy.copy`, and DataParallel's replicas, would have those of the layer that they were made of.
"""

from __future__ import annotations

import copy
import copyreg
import functools
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from torch import nn

from ..errors import QuantizationError


def register_copies(cls: type[nn.Module]) -> None:
    """Let `copy` and `pickle` bind the forward of a layer of this class to the copy."""
    copyreg.pickle(cls, _reduced)


def _reduced(layer: Any) -> Any:
    """Reduce a layer as `object.__reduce_ex__` does, without what holds the layer itself."""
    own = {name: value.func for name, value in vars(layer).items() if is_bound_to(layer, value)}
    if "forward" not in own:
        return object.__reduce_ex__(layer, 4)
    state = {name: value for name, value in layer.__getstate__().items() if name not in own}
    if "state" in state:  # bitsandbytes writes to that of an int8 layer, as it computes
        state["state"] = copy.copy(state["state"])
    return _with_own, (type(layer), own, vars(layer).get("guards", ())), state


def is_bound_to(layer: Any, value: Any) -> bool:
    """Whether an attribute of a layer is a function that was given the layer itself."""
    return isinstance(value, functools.partial) and len(value.args) == 1 and value.args[0] is layer


def _with_own(cls: type[nn.Module], functions: dict[str, Any], guards: Iterable[Callable[[], None]] = ()) -> nn.Module:
    for install in guards:  # another process may not have them yet
        install()
    made = cls.__new__(cls)
    vars(made).update({name: functools.partial(function, made) for name, function in functions.items()})
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
