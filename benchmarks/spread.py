"""Times a model that is spread over several GPUs against the same model on one of them."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .checkpoints import build
from .files import shards, total_bytes, warm
from .floors import read_and_copy_s
from .limits import describe_machine, measure_limits
from .offload import begin, step_seconds, timed

_LATER = 5  # loads after the first
_LINK_BYTES = 256 * 2**20
_COPIES = 8


def measure_spread(folder: Path, devices: Sequence[str], mode: str, commit: str | None) -> Iterator[dict[str, Any]]:
    """Load onto the first device, then evenly over all of them, each six times, and run one token.

    Args:
        folder: a Llama's checkpoint in 16 bit.
        devices: GPUs; or "cpu" alone, where nothing but that it runs is of interest.
        mode: as `load` takes it.
        commit: bigload's; by default what git says.

    Yields:
        The result so far, as docs/benchmarks.md explains it.
    """
    warm(shards(folder))
    places = [torch.device(device) for device in devices]
    for place in places:
        begin(place)
    limits = measure_limits(folder, devices[0])
    reading = max(limits["page_cache_gb_per_s"].values())
    result: dict[str, Any] = {
        "benchmark": "spread",
        "checkpoint": folder.name,
        **describe_machine(devices[0], commit),
        "limits": limits,
        "rows": [],
    }
    logits: list[torch.Tensor] = []
    for count in dict.fromkeys((1, len(devices))):
        link = _links_gb_per_s(places[:count]) if places[0].type == "cuda" else None
        row = _measured(folder, devices[:count], mode, logits)
        together = read_and_copy_s(shards(folder), count) if link else {}
        floor_s = total_bytes(shards(folder)) / min(reading, link or reading) / 1e9
        row["floor_s"] = round(min(together.values(), default=floor_s), 4)
        result["rows"].append({"devices": count, "mode": mode, "links_gb_per_s": link and round(link, 2), **row})
        yield result


def _measured(folder: Path, devices: Sequence[str], mode: str, logits: list[torch.Tensor]) -> dict[str, Any]:
    from bigload import load_and_quantize_model

    first = torch.device(devices[0])
    on_gpu = first.type == "cuda"
    seconds = []
    for _ in range(1 + _LATER):
        model: Any = build(folder)
        gc.collect()
        device_map = "balanced" if len(devices) > 1 else devices[0]
        budgets: dict[int | str | torch.device, int | str] = dict.fromkeys(devices, "70GiB")
        with timed(on_gpu) as load:
            model = load_and_quantize_model(
                model,
                mode,
                folder,
                device_map=device_map,
                max_memory=budgets if len(devices) > 1 else None,
                progress=False,
            ).eval()
        seconds.append(load())
    best, median = step_seconds(model, 1, first)
    with torch.no_grad():
        logits.append(model(torch.arange(64, device=first).view(1, -1)).logits.cpu())
    return {
        "used": len(set(model.hf_device_map.values())),
        "first_s": round(seconds[0], 4),
        "second_s": round(statistics.median(seconds[1:]), 4),
        "later_s": [round(each, 4) for each in seconds[1:]],
        "step_1_s": round(best, 5),
        "step_1_median_s": round(median, 5),
        "is_bit_equal_to_one": torch.equal(logits[0], logits[-1]),
    }


def _links_gb_per_s(devices: Sequence[torch.device]) -> float:
    """Measure the copies onto all of some GPUs at once, together."""
    source = torch.empty(_LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    targets = [torch.empty(_LINK_BYTES, dtype=torch.uint8, device=device) for device in devices]
    best_s = float("inf")
    for _ in range(5):
        for device in devices:
            torch.cuda.synchronize(device)
        with timed(on_gpu=False) as seconds:
            for _ in range(_COPIES):
                for target in targets:
                    target.copy_(source, non_blocking=True)
            for device in devices:
                torch.cuda.synchronize(device)
        best_s = min(best_s, seconds())
    return _COPIES * len(devices) * _LINK_BYTES / best_s / 1e9
