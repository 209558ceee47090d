"""torch's optimizers on the main weights of int8 training, refused where float16 rounds their eps to zero."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..errors import QuantizationError
from ..model.empty import once

# Optimizer -> the number of its groups when it was looked at: fine-tuning may add others later.
_checked: WeakKeyDictionary[torch.optim.Optimizer, int] = WeakKeyDictionary()


@once
def refuse_optimizers_that_divide_by_zero() -> None:
    """From now on, look at each optimizer before its first step, and at groups that are added later; called once.

    torch's Adam, RMSprop and Adagrad keep and compute their moments in the dtype of a parameter. The main weights are
    float16, in which a squared gradient and an eps of 1e-8 are zero: the first step would make NaN of the weights, and
    a fused one sends them far off.
    """
    register_optimizer_step_pre_hook(_look_at)


def _look_at(optimizer: Any, *_: Any) -> None:
    if _checked.get(optimizer) == len(optimizer.param_groups):
        return
    is_of_torch = any(
        cls.__module__.startswith("torch.optim.") and cls is not torch.optim.Optimizer
        for cls in type(optimizer).__mro__
    )
    for group in optimizer.param_groups if is_of_torch else ():
        eps = group.get("eps")
        rounds_to_zero = isinstance(eps, float) and eps != 0 and not torch.tensor(eps, dtype=torch.float16)
        if rounds_to_zero and any(map(_is_main_weight, group["params"])):
            raise QuantizationError(
                f"{type(optimizer).__name__} would compute with the main weights of int8 training in float16, in which "
                f"its eps={eps} is 0: use an optimizer of bitsandbytes, as bitsandbytes.optim.AdamW8bit (in Trainer "
                "optim='adamw_8bit'), which computes in float32, or set eps=1e-4"
            )
    _checked[optimizer] = len(optimizer.param_groups)


def _is_main_weight(parameter: Any) -> bool:
    return bool(getattr(parameter, "has_fp16_weights", False)) and parameter.dtype == torch.float16
