"""Times generation token by token: steps as they are, and captured in CUDA graphs, beside transformers' own ways."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bigload import BnbQuantizationConfig, capture_decode, init_empty_weights, load_and_quantize_model

from .checkpoints import LLAMAS
from .limits import describe_machine
from .offload import offloaded_blocks

PROMPT = 16
# Of each, the cache of its `generate`, and whether it compiles.
PEERS = {
    "transformers": ("dynamic", False),
    "transformers, static": ("static", False),
    "transformers, compiled": ("static", True),
}
MODES = ("nf4", "nf4-dq", "int8", "int8-t0", "none")


@dataclass(frozen=True)
class Case:
    """One model, or one of transformers alone.

    Attributes:
        size: a name in `LLAMAS`, or of a mixture in offloaded_models.py.
        mode: as `load` takes it; "int8-t0" is int8 without its search for outliers.
        offloaded: how many blocks are in host memory; of a mixture, per cent of the experts that are cached on the GPU.
            None for none.
        batch: sequences at once.
        peer: "bigload", or one of `PEERS`, which compute in 16 bit.
    """

    size: str
    mode: str
    offloaded: int | None = None
    batch: int = 1
    peer: str = "bigload"


def cases_of(
    sizes: Sequence[str],
    modes: Sequence[str],
    batches: Sequence[int],
    offloaded: Sequence[int],
    cached: Sequence[int],
    peers: Sequence[str],
) -> list[Case]:
    """List what is measured: what tells most comes first."""
    found: list[Case] = []
    for size in sizes:
        if size not in LLAMAS:
            found += [Case(size, "nf4", share) for share in (None, *cached)]
            continue
        found += [Case(size, mode, None, batches[0]) for mode in modes]
        found += [Case(size, modes[0], count, batches[0]) for count in offloaded if count]
        found += [Case(size, modes[0], None, batch) for batch in batches[1:]]
        found += [Case(size, "none", None, batch, peer) for batch in batches for peer in peers]
    return found


def measure_decode(
    cases: Sequence[Case], device: str, commit: str | None, generated: int, long: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """Time cases one after the other.

    Args:
        cases: what to time.
        device: the GPU, or "cpu", where nothing but that it runs is of interest.
        commit: bigload's; by default what git says.
        generated: tokens after the prompt.
        long: tokens after which memory must be what it was; 0 for none.
        seconds: begin no row after them.

    Yields:
        The result so far, as docs/benchmarks.md explains it.
    """
    where, begun = torch.device(device), time.perf_counter()
    result: dict[str, Any] = {"benchmark": "decode", **describe_machine(device, commit), "rows": []}
    if where.type == "cuda":
        from bigload.hardware.bandwidth import link_gb_per_s

        result["link_gb_per_s"] = float(f"{link_gb_per_s(where):.4g}")
    loaded = _Loaded(where)
    try:
        for case in cases:
            if time.perf_counter() - begun > seconds:
                return
            try:
                for row in _rows(loaded, case, where, generated, long):
                    result["rows"].append(vars(case) | row)
                    long = 0 if "is_flat" in row else long  # once
                    yield result
                    if time.perf_counter() - begun > seconds:
                        return
            except Exception as error:  # what a peer cannot do is a result too
                result["rows"].append(vars(case) | {"error": f"{type(error).__name__}: {str(error)[:300]}"})
                loaded.forget()
                yield result
    finally:
        loaded.forget()


class _Loaded:
    """The model of the last case, which is kept while the next one needs the same."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._key, self._model = device, None, None
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # of what is offloaded to the disk
        self.load_s = 0.0

    def forget(self) -> None:
        """Free it."""
        self._key = self._model = None
        gc.collect()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def of(self, case: Case) -> Any:
        """Return the model of a case."""
        key: Any = case.size, case.mode, case.offloaded
        if key != self._key:
            self.forget()
            begun = time.perf_counter()
            self._folder = tempfile.TemporaryDirectory()
            self._model = _load(case, self._device, self._folder.name)
            self.load_s = time.perf_counter() - begun
            self._key = key
        return self._model


def _load(case: Case, device: torch.device, folder: str) -> Any:
    from .offloaded_models import mixture_of

    if case.size not in LLAMAS:
        way = "resident" if case.offloaded is None else f"{case.offloaded}% cached"
        return mixture_of(case.size, device).load(way, folder)
    model = _llama(case.size, device)
    config: Any = BnbQuantizationConfig(load_in_4bit=True, skip_modules=["*"], bnb_4bit_compute_dtype="auto")
    if case.mode != "none":
        is_int8 = case.mode.startswith("int8")
        options: dict[str, Any] = {"torch_dtype": torch.float16} if is_int8 else {}
        options |= {"llm_int8_threshold": 0.0} if case.mode == "int8-t0" else {}
        config = BnbQuantizationConfig.from_mode(case.mode.removesuffix("-t0"), **options)
    device_map: dict[str, Any] = {"": device}
    away = "cpu" if device.type == "cuda" else "disk"
    device_map |= {f"model.layers.{n}": away for n in offloaded_blocks(case.offloaded or 0, len(model.model.layers))}
    return load_and_quantize_model(model, config, None, device_map=device_map, offload_folder=folder).eval()


def _llama(size: str, device: torch.device) -> Any:
    """Return a Llama of random weights, on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = LLAMAS[size]
    config = LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        vocab_size=sizes.vocabulary,
        tie_word_embeddings=False,
        dtype="bfloat16",
        eos_token_id=None,
        pad_token_id=0,
    )
    with init_empty_weights():
        model = LlamaForCausalLM(config)
    generator = torch.Generator(device).manual_seed(0)
    for path, parameter in [*model.named_parameters()]:
        owner, _, name = path.rpartition(".")
        values = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
        values = values.fill_(1) if "norm" in path else values.normal_(0, 0.02, generator=generator)
        model.get_submodule(owner)._parameters[name] = nn.Parameter(values, requires_grad=False)
    return model.eval()


def _rows(loaded: _Loaded, case: Case, device: torch.device, generated: int, long: int) -> Iterator[dict[str, Any]]:
    if case.peer in PEERS:
        loaded.forget()
        model = _llama(case.size, device).to(device)
        way, compiles = PEERS[case.peer]
        yield _Run(model, case, device, generated).row(way, compiles=compiles)[0]
        return
    run = _Run(loaded.of(case), case, device, generated)
    streamed = getattr(getattr(loaded.of(case), "offload", None), "plan", None)
    known: dict[str, Any] = {"load_s": round(loaded.load_s, 2)}
    known |= {"streamed_gb": round(streamed.streamed_bytes / 1e9, 6)} if streamed is not None else {}
    row, _ = run.row("dynamic")
    yield known | row
    row, expected = run.row("static")
    yield known | row
    with capture_decode(run.model) as capture:
        row, found = run.row("captured", capture)
        row |= {"is_equal": torch.equal(found[0], expected[0]), "logits_differ": _difference(found[1], expected[1])}
        if long:
            row["is_flat"] = run.is_flat(long)
        yield known | row


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference of two runs' logits, up to the first token in which they differ."""
    return float((one - other).abs().max())


class _Run:
    """Generates with one model, always from the same prompt."""

    def __init__(self, model: Any, case: Case, device: torch.device, generated: int) -> None:
        self.model, self._device, self._generated = model, device, generated
        prompt = torch.randint(1, 120, (case.batch, PROMPT), generator=torch.Generator().manual_seed(0))
        self._prompt, self._batch = prompt.to(device), case.batch

    def _generate(self, count: int, way: str, **how: Any) -> Any:
        how |= {} if way == "dynamic" else {"cache_implementation": "static"}
        how |= {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        how |= {"attention_mask": torch.ones_like(self._prompt)}
        out = self.model.generate(self._prompt, **how)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return out

    def row(self, way: str, capture: Any = None, *, compiles: bool = False) -> tuple[dict[str, Any], Any]:
        """Time one way; return what is measured, and the tokens and logits of a few steps."""
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        how: dict[str, Any] = {"disable_compile": not compiles}
        size = {"max_cache_len": PROMPT + self._generated} if way != "dynamic" else {}
        begun = time.perf_counter()
        self._generate(4, way, **how, **size)  # captures, compiles, loads kernels
        first_run_s = time.perf_counter() - begun
        first_s = _best(lambda: self._generate(1, way, **how, **size), 2)
        seconds = _best(lambda: self._generate(self._generated, way, **how, **size), 1 + bool(capture))
        row: dict[str, Any] = {
            "way": way,
            "tokens_per_s": round(self._batch * self._generated / seconds, 2),
            "step_ms": round((seconds - first_s) / max(1, self._generated - 1) * 1e3, 3),
            "first_token_s": round(first_s, 4),
            "first_run_s": round(first_run_s, 3),
        }
        if on_gpu:
            row["peak_gib"] = round(torch.cuda.max_memory_allocated(self._device) / 2**30, 3)
        if capture is not None:
            stats = capture.stats()
            row |= {"capture_s": round(stats.capture_s, 3), "graph_mib": round(stats.nbytes / 2**20, 1)}
            row |= {"replayed": stats.replayed, "uncaptured": stats.uncaptured}
            row["reasons"] = [capture.without_effect] if capture.without_effect else [*stats.reasons]
        shown = {"return_dict_in_generate": True, "output_logits": True}
        out = self._generate(min(self._generated, 32), way, **how, **size, **shown)
        return row, (out.sequences.cpu(), torch.stack(out.logits).cpu())

    def is_flat(self, count: int) -> bool:
        """Whether so many tokens leave memory as it was."""
        self._generate(8, "captured", max_cache_len=PROMPT + count)
        before = _held(self._device)
        self._generate(count, "captured", max_cache_len=PROMPT + count)
        return _held(self._device) == before


def decode_table(result: Mapping[str, Any]) -> str:
    """Write the rows as a table: tokens a second by way, and what captured steps cost."""
    rows: dict[str, dict[str, Any]] = {}
    for row in result["rows"]:
        rows.setdefault(_name(row), {})[row.get("way", "")] = row
    heads = ["tokens a second", *_WAYS, "step", "first token", "capture", "equal"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, ways in rows.items():
        rates = [f"{ways[way]['tokens_per_s']:.1f}" if way in ways else "-" for way in _WAYS]
        latest = [*ways.values()][-1]
        if "error" in latest:
            lines.append(f"| {name} | " + " | ".join(rates) + f" | {latest['error'][:60]} | - | - | - |")
            continue
        captured = ways.get("captured", {})
        cells = [f"{latest['step_ms']:.2f} ms", f"{latest['first_token_s']:.3f} s"]
        cells += [f"{captured['capture_s']:.2f} s" if captured.get("replayed") else "-"]
        cells += [{True: "yes", False: "no"}.get(captured.get("is_equal"), "-")]
        lines.append(f"| {name} | " + " | ".join([*rates, *cells]) + " |")
    reasons = dict.fromkeys(reason for row in result["rows"] for reason in row.get("reasons", ()))
    return "\n".join([*lines, *(["", *(f"- not captured: {reason}" for reason in reasons)] if reasons else [])])


_WAYS = ("dynamic", "static", "captured")  # a cache that grows, a static one, and captured


def _name(row: Mapping[str, Any]) -> str:
    parts = [row["size"], row["mode"]]
    if row["peer"] != "bigload":
        parts.append(row["peer"])
    if row["offloaded"] is not None:
        parts.append(f"{row['offloaded']} blocks offloaded" if row["size"] in LLAMAS else f"{row['offloaded']}% cached")
    return ", ".join([*parts, f"batch {row['batch']}"])


def _held(device: torch.device) -> int:
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _best(run: Callable[[], Any], times: int) -> float:
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        run()
        found.append(time.perf_counter() - begun)
    return min(found)
