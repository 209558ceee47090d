"""Draws a case from a seed: a model, how its weights are stored, where they go, and what is done with it then."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from checkpoints import empty
from families import FAMILIES
from torch import nn

MODES = ("nf4", "nf4-dq", "fp4", "int8", "none")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SOURCES = ("safetensors", "sharded", "pickled", "own", "saved", "converted", "transformers")
# transformers reads no layer that is not nn.Linear itself, and makes Falcon and the fused experts otherwise.
_MADE_OTHERWISE = ("falcon", "mixtral", "qwen3_moe", "gpt_oss", "llama4")
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
ACTS = (
    "again",
    "state_dict",
    "save",
    "remove",
    "dequantize",
    "gradients",
    "lora",
    "generate",
    "threads",
    "stream",
    "second",
    "copy_of_layer",
)


@dataclass(frozen=True)
class Case:
    """One way to load one model.

    Attributes:
        seed: what it was drawn from.
        family: a key of FAMILIES.
        mode: of bigload, or "none" for an unquantized load.
        stored: the dtype of the checkpoint.
        torch_dtype: of the config.
        source: one of SOURCES.
        device_map: as `load_and_quantize_model` takes it.
        budget: for a strategy, the share of the model's bytes that each device may hold.
        execute: where offloaded blocks compute.
        slots: how many groups are on the device at once.
        acts: what is done with the loaded model, in turn.
    """

    seed: int
    family: str
    mode: str
    stored: str
    torch_dtype: str | None
    source: str
    device_map: Any
    budget: tuple[float, ...]
    execute: str
    slots: int
    acts: tuple[str, ...]

    @property
    def is_cpu_computed(self) -> bool:
        """Whether the CPU computes what is offloaded, in float32, so that values may differ a little."""
        return self.execute != "gpu"


def draw(seed: int, devices: list[torch.device]) -> Case:
    """Draw a case for these devices; the first one runs the reference."""
    rng = random.Random(seed)
    family = rng.choice([*FAMILIES])
    mode, stored = rng.choice(MODES), rng.choice([*DTYPES])
    sources = [name for name in SOURCES if _can_be(name, family, mode)]
    device_map, budget = _place(rng, family, devices)
    # Last what changes the model for good: other kernels compute what is dequantized, and adapters stay.
    acts = sorted(rng.sample(ACTS, rng.choice([1, 2, 3])), key=lambda act: (act == "lora", act == "dequantize"))
    is_cuda = devices[0].type == "cuda"
    return Case(
        seed=seed,
        family=family,
        mode=mode,
        stored=stored,
        torch_dtype="fp32" if FAMILIES[family].is_float32 else rng.choice([None, "auto", *DTYPES]),
        source=rng.choice(sources),
        device_map=device_map,
        budget=budget,
        execute="cpu" if is_cuda and rng.random() < 0.1 else "gpu",
        slots=rng.choice([2, 2, 3]),
        acts=tuple(acts),
    )


def _can_be(source: str, family: str, mode: str) -> bool:
    if source == "transformers":
        return FAMILIES[family].is_pretrained and mode != "none" and family not in _MADE_OTHERWISE
    return source not in ("saved", "converted") or mode != "none"


def _place(rng: random.Random, family: str, devices: list[torch.device]) -> tuple[Any, tuple[float, ...]]:
    kind = rng.choice(["resident", "blocks", "blocks", "layers", "everything", "strategy"])
    if kind == "resident":
        return {"": devices[0]}, ()
    if kind == "strategy":
        return rng.choice(STRATEGIES), tuple(rng.uniform(0.4, 1.4) for _ in devices)
    model = empty(FAMILIES[family].build)
    homes: list[Any] = ["disk", "disk", *devices[1:]] + (["cpu"] * 3 if devices[0].type == "cuda" else [])
    if kind == "everything":
        home = rng.choice(["disk", "cpu"])
        if devices[0].type == "cpu" or rng.random() < 0.3:
            return {"": home}, ()  # the CPU computes
        return {"": devices[0]} | {path: home for path, _ in model.named_children()}, ()
    paths = blocks_of(model) if kind == "blocks" else _leaves(model)
    chosen = rng.sample(paths, rng.randint(1, len(paths)))
    return {"": devices[0]} | {path: rng.choice(homes) for path in chosen}, ()


def blocks_of(model: nn.Module) -> list[str]:
    """The paths of the modules in lists, or of the model's children where there is no list."""
    blocks = [
        f"{path}.{key}"
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for key, _ in module.named_children()
    ]
    return blocks or [path for path, child in model.named_children() if any(True for _ in child.parameters())]


def _leaves(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if path and module._parameters and not module._modules]


def described(case: Case) -> str:
    """The case in one line."""
    place: Any = case.device_map
    if isinstance(place, Mapping):
        place = ", ".join(f"{path or 'all'}: {where}" for path, where in place.items())
    more = f" with {', '.join(f'{share:.2f}' for share in case.budget)} of its bytes" if case.budget else ""
    return (
        f"{case.family} {case.mode}, stored as {case.stored}, torch_dtype {case.torch_dtype}, from {case.source}; "
        f"{place}{more}; execute {case.execute}, {case.slots} slots; then {', '.join(case.acts)}"
    )
