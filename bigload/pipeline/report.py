"""The figures of a load: bytes, seconds and peak memory."""

from __future__ import annotations

import ctypes
import functools
import resource
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import psutil
import torch

from ..io.timeline import STAGES, Span
from ..notation import html_table, show


class _Spans:
    """The attribute `timeline` of a report: given as spans, or as a function that is called when it is first read."""

    def __get__(self, report: LoadReport | None, owner: type) -> Any:
        if report is None:
            return self
        held = vars(report)["timeline"]
        if callable(held):
            held = vars(report)["timeline"] = held()
        return held

    def __set__(self, report: LoadReport, spans: object) -> None:
        vars(report)["timeline"] = () if spans is self else spans  # itself is the default


_SPANS: Any = _Spans()


@dataclass(frozen=True)
class LoadReport:
    """The figures of one load.

    Attributes:
        mode: the quantization mode's short name.
        bytes_read: bytes of the weights that were loaded, from the checkpoint or from the model itself.
        elapsed_s: seconds that the call took, without the import of bitsandbytes.
        device_bytes: bytes of the loaded model on each device.
        peak_bytes: the most memory that the load held on each device at once, including the model: for a GPU what torch
            allocated, for "cpu" the resident memory. A device whose peak cannot be known is left out, for example if
            the process had used more of it before the load.
        source: the folder of the checkpoint, if one was named.
        timeline: what was done when: the plan, waits for files, copies to GPUs, quantizing. Computed when first read.

    Examples:
        >>> import torch
        >>> from bigload.io.timeline import Span
        >>> from bigload.pipeline.report import LoadReport
        >>> cpu = torch.device("cpu")
        >>> spans = Span("plan", cpu, 0.0, 0.25), Span("read", cpu, 0.25, 0.375), Span("read", cpu, 0.4, 0.525)
        >>> report = LoadReport("nf4", 2 * 10**9, 0.5, {cpu: 2**29}, timeline=spans)  # as model.load_report is
        >>> report
        LoadReport(read 2.000 GB in 0.50 s at 4.00 GB/s into 512.00 MiB on cpu as nf4)
        >>> report.gb_per_s, report.nbytes
        (4.0, 536870912)
        >>> report.stage_s
        {'plan': 0.25, 'read': 0.25}
    """

    mode: str
    bytes_read: int
    elapsed_s: float
    device_bytes: dict[torch.device, int] = field(default_factory=dict)
    peak_bytes: dict[torch.device, int] = field(default_factory=dict)
    source: Path | None = None
    timeline: tuple[Span, ...] = field(default=_SPANS, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and pickled: the spans, not the events of CUDA that they follow from."""
        return {**vars(self), "timeline": self.timeline}

    @property
    def stage_s(self) -> dict[str, float]:
        """Seconds of each stage: "plan", "read" (waiting for files), "copy", "quantize"; on all devices together."""
        total = {stage: 0.0 for stage in STAGES if any(span.stage == stage for span in self.timeline)}
        for span in self.timeline:
            total[span.stage] += span.end_s - span.begin_s
        return total

    @property
    def gb_per_s(self) -> float:
        """Checkpoint bytes per second, in units of 10^9."""
        return self.bytes_read / self.elapsed_s / 1e9

    @property
    def nbytes(self) -> int:
        """Bytes of the loaded model on all devices."""
        return sum(self.device_bytes.values())

    def __str__(self) -> str:
        placed = ", ".join(f"{show(count)} on {device}" for device, count in self.device_bytes.items())
        speed = f"read {self.bytes_read / 1e9:.3f} GB in {self.elapsed_s:.2f} s at {self.gb_per_s:.2f} GB/s"
        peaks = ", ".join(f"{show(count)} on {device}" for device, count in self.peak_bytes.items())
        how = "" if self.mode == "none" else f" as {self.mode}"
        return f"{speed} into {placed}{how}" + (f", peak {peaks}" if peaks else "")

    def __repr__(self) -> str:
        return f"LoadReport({self})"

    def _repr_html_(self) -> str:
        places = dict.fromkeys([*self.device_bytes, *self.peak_bytes])
        rows = [("device", "model", "most while it was loaded")]
        for place in places:
            peak = show(self.peak_bytes[place]) if place in self.peak_bytes else "-"
            rows.append((str(place), show(self.device_bytes.get(place, 0)), peak))
        stages = [("stage", "time"), *((stage, f"{seconds:.3f} s") for stage, seconds in self.stage_s.items())]
        return f"<div>{escape(str(self))}</div>{html_table(rows)}" + (html_table(stages) if self.timeline else "")


class PeakMemory:
    """The peak memory of devices from its creation on, measured without resetting torch's statistics."""

    def __init__(self, model_bytes: Mapping[torch.device, int], held_bytes: Mapping[torch.device, int]) -> None:
        """Begin to watch the devices, and the CPU in any case.

        Args:
            model_bytes: of the loaded model, on each device.
            held_bytes: of weights that become part of it and are there already: they count as the load's.
        """
        self._model_bytes = model_bytes
        self._before: dict[torch.device, tuple[int, int]] = {}
        for device in dict.fromkeys([*model_bytes, torch.device("cpu")]):
            known = _used_and_highest(device)
            if known is not None:
                self._before[device] = known[0] - held_bytes.get(device, 0), known[1]

    def since(self) -> dict[torch.device, int]:
        """Return the peak of each device in bytes, above what was in use at the start.

        A device is left out if the system does not tell, or if its peak since then is below an earlier peak of the
        process, or below the bytes of the model, so that it cannot be right: memory that was freed before has been used
        again, unnoticed.
        """
        peaks = {}
        for device, (used, highest) in self._before.items():
            now = _highest(device) or 0
            if now > highest and now - used >= self._model_bytes.get(device, 0):
                peaks[device] = max(0, now - used)
        return peaks


def _used_and_highest(device: torch.device) -> tuple[int, int] | None:
    if device.type == "cuda":
        stats = torch.cuda.memory_stats_as_nested_dict(device)  # the flat ones take ten times as long
        allocated = stats.get("allocated_bytes", {}).get("all", {})
        return allocated.get("current", 0), allocated.get("peak", 0)
    try:
        return psutil.Process().memory_info().rss - _freed_but_kept(), _highest_resident()
    except (OSError, psutil.Error):  # as where the process may open no more files
        return None


def _highest(device: torch.device) -> int | None:
    if device.type == "cpu":
        return _highest_resident()  # what is in use takes longer: the C library looks through all that it keeps
    known = _used_and_highest(device)
    return None if known is None else known[1]


def _highest_resident() -> int:
    """Return the peak of the process's resident memory in bytes."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # On Linux this would begin with the peak of the process that started this one.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _MallInfo(ctypes.Structure):
    """The C library's `struct mallinfo2`."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    ]


def _freed_but_kept() -> int:
    """Return the bytes that the C library keeps for its next allocations: a load uses them again."""
    ask = _mallinfo()
    return 0 if ask is None else int(ask().fordblks)


@functools.cache
def _mallinfo() -> ctypes._NamedFuncPointer | None:
    try:
        found = ctypes.CDLL(None).mallinfo2  # glibc 2.33 and later
    except (AttributeError, OSError):
        return None
    found.restype = _MallInfo
    return found
