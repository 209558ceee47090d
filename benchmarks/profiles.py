"""Where the seconds of a load go, part by part: what is hidden behind the reads, and what is not."""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from .limits import describe_machine
from .one import _context
from .peers import PEERS

# Parts by name: the module and the function or method whose calls are timed. Those with a dot lie within "deliver".
PARTS = {
    "open": ("bigload.loading", "load_request"),
    "plan": ("bigload.loading", "plan_load"),
    "execute": ("bigload.loading", "execute"),
    "deliver": ("bigload.pipeline.execute", "read_all"),
    "deliver.quantize": ("bigload.pipeline.sinks", "QuantizeSink.take"),
    "deliver.finish": ("bigload.pipeline.execute", "_Loader._finish"),
    "commit": ("bigload.pipeline.assembly", "Assembly.commit"),
}


def measure_profile(
    folder: Path, modes: Sequence[str], device: str, loads: int, commit: str | None
) -> Iterator[dict[str, Any]]:
    """Load again and again with a clock around each part.

    Args:
        folder: the checkpoint.
        modes: of `peers.MODES`.
        device: "cpu" or "cuda:N".
        loads: how many of each mode, after the first, which is told apart.
        commit: bigload's; by default what git says.

    Yields:
        The result so far: a row for each mode with the medians of the seconds of each part, and of all.
    """
    result = {"benchmark": "profile", "checkpoint": folder.name, **describe_machine(device, commit), "rows": []}
    _context(device)
    peer = PEERS["bigload"]
    for mode in modes:
        found: list[dict[str, float]] = []
        for _ in range(1 + loads):
            assert peer.build is not None
            model = peer.build(folder)
            gc.collect()
            with _timed_parts() as seconds:
                begun = time.perf_counter()
                loaded = peer.load(model, folder, mode, device)
                if device != "cpu":
                    torch.cuda.synchronize()
                seconds["all"] = time.perf_counter() - begun
            del model, loaded
            found.append({**seconds, "prepare": seconds["execute"] - seconds["deliver"]})
        names = ("all", "open", "plan", "prepare", "deliver", "deliver.quantize", "deliver.finish", "commit")
        row: dict[str, Any] = {name: _median(found[1:], name) for name in names}
        result["rows"].append({"mode": mode, **row, "first": {name: _median(found[:1], name) for name in names}})
        yield result


def _median(loads: Sequence[Mapping[str, float]], name: str) -> float:
    return round(statistics.median(one.get(name, 0.0) for one in loads), 5)


@contextmanager
def _timed_parts() -> Iterator[dict[str, float]]:
    seconds: dict[str, float] = {}
    with ExitStack() as patches:
        for name, (module, attribute) in PARTS.items():
            place = f"{module}.{attribute}"
            owner: Any = functools.reduce(getattr, attribute.split(".")[:-1], import_module(module))
            call = getattr(owner, attribute.split(".")[-1])
            patches.enter_context(mock.patch(place, _timed(call, name, seconds)))
        yield seconds


def _timed(call: Callable[..., Any], name: str, seconds: dict[str, float]) -> Callable[..., Any]:
    @functools.wraps(call)
    def timed(*args: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        try:
            return call(*args, **options)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begun

    return timed
