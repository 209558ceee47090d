"""`python -m benchmarks coverage`: how much of each class of transformers is quantized to 4 bit, and what is not.

Each class is built from its config's defaults, on meta, and planned: nothing is loaded.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import bigload
from bigload.model.tree import modules_by_path
from bigload.quantization.formats import FourBit

from .small_models import class_names

# Classes with a smaller share of the weights are not named.
_LEAST = 0.01


def coverage(names: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Plan classes of transformers in nf4.

    Args:
        names: of classes; those of its auto mappings, one for each type of model, where there are none.

    Yields:
        For each class, {"class", "weights", "share", "left"}: the number of its weights, the share of them that is
        quantized, and the classes of modules that hold the rest, each with its share and, if it is fused experts, why.
        Or {"class", "error"} for one that its config's defaults do not build.
    """
    for name in names or class_names("transformers"):
        try:
            cls: Any = getattr(importlib.import_module("transformers"), name)
            with bigload.init_empty_weights():
                model = cls(cls.config_class())
            yield {"class": name} | _covered(model)
        except Exception as error:  # of any class of the library
            yield {"class": name, "error": f"{type(error).__name__}: {error}".partition("\n")[0]}


def _covered(model: Any) -> dict[str, Any]:
    plan, modules = bigload.plan_device_map(model, "nf4", device_map="cpu"), modules_by_path(model)
    left: defaultdict[tuple[str, str], int] = defaultdict(int)
    quantized = 0
    for planned in plan.tensors:
        if not planned.tensor.is_parameter:
            continue
        count = planned.tensor.value.numel()
        if isinstance(planned.format, FourBit):
            quantized += count
            continue
        path = planned.tensor.name.rpartition(".")[0]
        left[type(modules[path]).__name__, plan.plain_experts.get(path, "")] += count
    total = quantized + sum(left.values())
    rows = [
        {"class": name, "share": round(count / total, 4)} | ({"why": why} if why else {})
        for (name, why), count in sorted(left.items(), key=lambda item: -item[1])
        if count >= _LEAST * total
    ]
    return {"weights": total, "share": round(quantized / total, 4) if total else 0.0, "left": rows}


def line(row: dict[str, Any]) -> str:
    """Return a row as a line of text."""
    if "error" in row:
        return f"{row['class']}: not built: {row['error']}"
    left = [
        f"{each['share']:.1%} {each['class']}" + (f" ({each['why']})" if "why" in each else "") for each in row["left"]
    ]
    return f"{row['class']}: {row['share']:.1%} of {row['weights']:,} in 4 bit; left: {', '.join(left) or 'nothing'}"
