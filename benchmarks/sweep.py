"""`python -m benchmarks sweep`: small models of many classes, quantized as they load, against the same dequantized.

For each class and mode a model with random weights is saved by its own library and loaded from its files twice. One is
dequantized by `bigload.dequantize_model`; both run on the same input on the CPU, in float32. The result says how far
the outputs are apart, and which Linears were left plain.
"""

from __future__ import annotations

import importlib
import json
import logging
import multiprocessing
import random
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bigload
from bigload.quantization import bnb
from bigload.quantization.layers import quantized_layers

from .small_models import Build, NotBuiltError, builder, class_names, inputs_of

# The largest relative error of all outputs together. In training, a 4-bit layer multiplies by just the dequantized
# weight: only the order of sums is left (EXACT, "error_in_training"). Otherwise bitsandbytes' kernel for CPUs with
# AVX512-BF16 rounds to bfloat16, 0.4% of each factor. int8 rounds activations to 8 bits. Where that is too much,
# "rounding" is three times what bfloat16 does to the dequantized model: what it explains is "rounded".
TOLERANCE = {"nf4": 0.03, "int8": 0.05}
EXACT = 1e-4
MODES = tuple(TOLERANCE)
LIBRARIES = ("transformers", "diffusers")
_IMPORTED_ONCE = {
    "transformers": ("transformers.modeling_layers", "transformers.conversion_mapping"),
    "diffusers": ("diffusers.models.modeling_utils", "diffusers.models.attention_processor"),
}
_LEFT_NAMED = 4
_ROUTED = "rounded activations send tokens to other experts; up to the router the models agree"
# What is known of classes whose forwards differ in a mode.
EXPLAINED = {
    ("RwkvForCausalLM", "nf4"): "its own first forward quantizes two layers of each block again, as fp4",
    ("ExaoneMoeForCausalLM", "int8"): _ROUTED,
    ("SwitchTransformersForConditionalGeneration", "int8"): _ROUTED,
}


def sweep(libraries: Sequence[str], only: Sequence[str] = (), timeout_s: float = 120) -> Iterator[list[dict[str, Any]]]:
    """Sweep classes, each in a process of its own, which a crash or the timeout ends alone.

    Args:
        libraries: of LIBRARIES.
        only: names of classes; all where there are none.
        timeout_s: seconds for a class.

    Yields:
        The rows of one class: one for each mode, or one that says why it was not built.
    """
    bnb.library()  # what takes long to import is imported once, before processes are made
    for module in {module for library in libraries for module in _IMPORTED_ONCE[library]}:
        importlib.import_module(module)
    context = multiprocessing.get_context("fork")
    jobs = [(library, name) for library in libraries for name in only or class_names(library)]
    random.Random(0).shuffle(jobs)  # so that a run that is ended early has seen all kinds
    for library, name in jobs:
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(sender, library, name))
        begun = time.perf_counter()
        child.start()
        sender.close()
        rows = _received(receiver, timeout_s)
        child.kill()
        child.join()
        if not isinstance(rows, list):
            rows = [{"outcome": rows, "mode": None}]
        elapsed = round(time.perf_counter() - begun, 1)
        yield [{"library": library, "class": name, "seconds": elapsed} | row for row in rows]


def _received(receiver: Any, timeout_s: float) -> Any:
    if not receiver.poll(timeout_s):
        return "timeout"
    try:
        return receiver.recv()
    except EOFError:
        return "crash"


def _child(sender: Any, library: str, name: str) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        sender.send(sweep_class(library, name, Path(folder)))


def sweep_class(library: str, name: str, folder: Path) -> list[dict[str, Any]]:
    """Compare one class in every mode.

    Args:
        library: of LIBRARIES.
        name: the class in it.
        folder: an empty one, for the model's files.
    """
    try:
        build = builder(library, name)
        inputs = _saved(build, folder)
    except NotBuiltError as error:
        return [{"mode": None, "outcome": "not built", "why": _brief(error)}]
    rows = [{"mode": mode} | _compared(build, inputs, folder, mode) for mode in MODES]
    for row in rows:
        if row["outcome"] == "differs" and (name, row["mode"]) in EXPLAINED:
            row |= {"outcome": "explained", "why": EXPLAINED[name, row["mode"]]}
    return rows


def _saved(build: Build, folder: Path) -> dict[str, Any]:
    """Save a model of random weights that runs. Returns inputs that it runs with."""
    torch.manual_seed(0)
    try:
        model = build().eval()
        for parameter in model.parameters():  # some classes begin with zeros, of which every output is right
            parameter.data += torch.randn_like(parameter) * 0.02 if parameter.is_floating_point() else 0
        model.save_pretrained(folder)
    except Exception as error:
        raise NotBuiltError(f"{type(error).__name__}: {error}") from error
    why: Exception | None = None
    for inputs in inputs_of(model):
        try:
            if _outputs(model, inputs).numel():
                return inputs
        except Exception as error:
            why = error
    raise NotBuiltError(f"no inputs: {type(why).__name__}: {why}")


def _compared(build: Build, inputs: dict[str, Any], folder: Path, mode: str) -> dict[str, Any]:
    row: dict[str, Any] = {}
    try:
        model = _loaded(build, folder, mode)
        layers = quantized_layers(model)
        left = {path: type(m).__name__ for path, m in model.named_modules() if isinstance(m, nn.Linear)}
        left = {path: cls for path, cls in left.items() if path not in layers}
        row |= {"quantized": len(layers), "left": dict(Counter(left.values())), "left_names": list(left)[:_LEFT_NAMED]}
        if not layers:
            return row | {"outcome": "nothing to quantize"}
        plain = bigload.dequantize_model(_loaded(build, folder, mode))
        row["error"] = _error(model, plain, inputs)
        if mode == "nf4":
            for layer in layers.values():
                layer.train()
            row["error_in_training"] = _error(model, plain, inputs)
        if row["error"] > TOLERANCE[mode]:
            row["rounding"] = max(TOLERANCE[mode], 3 * _rounding(plain, inputs))
    except Exception as error:
        kind = "refused" if isinstance(error, bigload.BigloadError) else "error"
        return row | {"outcome": kind, "why": _brief(error)}
    return row | {"outcome": _outcome(row, mode)}


def _outcome(row: dict[str, Any], mode: str) -> str:
    if row.get("error_in_training", 0) <= EXACT and row["error"] <= row.get("rounding", TOLERANCE[mode]):
        return "equal" if row["error"] <= TOLERANCE[mode] else "rounded"
    return "differs"  # which a NaN is


def _rounding(plain: nn.Module, inputs: dict[str, Any]) -> float:
    """Return how far a plain model is from itself with products in bfloat16, as a choice of experts may turn over."""
    expected = _outputs(plain, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = _outputs(plain, inputs)
    return float((found - expected).norm() / expected.norm())


def _error(model: nn.Module, plain: nn.Module, inputs: dict[str, Any]) -> float:
    found, expected = (_outputs(each, inputs) for each in (model, plain))
    unlike = (found != expected) & ~(found.isnan() & expected.isnan())  # some give infinities and NaN
    norm = expected[expected.isfinite()].norm()
    return float((found - expected)[unlike].norm() / (norm or 1))


def _loaded(build: Build, folder: Path, mode: str) -> nn.Module:
    with bigload.init_empty_weights():
        model = build()
    computed = {"torch_dtype": "float32", "bnb_4bit_compute_dtype": "float32"}
    config = bigload.BnbQuantizationConfig.from_mode(mode, **computed)
    return bigload.load_and_quantize_model(model, config, folder, device_map="cpu", progress=False).eval()


def _outputs(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Run a model. Returns all floating-point values that it gives, in one row."""
    torch.manual_seed(0)  # some draw noise
    with torch.no_grad():
        found = list(_tensors(model(**inputs)))
    return torch.cat([tensor.float().reshape(-1) for tensor in found]) if found else torch.empty(0)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
    elif hasattr(value, "sample") and isinstance(value.sample, torch.Tensor):
        yield value.sample


def _brief(error: BaseException) -> str:
    text = str(error) if isinstance(error, NotBuiltError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:300]


def as_json(result: dict[str, Any]) -> str:
    """Return a result with each row on a line."""
    rows = ",\n".join(f"  {json.dumps(row)}" for row in result["rows"])
    head = json.dumps({name: value for name, value in result.items() if name != "rows"}, indent=1)
    return f'{head.removesuffix("}").rstrip()},\n "rows": [\n{rows}\n ]\n}}\n'


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of outcomes, what was not equal, and the classes of Linears left plain."""
    tried = [row for row in rows if row["mode"]]
    lines = [
        "| library | mode | classes | equal | others | quantized | left | worst |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for library, mode in dict.fromkeys((row["library"], row["mode"]) for row in tried):
        here = [row for row in tried if (row["library"], row["mode"]) == (library, mode)]
        outcomes = Counter(row["outcome"] for row in here)
        others = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items() if outcome != "equal") or "none"
        quantized = sum(row.get("quantized", 0) for row in here)
        left = sum(sum(row.get("left", {}).values()) for row in here)
        worst = max((row["error"] for row in here if row["outcome"] == "equal"), default=0)
        counts = f"{len(here)} | {outcomes['equal']} | {others} | {quantized} | {left}"
        lines.append(f"| {library} | {mode} | {counts} | {worst:.2%} |")
    unbuilt = Counter(row["outcome"] for row in rows if not row["mode"])
    lines += ["", "Not compared: " + (", ".join(f"{count} {why}" for why, count in unbuilt.items()) or "none")]
    left = Counter[str]()
    for row in tried:
        left.update(row.get("left", {}) if row["mode"] == MODES[0] else {})
    lines += ["", "Left plain, by class: " + ", ".join(f"{count} {kind}" for kind, count in left.most_common())]
    wrong = [row for row in tried if row["outcome"] not in ("equal", "nothing to quantize")]
    lines += [
        f"- {row['class']}, {row['mode']}: {row['outcome']}, {row.get('why') or row.get('error')}" for row in wrong
    ]
    return "\n".join(lines)
