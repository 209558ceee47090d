"""Times forwards of models of which part rests off the GPU, against the link that is measured in the same run."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from .checkpoints import build
from .files import shards, warm
from .limits import describe_machine

TOKENS = (1, 16, 512, 2048)
GENERATED = 64
_REPEATS = 15
_ENOUGH, _ENOUGH_S = 5, 3.0


@dataclass(frozen=True)
class Case:
    """One model to time.

    Attributes:
        peer: "bigload", "accelerate" or "transformers".
        mode: as `load` takes it.
        offloaded: how many of the blocks rest off the GPU.
        where: "cpu", "disk", or "fp32": on the CPU, which computes them in float32.
    """

    peer: str
    mode: str
    offloaded: int
    where: str = "cpu"


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
    from bigload.hardware.bandwidth import link_gb_per_s

    warm(shards(folder))
    place = torch.device(device)
    begin(place)
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
            with TemporaryDirectory(dir=folder.parent) as cache:
                row = _measured(folder, case, place, link, Path(cache))
        except Exception as error:  # a peer that cannot do it is a result too
            row = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        result["rows"].append({**vars(case), **row})
        gc.collect()
        yield result


def begin(device: torch.device) -> None:
    """Do what a process does once: no load shall pay for it."""
    import bitsandbytes
    import transformers.models.llama.modeling_llama  # noqa: F401

    layer = bitsandbytes.nn.Linear4bit(64, 64, device=device)
    layer.to(device)(torch.zeros(1, 64, device=device))


def _measured(folder: Path, case: Case, device: torch.device, link: float | None, cache: Path) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if case.where == "disk":  # what is timed finds the files
        _LOADERS[case.peer](folder, case, device, cache)
        gc.collect()
    with timed(on_gpu) as load:
        model = _LOADERS[case.peer](folder, case, device, cache).eval()
    row: dict[str, Any] = {"load_s": round(load(), 3)}
    streamed = model.offload.plan.streamed_bytes if hasattr(model, "offload") else 0
    row["streamed_bytes"] = streamed
    for tokens in TOKENS if case.peer == "bigload" else TOKENS[:1]:
        seconds, median = step_seconds(model, tokens, device)
        row |= {f"step_{tokens}_s": round(seconds, 5), f"step_{tokens}_median_s": round(median, 5)}
        if streamed and link and tokens == 1:
            row["streamed_gb_per_s"] = round(streamed / seconds / 1e9, 2)
            row["share_of_link"] = round(streamed / seconds / 1e9 / link, 3)
    row |= _memory("gpu_peak", torch.cuda.max_memory_allocated) if on_gpu else {}
    if case.peer == "bigload":
        _generate_seconds(model, device)  # kernels are loaded when a length first needs them
        row |= _memory("gpu_held", torch.cuda.memory_allocated) if on_gpu else {}
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        row["token_s"] = round(_generate_seconds(model, device) / GENERATED, 5)
    if on_gpu and case.peer == "bigload":
        row |= _memory("gpu_peak_generating", torch.cuda.max_memory_allocated)
        row |= _memory("gpu_held_after", torch.cuda.memory_allocated)
        if hasattr(model, "offload"):
            row |= _memory("gpu_planned", lambda: _planned(model, device))
    return row


def _memory(name: str, nbytes: Callable[[], int]) -> dict[str, float]:
    return {f"{name}_gib": round(nbytes() / 2**30, 4)}


def _planned(model: Any, device: torch.device) -> int:
    """Tell what the plan says that the GPU needs, with what is kept for activations."""
    return next(account.needed for account in model.offload.plan.accounts if account.place == device)


@contextmanager
def timed(on_gpu: bool) -> Iterator[Callable[[], float]]:
    """Time a block; gives what tells the seconds of it, once it is over."""
    begun = ended = time.perf_counter()
    yield lambda: ended - begun
    if on_gpu:
        torch.cuda.synchronize()
    ended = time.perf_counter()


def step_seconds(model: Any, tokens: int, device: torch.device) -> tuple[float, float]:
    """Time a forward: the best of fifteen, as the link's is, and the median, after two that are not counted.

    Where they take seconds, five are enough.
    """
    ids = torch.arange(tokens, device=device).view(1, -1) % model.config.vocab_size
    times: list[float] = []
    with torch.no_grad():
        while len(times) < 2 + _REPEATS and not (len(times) >= 2 + _ENOUGH and sum(times) > _ENOUGH_S):
            with timed(device.type == "cuda") as seconds:
                model(ids, use_cache=False, logits_to_keep=1)
            times.append(seconds())
    return min(times[2:]), statistics.median(times[2:])


def _generate_seconds(model: Any, device: torch.device) -> float:
    ids = torch.arange(16, device=device).view(1, -1)
    with torch.no_grad(), timed(device.type == "cuda") as seconds:
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
    """Choose blocks evenly over the depth.

    Raises:
        SystemExit: there are not so many.
    """
    if count > of:
        raise SystemExit(f"{count} blocks cannot rest off the GPU: the model has {of}")
    return [
        index
        for index in range(of)
        if (2 * (index + 1) * count + of) // (2 * of) > (2 * index * count + of) // (2 * of)
    ]


def _device_map(model: Any, case: Case, device: torch.device) -> dict[str, Any]:
    away = set(offloaded_blocks(case.offloaded, len(model.model.layers)))
    here: int | str = device.index or 0 if device.type == "cuda" else "cpu"
    beside = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    home = "disk" if case.where == "disk" else "cpu"
    blocks = {f"model.layers.{n}": home if n in away else here for n in range(len(model.model.layers))}
    return dict.fromkeys(beside, here) | blocks


def _with_bigload(folder: Path, case: Case, device: torch.device, cache: Path) -> Any:
    from bigload import BnbQuantizationConfig, load_and_quantize_model

    model = build(folder)
    config: Any = {"load_in_4bit": True, "skip_modules": ["*"], "torch_dtype": "auto", "bnb_4bit_compute_dtype": "auto"}
    if case.mode != "none":
        options: dict[str, Any] = {"llm_int8_enable_fp32_cpu_offload": case.where == "fp32"}
        if case.mode == "int8":  # which bitsandbytes computes in float16, and warns of all else whenever a layer runs
            options["torch_dtype"] = torch.float16
        config = BnbQuantizationConfig.from_mode(case.mode, **options)
    device_map = _device_map(model, case, device)
    return load_and_quantize_model(model, config, folder, device_map=device_map, offload_folder=cache, progress=False)


def _with_transformers(folder: Path, case: Case, device: torch.device, cache: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if case.mode != "none":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=case.where == "fp32")
        options = {"dtype": torch.float16, "quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(folder, device_map=_device_map(shape, case, device), **options)


def _with_accelerate(folder: Path, case: Case, device: torch.device, cache: Path) -> Any:
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


_LOADERS: dict[str, Callable[[Path, Case, torch.device, Path], Any]] = {
    "bigload": _with_bigload,
    "accelerate": _with_accelerate,
    "transformers": _with_transformers,
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
    Case("transformers", "none", 16),
    Case("bigload", "int8", 2, "fp32"),
    Case("transformers", "int8", 2, "fp32"),
    Case("bigload", "nf4", 32, "disk"),
)
