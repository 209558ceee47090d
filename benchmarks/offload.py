"""Times forwards of models of which part rests off the GPU, against the link that is measured in the same run."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoints import build
from .files import shards, warm
from .limits import describe_machine

TOKENS = (1, 16, 512, 2048)
GENERATED = 64
_REPEATS = 5


@dataclass(frozen=True)
class Case:
    """One model to time.

    Attributes:
        peer: "bigload" or "accelerate".
        mode: as `load` takes it.
        offloaded: how many of the blocks rest on the CPU.
        in_fp32: they are computed there, in float32.
    """

    peer: str
    mode: str
    offloaded: int
    in_fp32: bool = False


def measure_offload(folder: Path, cases: list[Case], device: str, commit: str | None) -> Iterator[dict[str, Any]]:
    """Time cases one after the other.

    Args:
        folder: a Llama's checkpoint in 16 bit.
        cases: what to time.
        device: the GPU, or "cpu", where nothing but that it runs is of interest.
        commit: bigload's; by default what git says.

    Yields:
        The result so far, as docs/benchmarks.md explains it.
    """
    from bigload.rates import link_gb_per_s

    warm(shards(folder))
    place = torch.device(device)
    link = link_gb_per_s(place) if place.type == "cuda" else None
    result = {
        "benchmark": "offload",
        "checkpoint": folder.name,
        **describe_machine(device, commit),
        "limits": {"link_gb_per_s": link and float(f"{link:.4g}")},
        "rows": [],
    }
    for case in cases:
        try:
            row = _measured(folder, case, place, link)
        except Exception as error:  # a peer that cannot do it is a result too
            row = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        result["rows"].append({**vars(case), **row})
        gc.collect()
        yield result


def _measured(folder: Path, case: Case, device: torch.device, link: float | None) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with _timed(on_gpu) as load:
        model = _LOADERS[case.peer](folder, case, device).eval()
    row: dict[str, Any] = {"load_s": round(load(), 3)}
    streamed = model.offload.plan.streamed_bytes if hasattr(model, "offload") else 0
    row["streamed_bytes"] = streamed
    for tokens in TOKENS if case.peer == "bigload" else TOKENS[:1]:
        seconds = _step_seconds(model, tokens, device)
        row[f"step_{tokens}_s"] = round(seconds, 5)
        if streamed and link and tokens == 1:
            row["streamed_gb_per_s"] = round(streamed / seconds / 1e9, 2)
            row["share_of_link"] = round(streamed / seconds / 1e9 / link, 3)
    if case.peer == "bigload":
        row["token_s"] = round(_generate_seconds(model, device) / GENERATED, 5)
    if on_gpu:
        row["gpu_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 4)
        row["gpu_held_gib"] = round(torch.cuda.memory_allocated() / 2**30, 4)
    return row


@contextmanager
def _timed(on_gpu: bool) -> Iterator[Callable[[], float]]:
    begun = ended = time.perf_counter()
    yield lambda: ended - begun
    if on_gpu:
        torch.cuda.synchronize()
    ended = time.perf_counter()


def _step_seconds(model: Any, tokens: int, device: torch.device) -> float:
    """Time a forward: the median of several, after two that are not counted."""
    ids = torch.arange(tokens, device=device).view(1, -1) % model.config.vocab_size
    times = []
    with torch.no_grad():
        for _ in range(2 + _REPEATS):
            with _timed(device.type == "cuda") as seconds:
                model(ids, use_cache=False, logits_to_keep=1)
            times.append(seconds())
    return statistics.median(times[2:])


def _generate_seconds(model: Any, device: torch.device) -> float:
    ids = torch.arange(16, device=device).view(1, -1)
    with torch.no_grad(), _timed(device.type == "cuda") as seconds:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=GENERATED,
            max_new_tokens=GENERATED,
            do_sample=False,
            pad_token_id=0,
        )
    return seconds()


def offloaded_blocks(count: int, of: int) -> list[int]:
    """Choose blocks evenly over the depth."""
    return [
        index
        for index in range(of)
        if (2 * (index + 1) * count + of) // (2 * of) > (2 * index * count + of) // (2 * of)
    ]


def _device_map(model: Any, case: Case, device: torch.device) -> dict[str, Any]:
    away = set(offloaded_blocks(case.offloaded, len(model.model.layers)))
    here: int | str = device.index or 0 if device.type == "cuda" else "cpu"
    beside = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    blocks = {f"model.layers.{n}": "cpu" if n in away else here for n in range(len(model.model.layers))}
    return dict.fromkeys(beside, here) | blocks


def _with_bigload(folder: Path, case: Case, device: torch.device) -> Any:
    from bigload import BnbQuantizationConfig, load_and_quantize_model

    model = build(folder)
    config: Any = {"load_in_4bit": True, "skip_modules": ["*"], "torch_dtype": "auto", "bnb_4bit_compute_dtype": "auto"}
    if case.mode != "none":
        config = BnbQuantizationConfig.from_mode(case.mode, llm_int8_enable_fp32_cpu_offload=case.in_fp32)
    device_map = _device_map(model, case, device)
    return load_and_quantize_model(model, config, folder, device_map=device_map, progress=False)


def _with_accelerate(folder: Path, case: Case, device: torch.device) -> Any:
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    device_map = _device_map(model, case, device)
    if case.mode == "none":
        return load_checkpoint_and_dispatch(model, folder, device_map=device_map, dtype=torch.bfloat16)
    config = BnbQuantizationConfig(load_in_8bit=True, torch_dtype=torch.float16)
    return load_and_quantize_model(model, config, str(folder), device_map=device_map)


_LOADERS: dict[str, Callable[[Path, Case, torch.device], Any]] = {
    "bigload": _with_bigload,
    "accelerate": _with_accelerate,
}

# What the result in benchmarks/results/ has, for a model of 32 blocks.
CASES = (
    Case("bigload", "nf4", 0),
    Case("bigload", "nf4", 22),
    Case("bigload", "nf4", 32),
    Case("bigload", "int8", 0),
    Case("bigload", "int8", 22),
    Case("accelerate", "int8", 22),
    Case("bigload", "none", 0),
    Case("bigload", "none", 16),
    Case("accelerate", "none", 16),
    Case("bigload", "int8", 2, in_fp32=True),
)
