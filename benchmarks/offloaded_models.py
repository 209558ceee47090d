"""Times whole mixtures in 4 bit whose experts are in host memory: generation, a long prompt, and training around them.

The models are transformers' own, with random weights that need no checkpoint: each layer's are a view, of its own, of
one tensor. Routers choose as unequally as is asked for: the n-th in a layer's favour as often as 1 / n ** skew says,
disturbed by what the router makes of the token, which differs from token to token.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bigload import OffloadConfig, capture_decode, init_empty_weights, load_and_quantize_model
from bigload.hardware.bandwidth import link_gb_per_s

from .experts import SHAPES, TINY, Shape

SKEW = 0.6
CACHED = ("10% cached", "25% cached", "50% cached")
# Of the largest model two caches: what "auto" makes of so much GPU memory, and the share that its users ask about.
_CACHED = {"Qwen3-30B-A3B": ("in 4 GiB", "25% cached")}
BY_CPU = "by the CPU"  # the experts, which it computes otherwise than a GPU in the last bits


@dataclass(frozen=True)
class Lengths:
    """How many tokens: that are generated, after how many; of them where whole blocks are streamed, or from the disk;
    of the long prompt, and of a step of training; and those after which memory must be what it was.
    """

    generated: int = 128
    prompt: int = 16
    few: int = 12
    long: int = 2048
    flat: int = 256


SHORT = Lengths(5, 3, 3, 32, 6)  # to see that it runs
# What is beside the experts of each shape, and as many layers as there is time for.
_BESIDE: dict[str, tuple[str, int, dict[str, int]]] = {
    "Qwen3-30B-A3B": ("Qwen3Moe", 48, {"num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 151936}),
    "Mixtral-8x7B": ("Mixtral", 8, {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000}),
    "GPT-OSS-20b": ("GptOss", 12, {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 201088}),
    "tiny": ("Qwen3Moe", 2, {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}),
    "tiny-gpt-oss": ("GptOss", 3, {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}),
}
_HEAD_DIM = {"Qwen3-30B-A3B": 128, "Mixtral-8x7B": 128, "GPT-OSS-20b": 64, "tiny": 16, "tiny-gpt-oss": 16}


def measure_models(
    shapes: Sequence[str], device: str, deadline: float, layers: int | None = None
) -> Iterator[dict[str, Any]]:
    """Measure each shape in each way: resident, with caches of experts, whole blocks streamed, experts on the disk, and
    experts that the CPU computes.

    Args:
        shapes: names in `SHAPES` or `TINY`.
        device: "cuda:N"; or "cpu", where the rest is on the disk, and nothing but that it runs is of interest.
        deadline: of `time.perf_counter`, after which no row is begun.
        layers: of the models; by default those of `_BESIDE`.

    Yields:
        Rows, as docs/benchmarks.md explains them; without figures where there was no time.
    """
    where = torch.device(device)
    link = link_gb_per_s(where) if where.type == "cuda" else None
    for name in shapes:
        model = mixture_of(name, where, layers)
        resident: dict[str, Any] = {}
        ways = ["resident", "whole blocks", *_CACHED.get(name, CACHED), "25% cached, on disk"]
        for way in [*ways, BY_CPU] if where.type == "cuda" else ways:
            row: dict[str, Any] = {"shape": name, "layers": model.layers, "skew": SKEW, "way": way}
            if time.perf_counter() > deadline:
                yield row
                continue
            row |= _measured(model, way, SHORT if name in TINY else Lengths(), link, resident)
            yield row
            gc.collect()
            if where.type == "cuda":
                torch.cuda.empty_cache()


def mixture_of(name: str, device: torch.device, layers: int | None = None) -> Mixture:
    """Return what makes a mixture by its name, with as many layers as it has, unless said otherwise."""
    return Mixture(name, (SHAPES | TINY)[name], layers or _BESIDE[name][1], device)


class Mixture:
    """Makes a mixture anew for each way, always the same."""

    def __init__(self, name: str, shape: Shape, layers: int, device: torch.device) -> None:
        self.shape, self.layers, self.device = shape, layers, device
        self._family, _, beside = _BESIDE[name]
        self._head_dim, self._memory = _HEAD_DIM[name], dict[Any, torch.Tensor]()
        self._on_device: dict[Any, torch.Tensor] = {}  # during a load: one from there takes a tenth of the time
        self._fields = beside | {"num_hidden_layers": layers, "head_dim": self._head_dim, "pad_token_id": 0}
        self._fields |= {"num_experts_per_tok": shape.top_k, "hidden_size": shape.hidden_size, "eos_token_id": None}
        self._fields |= {"moe_intermediate_size": shape.intermediate_size, "num_experts": shape.num_experts}
        self._fields |= {"intermediate_size": shape.intermediate_size, "num_local_experts": shape.num_experts}
        self._fields |= {"max_position_embeddings": 4096, "tie_word_embeddings": False}

    def load(self, way: str, folder: str) -> Any:
        """Return the model, loaded in a way."""
        import transformers

        config = getattr(transformers, f"{self._family}Config")(**self._fields)
        with init_empty_weights():
            model = getattr(transformers, f"{self._family}ForCausalLM")(config)
        for path, parameter in [*model.named_parameters()]:
            owner, _, name = path.rpartition(".")
            model.get_submodule(owner)._parameters[name] = nn.Parameter(self._values(path, parameter), False)
        self._on_device.clear()
        away = "cpu" if self.device.type == "cuda" and "disk" not in way else "disk"
        device_map: dict[str, Any] = {"": self.device}
        part = "" if way == "whole blocks" else ".mlp.experts"
        if way != "resident":
            device_map |= {f"model.layers.{layer}{part}": away for layer in range(self.layers)}
        share = float(way.partition("%")[0]) / 100 if "%" in way else None
        how: dict[str, Any] = {"device_map": device_map, "offload_folder": folder}
        how["offload"] = OffloadConfig("cpu" if way == BY_CPU else "gpu", expert_cache=share)
        if way.startswith("in "):
            budgets = {self.device.index or 0: way.removeprefix("in ").replace(" ", ""), "cpu": "100GiB"}
            how |= {"device_map": "auto", "max_memory": budgets}
        made = load_and_quantize_model(model, "nf4", None, **how)
        _skew_routers(made)
        return made.eval()

    def _values(self, path: str, parameter: nn.Parameter) -> torch.Tensor:
        """Return random values: the same for each layer but for where in the memory they begin."""
        _, is_in_layer, rest = path.partition(".layers.")
        layer, _, name = rest.partition(".") if is_in_layer else ("0", "", path)
        size, key = parameter.numel(), (name, tuple(parameter.shape))
        if "norm" in name:
            return torch.ones(parameter.shape, dtype=torch.bfloat16)
        if key not in self._memory:
            generator = torch.Generator(self.device).manual_seed(len(self._memory))
            drawn = torch.empty(size + 64 * self.layers, dtype=torch.bfloat16, device=self.device)
            self._memory[key] = drawn.normal_(0, self._spread(path), generator=generator).cpu()
        if key not in self._on_device:
            self._on_device[key] = self._memory[key].to(self.device)
        begin = 64 * int(layer)
        return self._on_device[key][begin : begin + size].view(parameter.shape)

    def _spread(self, path: str) -> float:
        """Return the standard deviation of a weight's values. As in a trained model, what a router is given differs
        from token to token: it is made of the token, and each layer adds little to it.
        """
        if "embed_tokens" in path:
            return 1.0
        adds = "o_proj" in path or "down_proj" in path
        return 0.02 / (2 * self.layers) ** 0.5 if adds else 0.02


def _skew_routers(model: Any) -> None:
    """Let routers favour experts, by a bias; what they compute has the spread with which that is a fair draw."""
    for path, module in model.named_modules():
        if path.endswith((".gate", ".router")) and hasattr(module, "top_k"):
            generator = torch.Generator().manual_seed(sum(map(ord, path)))
            number, features = module.weight.shape
            order = torch.randperm(number, generator=generator)
            bias = (-SKEW * torch.log1p(torch.arange(number)))[order]
            device, dtype = module.weight.device, module.weight.dtype
            weight = torch.randn(number, features, generator=generator) * (1.28 / features**0.5)
            module.forward = _Router(weight.to(device, dtype), bias.to(device, dtype), module.top_k)


class _Router:
    """Chooses experts, as the routers of these families do."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, top_k: int) -> None:
        self._weight, self._bias, self._top_k = weight, bias, top_k

    def __call__(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1]).to(self._weight.dtype)
        logits = functional.linear(hidden_states, self._weight, self._bias)
        values, ids = torch.topk(logits, self._top_k, dim=-1)
        return logits, torch.softmax(values, -1, dtype=torch.float).to(logits.dtype), ids


def _measured(
    model: Mixture, way: str, lengths: Lengths, link: float | None, resident: dict[str, Any]
) -> dict[str, Any]:
    """Load the model in a way and measure it; what the resident one computes is kept in `resident`."""
    device = model.device
    _reset_peak(device)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        loaded = model.load(way, folder)
        row: dict[str, Any] = {"load_s": round(time.perf_counter() - begun, 2)}
        _reset_peak(device)
        row |= _generation(loaded, way, lengths, device, resident)
        if way == BY_CPU:
            return row | {"is_equal": None}
        row |= _long_prompt(loaded, lengths, device, link, resident)
        if way == "resident":
            row |= _beside_experts(loaded, lengths, device)
        if way in ("resident", "25% cached") and find_spec("peft"):
            row |= _training(loaded, lengths, device, resident)
    return row


def _is_slow(way: str) -> bool:
    return way in ("whole blocks", BY_CPU) or "disk" in way


class _Clock:
    """Notes when each token is there; and, of the first one, what has been copied so far."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.times: list[float] = []
        self.stats: Any = None
        self._model, self._device = model, device

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        _synchronize(self._device)
        self.stats = self.stats if self.times else _stats(self._model)
        self.times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def _generation(
    model: Any, way: str, lengths: Lengths, device: torch.device, resident: dict[str, Any]
) -> dict[str, Any]:
    count, warm = (lengths.few, lengths.few) if _is_slow(way) else (lengths.generated, lengths.flat)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, 120, (1, lengths.prompt), generator=generator).to(device)

    def generate(number: int, clock: _Clock | None = None, **how: Any) -> torch.Tensor:
        torch.manual_seed(0)  # drawn, not the likeliest: a model of random weights would repeat itself, and its experts
        how |= {"max_new_tokens": number, "min_new_tokens": number, "do_sample": True, "top_k": 1000}
        found: torch.Tensor = model.generate(prompt, stopping_criteria=[clock] if clock else None, **how)
        return found[0, lengths.prompt :]

    generate(2)  # kernels are compiled
    before = _allocated(device)
    first = generate(warm).cpu()  # caches fill
    is_flat, clock = _allocated(device) == before, _Clock(model, device)
    tokens = generate(count, clock).cpu()
    stats, after = clock.stats, _stats(model)
    known = resident.setdefault("tokens", tokens)
    row: dict[str, Any] = {
        "tokens_per_s": _rate(clock),
        "is_equal": torch.equal(tokens, known[:count]) and torch.equal(first[:count], tokens),
        "is_flat": is_flat,
    }
    if after is not None and stats is not None:
        hits, misses = after.expert_hits - stats.expert_hits, after.expert_misses - stats.expert_misses
        row |= {"hit_rate": round(hits / (hits + misses), 3) if hits + misses else None}
        row |= {"mib_per_token": round((after.nbytes - stats.nbytes) / (count - 1) / 2**20, 4)}
    plan = getattr(getattr(model, "offload", None), "plan", None)
    planned = [account for account in plan.accounts if account.place == device] if plan else []
    row |= {"gpu_gib": round(before / 2**30, 3), "peak_gib": _peak_gib(device)}
    row |= {"planned_gib": round(planned[0].needed / 2**30, 3) if planned else None}
    return row if _is_slow(way) else row | _captured_generation(model, generate, count, device, resident)


def _captured_generation(
    model: Any, generate: Callable[..., torch.Tensor], count: int, device: torch.device, resident: dict[str, Any]
) -> dict[str, Any]:
    """Generate as many tokens in captured steps, with a static cache; on the CPU they are not captured."""
    room, clock = generate(1).numel() + count + 16, _Clock(model, device)
    how: dict[str, Any] = {"cache_implementation": "static", "max_cache_len": room, "disable_compile": True}
    with capture_decode(model):
        generate(count, **how)  # captures
        tokens = generate(count, clock, **how).cpu()
    known = resident.setdefault("captured tokens", tokens)
    return {"captured_tokens_per_s": _rate(clock), "is_captured_equal": torch.equal(tokens, known)}


def _rate(clock: _Clock) -> float:
    return round((len(clock.times) - 1) / (clock.times[-1] - clock.times[0]), 2)


def _long_prompt(
    model: Any, lengths: Lengths, device: torch.device, link: float | None, resident: dict[str, Any]
) -> dict[str, Any]:
    """Time a forward of many tokens, beside the time that the link takes for all that is not resident."""
    given = torch.randint(1, 120, (1, lengths.long), generator=torch.Generator().manual_seed(1)).to(device)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return model(given, use_cache=False, logits_to_keep=1).logits

    logits = forward()
    seconds = min(_seconds(forward, device) for _ in range(2))
    row: dict[str, Any] = {"prompt_s": round(seconds, 4)}
    row["is_prompt_equal"] = torch.equal(logits, resident.setdefault("logits", logits))
    plan = getattr(getattr(model, "offload", None), "plan", None)
    if plan is not None and link is not None:
        row["link_s"] = round(plan.streamed_bytes / link / 1e9, 4)
    return row


def _beside_experts(model: Any, lengths: Lengths, device: torch.device) -> dict[str, Any]:
    """Time tokens of a model whose experts return what they are given: attention, norms, routers and Python."""
    prompt = torch.ones(1, lengths.prompt, dtype=torch.int64, device=device)

    count = min(lengths.generated, 64)

    def generate() -> None:
        model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=True, top_k=1000)

    with _without_experts(model):
        seconds = _seconds(generate, device)
    return {"beside_ms": round(seconds / count * 1e3, 3)}


@contextmanager
def _without_experts(model: Any) -> Iterator[None]:
    own = {module: module.forward for module in model.modules() if "quantized_experts" in vars(module)}
    for module in own:
        module.forward = lambda hidden_states, *_: hidden_states
    try:
        yield
    finally:
        for module, forward in own.items():
            module.forward = forward


def _training(model: Any, lengths: Lengths, device: torch.device, resident: dict[str, Any]) -> dict[str, Any]:
    """Time steps of QLoRA, and compare their losses."""
    import peft

    prepared = peft.prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(prepared, lora).train()
    optimizer = torch.optim.AdamW([each for each in tuned.parameters() if each.requires_grad], lr=1e-3)
    given = torch.randint(1, 120, (1, lengths.long), generator=torch.Generator().manual_seed(2)).to(device)
    losses: list[torch.Tensor] = []

    def step() -> None:
        loss = tuned(input_ids=given, labels=given, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    step()
    seconds = min(_seconds(step, device) for _ in range(2))
    found = [float(loss) for loss in losses]
    return {"step_s": round(seconds, 4), "losses": found, "are_losses_equal": found == resident.setdefault("l", found)}


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    _synchronize(device)
    begun = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - begun


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _allocated(device: torch.device) -> int:
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_gib(device: torch.device) -> float:
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return round(peak / 2**30, 3)


def _stats(model: Any) -> Any:
    return model.offload.stats() if hasattr(model, "offload") else None


def models_table(rows: Sequence[dict[str, Any]]) -> str:
    """Write a line for each way of each shape."""
    heads = [
        "tokens/s",
        "of resident",
        "captured",
        "hits",
        "MiB a token",
        "GPU GiB, peak",
        "prompt s (link s)",
        "QLoRA step s",
    ]
    lines = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        own = [row for row in rows if row["shape"] == shape and "tokens_per_s" in row]
        if not own:
            continue
        beside = f", {own[0]['beside_ms']:g} ms a token beside experts" if "beside_ms" in own[0] else ""
        lines += [f"| {shape}, {own[0]['layers']} layers{beside} | {' | '.join(heads)} |", "|---" * 9 + "|"]
        lines += [f"| {row['way']} | {' | '.join(_cells(row, own[0]))} |" for row in own] + [""]
    return "\n".join(lines).rstrip()


def models_summary(result: Mapping[str, Any]) -> str:
    """Write the same in few columns: how fast each way is, and in how much memory."""
    heads = ["tokens a second", "captured", "GPU memory", "2048 tokens", "a step of QLoRA"]
    lines = []
    for shape in dict.fromkeys(row["shape"] for row in result["models"]):
        own = [row for row in result["models"] if row["shape"] == shape]
        lines += [f"| {shape}, {own[0]['layers']} layers, {result['device']} | {' | '.join(heads)} |", "|---" * 6 + "|"]
        for row in own:
            assert not _is_wrong(row), row
            prompt = f"{row['prompt_s']:.2f} s" if "prompt_s" in row else "-"
            step = f"{row['step_s']:.2f} s" if "step_s" in row else "-"
            captured = f"{row['captured_tokens_per_s']:.1f}" if "captured_tokens_per_s" in row else "-"
            speeds, memory = f"{row['tokens_per_s']:.1f} | {captured}", f"{row['peak_gib']:.1f} GiB"
            lines.append(f"| {row['way']} | {speeds} | {memory} | {prompt} | {step} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _is_wrong(row: Mapping[str, Any]) -> bool:
    others = ("is_prompt_equal", "is_captured_equal", "are_losses_equal")
    return False in (row["is_equal"], *map(row.get, others))


def _cells(row: dict[str, Any], first: dict[str, Any]) -> list[str]:
    wrong = ", NOT EQUAL" if False in (row["is_equal"], row.get("is_prompt_equal")) else ""
    wrong += "" if row.get("is_flat", True) else ", MEMORY GROWS"
    link = f" ({row['link_s']:g})" if row.get("link_s") else ""
    step = "-" if "step_s" not in row else f"{row['step_s']:g}" + ("" if row["are_losses_equal"] else ", NOT EQUAL")
    rate, not_equal = row.get("hit_rate"), "" if row.get("is_captured_equal", True) else ", NOT EQUAL"
    return [
        f"{row['tokens_per_s']:g}{wrong}",
        f"{row['tokens_per_s'] / first['tokens_per_s']:.2f}" if first["way"] == "resident" else "-",
        f"{row['captured_tokens_per_s']:g}{not_equal}" if "captured_tokens_per_s" in row else "-",
        "-" if rate is None else f"{rate:.0%}",
        f"{row['mib_per_token']:g}" if "mib_per_token" in row else "-",
        f"{row['gpu_gib']:g}, {row['peak_gib']:g}",
        f"{row['prompt_s']:g}{link}" if "prompt_s" in row else "-",
        step,
    ]
