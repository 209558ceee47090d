"""What the class of a model keeps in float32, by the rule of the library that the class comes from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import nn

from . import diffusers_facts, transformers_facts


def fp32_patterns(modules: Mapping[str, nn.Module]) -> list[str]:
    """Return patterns, as in a config, of the modules that are kept in float32 under a 16-bit dtype.

    Such a module is never quantized: it ruins T5's `wo`, and diffusers' own loader quantizes none either.

    Args:
        modules: all modules by path.
    """
    of_diffusers = diffusers_facts.fp32_names(modules)
    # Its quantizer finds a name at the end of a component too: "norm" leaves the Linears of `context_norm` as they are.
    return [
        *transformers_facts.fp32_patterns(modules.values(), torch.float16),
        *(f"*{name}" for name in of_diffusers),
    ]


def fp32_rule(modules: Mapping[str, nn.Module], torch_dtype: torch.dtype) -> Callable[[str], bool]:
    """Return what tells of a tensor's name whether it is loaded in float32 where a dtype is asked for.

    Args:
        modules: all modules by path.
        torch_dtype: the dtype that the model is loaded in.
    """
    patterns = transformers_facts.fp32_patterns(modules.values(), torch_dtype)
    # transformers searches for them anywhere in a name: "gate.weight" is found in "shared_expert_gate.weight".
    found = re.compile("|".join(pattern.replace("*", ".*") for pattern in patterns) if patterns else "(?!)").search
    names = set(diffusers_facts.fp32_names(modules))
    if not names:
        return lambda name: found(name) is not None
    return lambda name: found(name) is not None or not names.isdisjoint(name.split("."))
