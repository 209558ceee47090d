"""Times fused experts in 4 bit in host memory: all resident, some cached on the GPU, or each module copied whole."""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from bigload import BnbQuantizationConfig
from bigload.hardware.pinned import HostGroup
from bigload.model.experts import find_experts
from bigload.offload.engine import Engine
from bigload.offload.leaves import Group, Leaf
from bigload.quantization.experts import experts_parameter, quantized_attributes
from bigload.quantization.formats import TABLES, FourBit, part_name
from bigload.quantization.quantized_weight import QuantizedWeight
from bigload.quantization.quantizer import code_table

from .experts import SHAPES, TINY, Shape
from .limits import describe_machine
from .offloaded_models import measure_models, models_table

TOKENS, SKEWS, SHARES = (1, 4, 2048), (0.6, 1.0), (0.1, 0.25, 0.5)
# Forwards that fill the caches, and those that are timed.
WARM, TIMED = 24, 64
# From so many tokens on a forward takes long enough to be timed by itself.
MANY = 256
FORMAT = FourBit("nf4", 64, False, torch.uint8)


def measure_offloaded_experts(
    shapes: Sequence[str],
    tokens: Sequence[int],
    device: str,
    commit: str | None,
    budget_s: float = 400.0,
    models: dict[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Run whole models; then all layers' experts alone, forward after forward, each with other choices.

    Args:
        shapes: names in `SHAPES` or `TINY`; all layers of the model are run.
        tokens: how many at once.
        device: "cuda:N"; or "cpu", where nothing but that it runs is of interest.
        commit: bigload's; by default what git says.
        budget_s: seconds after which no further row is begun; rows that are left out are named in "left_out". Whole
            models take two thirds of them at most.
        models: arguments of `measure_models`; None for no whole models.

    Yields:
        The result so far, as docs/benchmarks.md explains it.
    """
    begun = time.perf_counter()
    deadline = begun + budget_s
    result: dict[str, Any] = {"benchmark": "offloaded-experts", **describe_machine(device, commit)}
    result |= {"rows": [], "models": [], "left_out": []}
    for row in [] if models is None else measure_models(shapes, device, begun + budget_s * 2 / 3, **models):
        result["models" if "tokens_per_s" in row else "left_out"].append(row)
        yield result
    with torch.no_grad():
        for name in shapes:
            for row in _rows(name, (SHAPES | TINY)[name], tokens, torch.device(device), deadline):
                result["rows" if "tokens_per_s" in row else "left_out"].append(row)
                yield result


def _rows(
    name: str, shape: Shape, tokens: Sequence[int], device: torch.device, deadline: float
) -> Iterator[dict[str, Any]]:
    stores = [_store(shape, layer, device) for layer in range(shape.of_layers)]
    expected: dict[tuple[int, float], torch.Tensor] = {}
    ways: list[tuple[str, float | None]] = [("resident", None), *((f"{share:.0%} cached", share) for share in SHARES)]
    for way, share in [*ways, ("whole modules", None)]:
        before = _allocated(device)
        model = _Model(shape, stores)
        engine = None
        if way == "resident":
            model.to_device(device)
        else:
            engine = _stream(model, stores, device, None if share is None else int(share * shape.num_experts))
        for count in tokens:
            for skew in SKEWS if count < MANY else SKEWS[:1]:
                row: dict[str, Any] = {
                    "shape": name,
                    "layers": shape.of_layers,
                    "tokens": count,
                    "skew": skew,
                    "way": way,
                }
                if time.perf_counter() > deadline:
                    yield row
                    continue
                yield (
                    row
                    | _timed(model, engine, shape, count, skew, device, expected)
                    | {"gpu_gib": round((_allocated(device) - before) / 2**30, 4)}
                )
        del model, engine
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _timed(
    model: _Model,
    engine: Engine | None,
    shape: Shape,
    count: int,
    skew: float,
    device: torch.device,
    expected: dict[tuple[int, float], torch.Tensor],
) -> dict[str, Any]:
    warm, timed = (WARM, TIMED) if count < MANY else (1, 3)
    if device.type == "cpu":
        warm, timed = 2, 4
    draw = _Calls(shape, count, skew, device)
    calls = [draw.next() for _ in range(warm + timed)]
    for call in calls[:warm]:
        model(*call)
    before = None if engine is None else engine.stats()
    _synchronize(device)
    begin = time.perf_counter()
    for call in calls[warm:]:
        out = model(*call)
    _synchronize(device)
    spent_s = time.perf_counter() - begin
    right = expected.setdefault((count, skew), out)
    row: dict[str, Any] = {"tokens_per_s": round(count * timed / spent_s, 2), "is_equal": torch.equal(out, right)}
    if engine is not None and before is not None:
        after = engine.stats()
        hits, misses = after.expert_hits - before.expert_hits, after.expert_misses - before.expert_misses
        row |= {"hit_rate": round(hits / (hits + misses), 3) if hits + misses else None}
        row |= {"mib_per_forward": round((after.nbytes - before.nbytes) / timed / 2**20, 2)}
    return row


class _Model(nn.Module):
    """The experts of all layers, one after the other."""

    def __init__(self, shape: Shape, stores: Sequence[HostGroup]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_experts(shape, store, layer) for layer, store in enumerate(stores))

    def forward(self, x: torch.Tensor, ids: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        for layer, chosen in zip(self.layers, ids, strict=True):
            x = torch.nn.functional.normalize(x + layer(x, chosen, weights), dim=-1)
        return x

    def to_device(self, device: torch.device) -> None:
        for module in self.layers:
            for name, parameter in module.named_parameters():
                module._parameters[name] = parameter.to(device)


def _experts(shape: Shape, store: HostGroup, layer: int) -> Any:
    """Make a module of experts whose weights are those in a store."""
    module = _module(shape)
    (experts,) = find_experts({"experts": module}).values()
    config = BnbQuantizationConfig.from_mode("nf4", torch_dtype="bf16", bnb_4bit_compute_dtype="bf16")
    for name in experts.weights:
        parts = {
            part: store.tensors[part_name(f"layers.{layer}.{name}", part)] for part in ("weight", "absmax", "quant_map")
        }
        weight = QuantizedWeight.from_parts(FORMAT, experts.packed_shape(name), torch.bfloat16, parts)
        module._parameters[name] = experts_parameter(weight, config)
    for name in experts.biases:
        values = torch.zeros(module._parameters[name].shape, dtype=torch.bfloat16)
        module._parameters[name] = nn.Parameter(values, requires_grad=False)
    for name, value in quantized_attributes(module, experts, torch.bfloat16, "experts").items():
        setattr(module, name, value)
    return module


def _module(shape: Shape) -> Any:
    fields = {"num_experts": shape.num_experts, "num_local_experts": shape.num_experts, "hidden_act": "silu"}
    fields |= {"hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size}
    fields |= {"moe_intermediate_size": shape.intermediate_size, "swiglu_alpha": 1.702, "swiglu_limit": 7.0}
    family, _, cls = shape.family.partition(".")
    made = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), cls)
    with torch.device("meta"):
        return made(SimpleNamespace(**fields, _experts_implementation="eager")).requires_grad_(False)


def _store(shape: Shape, layer: int, device: torch.device) -> HostGroup:
    """Fill host memory with a layer's experts: any bytes are some values in 4 bit."""
    (experts,) = find_experts({"experts": _module(shape)}).values()
    specs = {
        part_name(f"layers.{layer}.{name}", part): spec
        for name in experts.weights
        for part, spec in FORMAT.parts(experts.packed_shape(name)).items()
    }
    store = HostGroup(specs, device)
    generator = torch.Generator().manual_seed(layer)
    for name, tensor in store.tensors.items():
        if name.endswith("absmax"):
            tensor.uniform_(0.01, 0.05, generator=generator)
        elif name.endswith("quant_map"):
            assert tensor.numel() == TABLES["quant_map"]
            tensor.copy_(code_table("nf4", torch.device("cpu")))
        else:
            tensor.random_(0, 256, generator=generator)
    return store


def _stream(model: _Model, stores: Sequence[HostGroup], device: torch.device, cached: int | None) -> Engine:
    groups = []
    for layer, (module, store) in enumerate(zip(model.layers, stores, strict=True)):
        names: Any = module.quantized_experts
        for name in names.biases:
            module._parameters[name] = nn.Parameter(module._parameters[name].to(device), requires_grad=False)
        leaf = Leaf(f"layers.{layer}", module, names.weights)
        groups.append(Group(str(layer), (leaf,), store, cached))
    return Engine(model, groups, device)


class _Calls:
    """Calls, the same for each way: tokens, the experts that each layer's router chooses, and their weights.

    The n-th in a layer's favour is chosen as often as 1 / n ** skew says, independently of the call before.
    """

    def __init__(self, shape: Shape, count: int, skew: float, device: torch.device) -> None:
        self._generator = torch.Generator().manual_seed(count)
        favour = torch.arange(1, shape.num_experts + 1) ** -skew
        self._favours = [
            favour[torch.randperm(shape.num_experts, generator=self._generator)].expand(count, -1)
            for _ in range(shape.of_layers)
        ]
        self._shape, self._count, self._device = shape, count, device

    def next(self) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """Draw a call."""
        top_k = self._shape.top_k
        drawn = [torch.multinomial(favours, top_k, generator=self._generator) for favours in self._favours]
        ids = torch.stack(drawn).to(self._device)
        x = torch.randn(self._count, self._shape.hidden_size, generator=self._generator)
        weights = torch.rand(self._count, top_k, generator=self._generator).softmax(-1)
        return x.to(self._device, torch.bfloat16), list(ids), weights.to(self._device, torch.bfloat16)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def offloaded_experts_table(result: dict[str, Any]) -> str:
    """Write a table: a line for each way, a column for each number of tokens and skew."""
    lines = [models_table(result["models"]), ""] if result.get("models") else []
    for shape in dict.fromkeys(row["shape"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["shape"] == shape]
        columns = list(dict.fromkeys((row["tokens"], row["skew"]) for row in rows))
        heads = [f"{tokens} tokens, skew {skew:g}" for tokens, skew in columns]
        lines += [f"| {shape}, tokens/s | GPU GiB | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
        for way in dict.fromkeys(row["way"] for row in rows):
            own = {(row["tokens"], row["skew"]): row for row in rows if row["way"] == way}
            cells = [_cell(own.get(column)) for column in columns]
            lines.append(f"| {way} | {max(row['gpu_gib'] for row in own.values()):g} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    rate = row.get("hit_rate")
    wrong = "" if row["is_equal"] else ", NOT EQUAL"
    return f"{row['tokens_per_s']:g}" + ("" if rate is None else f" ({rate:.0%} hits)") + wrong
