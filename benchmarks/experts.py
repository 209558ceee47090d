"""Times fused experts in 4 bit against the same experts in 16 bit, alone: no attention, no cache of keys and values."""

from __future__ import annotations

import gc
import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from bigload import BnbQuantizationConfig
from bigload.model.experts import Experts, find_experts, output_in_16_bit
from bigload.quantization.expert_linears import expert_limits
from bigload.quantization.experts import experts_parameter, quantized_attributes
from bigload.quantization.packed_experts import PackedExperts
from bigload.quantization.quantized_weight import QuantizedWeight

from .limits import describe_machine

TOKENS = (1, 4, 16, 256, 2048)
# How unequal experts are chosen: the n-th in favour as often as 1 / n ** SKEW says.
SKEW = 0.6
# batched_mm copies the weights of each pair: the most bytes it may take, and the most tokens that it is meant for.
MAX_BATCHED_BYTES, MAX_BATCHED_TOKENS = 10 * 10**9, 16
# Above this many tokens eager's loop is measured at the last count only.
MAX_EAGER_TOKENS = 16
_CALLS_S = 0.25  # of one figure, unless three calls take longer


@dataclass(frozen=True)
class Shape:
    """The experts of a model.

    Attributes:
        family: of transformers, whose experts class is built.
        layers: how many of the model's are run, as many as memory takes in 16 and 4 bit and parametrized.
        of_layers: how many the model has.
    """

    family: str
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    layers: int
    of_layers: int


SHAPES = {
    "Qwen3-30B-A3B": Shape("qwen3_moe.Qwen3MoeExperts", 128, 8, 2048, 768, 12, 48),
    "Mixtral-8x7B": Shape("mixtral.MixtralExperts", 8, 2, 4096, 14336, 6, 32),
    "GPT-OSS-20b": Shape("gpt_oss.GptOssExperts", 32, 4, 2880, 2880, 8, 24),
}
TINY = {  # to see that it runs
    "tiny": Shape("qwen3_moe.Qwen3MoeExperts", 8, 2, 64, 64, 2, 4),
    "tiny-gpt-oss": Shape("gpt_oss.GptOssExperts", 8, 2, 64, 64, 2, 4),
}


@dataclass(frozen=True)
class Way:
    """One way to compute.

    Attributes:
        peer: the library.
        way: of its own, by its name.
        prepare: called with the config that the modules share, before anything is measured.
        modules: which of the three sets of modules.
        suits: whether it is measured for a number of tokens and bytes that all their pairs' weights take in 16 bit.
        captured: whether it is also run as a CUDA graph.
        limits: `expert_limits` to set; None for the defaults.
    """

    peer: str
    way: str
    modules: str
    suits: Callable[[int, int], bool]
    captured: bool = False
    limits: tuple[int, int, int] | None = None

    def prepare(self, config: Any) -> None:
        """Choose this way."""
        config._experts_implementation = self.way
        _set_limits(*(self.limits or _DEFAULTS))


_DEFAULTS = (expert_limits.gemv_tokens, expert_limits.grouped_tokens, expert_limits.scratch_bytes)


def _set_limits(gemv_tokens: int, grouped_tokens: int, scratch_bytes: int) -> None:
    expert_limits.gemv_tokens, expert_limits.grouped_tokens = gemv_tokens, grouped_tokens
    expert_limits.scratch_bytes = scratch_bytes


_SCRATCH = _DEFAULTS[2]


def _always(tokens: int, batched: int) -> bool:
    return True


def _batched(tokens: int, batched: int) -> bool:
    return tokens <= MAX_BATCHED_TOKENS and batched <= MAX_BATCHED_BYTES


def _eager(tokens: int, batched: int) -> bool:
    return tokens <= MAX_EAGER_TOKENS or tokens == TOKENS[-1]


WAYS = (
    Way("transformers bf16", "eager", "plain", _eager),
    Way("transformers bf16", "batched_mm", "plain", _batched, captured=True),
    Way("transformers bf16", "grouped_mm", "plain", _always, captured=True),
    Way("bitsandbytes nf4", "batched_mm", "parametrized", _batched),
    Way("bitsandbytes nf4", "grouped_mm", "parametrized", _always),
    Way("bigload nf4", "as it chooses", "packed", _always, captured=True),
    Way("bigload nf4", "gemv", "packed", lambda tokens, _: tokens <= 16, limits=(10**9, 10**9, _SCRATCH)),
    Way("bigload nf4", "grouped", "packed", lambda tokens, _: tokens <= 256, limits=(0, 10**9, _SCRATCH)),
    Way("bigload nf4", "dequantized", "packed", lambda tokens, _: tokens >= 16, limits=(0, 0, _SCRATCH)),
    Way("bigload nf4", "dequantized at once", "packed", lambda tokens, _: tokens > 256, limits=(0, 0, 2**40)),
)
TRAINED = ("grouped_mm", "as it chooses")


def measure_experts(
    shapes: Sequence[str], tokens: Sequence[int], device: str, commit: str | None, budget_s: float = 330.0
) -> Iterator[dict[str, Any]]:
    """Run each shape's experts in each way, forward, and forward and backward.

    Args:
        shapes: names in `SHAPES` or `TINY`.
        tokens: how many at once.
        device: "cuda:N"; or "cpu", where nothing but that it runs is of interest.
        commit: bigload's; by default what git says.
        budget_s: seconds after which no further row is begun; rows that are left out are named in "left_out".

    Yields:
        The result so far, as docs/benchmarks.md explains it.
    """
    deadline = time.perf_counter() + budget_s
    result: dict[str, Any] = {"benchmark": "experts", **describe_machine(device, commit), "rows": [], "left_out": []}
    for number, name in enumerate(shapes):
        until = time.perf_counter() + (deadline - time.perf_counter()) / (len(shapes) - number)
        for row in _shape_rows(name, (SHAPES | TINY)[name], tokens, torch.device(device), until):
            result["rows" if "ms" in row or "error" in row else "left_out"].append(row)
            yield result
    _set_limits(*_DEFAULTS)


def _shape_rows(
    name: str, shape: Shape, tokens: Sequence[int], device: torch.device, until: float
) -> Iterator[dict[str, Any]]:
    config, modules = _build(shape, device)
    sizes = {kind: _bytes(each) / len(each) * shape.of_layers / 2**30 for kind, each in modules.items()}
    error = _error(modules["packed"][0], shape, device)
    for count in tokens:
        x, ids, weights = _inputs(shape, count, device)
        up_rows = modules["packed"][0].quantized_experts.up_features
        batched = 2 * count * shape.top_k * shape.hidden_size * up_rows
        for backward in (False, True):
            for way in WAYS:
                if not way.suits(count, batched) or (backward and way.way not in TRAINED):
                    continue
                row = {"shape": name, "layers": shape.layers, "of_layers": shape.of_layers, "tokens": count}
                row |= {"backward": backward, "peer": way.peer, "way": way.way}
                if time.perf_counter() > until:
                    yield row
                    continue
                row["weights_gib"] = round(sizes[way.modules], 5)
                if way.modules == "packed":
                    row["relative_error"] = error
                way.prepare(config)
                run = _runner(modules[way.modules], x, ids, weights, backward)
                try:
                    yield row | _measured(run, shape, device, way.captured and not backward and count <= 256)
                except torch.OutOfMemoryError as error_:
                    yield row | {"error": str(error_)[:200]}
    modules.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _build(shape: Shape, device: torch.device) -> tuple[Any, dict[str, list[Any]]]:
    """Make the layers in 16 bit, packed, and parametrized by bitsandbytes, with one config."""
    fields = {"num_experts": shape.num_experts, "num_local_experts": shape.num_experts, "hidden_act": "silu"}
    fields |= {"hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size}
    fields |= {"moe_intermediate_size": shape.intermediate_size, "swiglu_alpha": 1.702, "swiglu_limit": 7.0}
    config = SimpleNamespace(**fields, _experts_implementation="eager")
    family, _, cls = shape.family.partition(".")
    made = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), cls)
    modules: dict[str, list[Any]] = {"plain": [], "packed": [], "parametrized": []}
    torch.manual_seed(0)
    for _ in range(shape.layers):
        for kind, layers in modules.items():
            with torch.device("meta"):
                layers.append(made(config).requires_grad_(False))
            if kind == "plain":
                for name, parameter in layers[-1].named_parameters():
                    values = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
                    layers[-1]._parameters[name] = nn.Parameter(values, requires_grad=False)
            layers[-1]._parameters.update(modules["plain"][-1]._parameters)
        _pack(modules["packed"][-1])
        _parametrize(modules["parametrized"][-1])
    return config, modules


def _pack(module: Any) -> None:
    import bitsandbytes.functional as functional

    config = BnbQuantizationConfig.from_mode("nf4")
    (experts,) = find_experts({"experts": module}).values()
    for name in experts.weights:
        values = module._parameters[name].data
        values = values.mT.contiguous() if experts.is_transposed else values
        data, state = functional.quantize_4bit(values.view(-1, values.shape[-1]), blocksize=64, quant_type="nf4")
        state.shape = values.shape
        module._parameters[name] = experts_parameter(QuantizedWeight(data, quant_state=state), config)
    for name, value in quantized_attributes(module, experts, torch.bfloat16, "experts").items():
        setattr(module, name, value)


def _parametrize(module: Any) -> None:
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    for name in ("gate_up_proj", "down_proj"):
        replace_parameter_4bit(module, name, quant_type="nf4", blocksize=64)


def _bytes(modules: Sequence[Any]) -> int:
    """Return the bytes of modules' weights and, where they are quantized, of their scales."""
    total = 0
    for module in modules:
        for name, parameter in module.named_parameters():
            state = getattr(parameter, "quant_state", None)
            if state is None and ".parametrizations" not in f".{name}":
                total += parameter.nbytes
            else:
                absmax = parameter.numel() * 2 // 64 * 4 if state is None else state.absmax.nbytes
                total += parameter.nbytes + absmax
    return total


def _inputs(shape: Shape, tokens: int, device: torch.device) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Return tokens, which experts each layer routes them to, and the weights of these."""
    generator = torch.Generator().manual_seed(tokens)
    favour = torch.arange(1, shape.num_experts + 1) ** -SKEW
    ids = []
    for _ in range(shape.layers):
        favours = favour[torch.randperm(shape.num_experts, generator=generator)].expand(tokens, -1)
        ids.append(torch.multinomial(favours, shape.top_k, generator=generator).to(device))
    x = torch.randn(tokens, shape.hidden_size, generator=generator).to(device, torch.bfloat16)
    weights = torch.rand(tokens, shape.top_k, generator=generator).softmax(-1).to(device, torch.bfloat16)
    return x, ids, weights


def _runner(
    modules: Sequence[Any], x: torch.Tensor, ids: Sequence[torch.Tensor], weights: torch.Tensor, backward: bool
) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            for module, chosen in zip(modules, ids, strict=True):
                module(x, chosen, weights)

    def both() -> None:
        for module, chosen in zip(modules, ids, strict=True):
            given = x.detach().requires_grad_(), weights.detach().requires_grad_()
            module(given[0], chosen, given[1]).sum().backward()

    return both if backward else forward


def _measured(run: Callable[[], None], shape: Shape, device: torch.device, captured: bool) -> dict[str, Any]:
    scale = 1e3 * shape.of_layers / shape.layers
    on_gpu = device.type == "cuda"
    run()
    begin = 0
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        begin = torch.cuda.memory_allocated()
    figures: dict[str, Any] = {"ms": round(_median(run, on_gpu) * scale, 3)}
    if on_gpu:
        figures["extra_gib"] = round((torch.cuda.max_memory_allocated() - begin) / 2**30, 3)
    if on_gpu and captured:
        figures["graph_ms"] = _graph_ms(run, scale)
    return figures


def _median(run: Callable[[], None], on_gpu: bool) -> float:
    """Return the median seconds of a call, of at least 3 and at most 30."""
    seconds: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < 3 or (len(seconds) < 30 and time.perf_counter() - begin < _CALLS_S):
        started = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _graph_ms(run: Callable[[], None], scale: float) -> float | None:
    """Return the time of the same as a CUDA graph; None where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return round(_median(graph.replay, True) * scale, 3)


def _error(module: Any, shape: Shape, device: torch.device) -> float:
    """Return the relative difference of a layer's output to that of its dequantized values, in fp32."""
    x, ids, weights = _inputs(replace(shape, layers=1), 16, device)
    experts: Experts = module.quantized_experts
    twin = SimpleNamespace(**vars(module))
    twin.act_fn, twin._apply_gate = getattr(module, "act_fn", None), module._apply_gate
    twin._parameters = {name: _Values(module._parameters[name], experts.is_transposed) for name in experts.weights}
    twin._parameters |= {name: module._parameters[name].float() for name in experts.biases}
    with torch.no_grad():
        expected = output_in_16_bit(twin, experts, x.float(), ids[0], weights.float())
        found = module(x, ids[0], weights).float()
    return round(((found - expected).norm() / expected.norm()).item(), 5)


class _Values:
    """A packed weight that gives the values of one expert at a time."""

    def __init__(self, parameter: Any, is_transposed: bool) -> None:
        self.packed, self.is_transposed = PackedExperts.of(parameter), is_transposed

    def __getitem__(self, expert: int) -> torch.Tensor:
        values = self.packed.dequantize(expert, torch.float32)
        return values.mT if self.is_transposed else values


def experts_table(result: dict[str, Any]) -> str:
    """Write the rows: milliseconds of all of a model's experts by the number of tokens, and the ratio to 16 bit."""
    rows = [row for row in result["rows"] if "ms" in row]
    tokens = sorted({row["tokens"] for row in rows})
    lines = ["| experts, milliseconds | way | " + " | ".join(f"{count}" for count in tokens) + " |"]
    lines.append("|---" * (len(tokens) + 2) + "|")
    for shape in dict.fromkeys(row["shape"] for row in rows):
        for backward in (False, True):
            ours = [row for row in rows if row["shape"] == shape and row["backward"] == backward]
            what = f"{shape}, forward and backward" if backward else shape
            for peer, way in dict.fromkeys((row["peer"], row["way"]) for row in ours):
                found = {row["tokens"]: row for row in ours if (row["peer"], row["way"]) == (peer, way)}
                cells = [_cell(found.get(count), ours) for count in tokens]
                lines.append(f"| {what} | {peer}, {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def experts_summary(result: dict[str, Any]) -> str:
    """Write for each model how long its experts take: of each peer the soonest way, and bigload as it chooses."""
    rows = [row for row in result["rows"] if "ms" in row and not row["backward"]]
    rows = [row for row in rows if row["peer"] != "bigload nf4" or row["way"] == "as it chooses"]
    tokens = sorted({row["tokens"] for row in rows})
    heads = [f"experts on one {result['device']}", "", "GiB", *(f"{n} token{'s' * (n > 1)}" for n in tokens)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for shape, peer in dict.fromkeys((row["shape"], row["peer"]) for row in rows):
        ours = [row for row in rows if (row["shape"], row["peer"]) == (shape, peer)]
        soonest = (min((row["ms"] for row in ours if row["tokens"] == n), default=None) for n in tokens)
        cells = ["-" if ms is None else f"{ms:.0f} ms" for ms in soonest]
        lines.append("| " + " | ".join([shape, peer, f"{ours[0]['weights_gib']:.1f}", *cells]) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None, others: Sequence[dict[str, Any]]) -> str:
    if row is None:
        return "-"
    best = min(
        (o["ms"] for o in others if o["tokens"] == row["tokens"] and o["peer"] == "transformers bf16"), default=None
    )
    graph = f", graph {row['graph_ms']:.3g}" if row.get("graph_ms") else ""
    return f"{row['ms']:.3g}{graph}" + (f" ({row['ms'] / best:.2f}x)" if best else "")
