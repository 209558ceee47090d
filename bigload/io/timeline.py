"""When a load read, copied and quantized, so that one can see which of them took the time."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

# The stages, in their order.
STAGES = ("plan", "read", "copy", "quantize")
# Shorter spans are left out.
_SHORTEST_S = 1e-5


@dataclass(frozen=True, slots=True)
class Span:
    """What one stage did at one time.

    Attributes:
        stage: "plan": the plan was made; "read": the load waited for bytes of a file, which are read ahead; "copy":
            they were copied to a GPU; "quantize": their values were cast, quantized and put into the model's tensors.
        device: where the values go.
        begin_s: seconds from the beginning of the load.
        end_s: the same.
    """

    stage: str
    device: torch.device
    begin_s: float
    end_s: float


class Timeline:
    """Collects what a load's spans follow from, and computes them only when they are asked for.

    On a GPU it keeps events that the streams happen to reach: to ask when each of thousands was takes 10 ms.
    """

    def __init__(self, begun: float | None = None) -> None:
        """Begin now, or at a value of `time.perf_counter`."""
        self._begun = time.perf_counter() if begun is None else begun
        self._spans: list[tuple[str, torch.device, float, float]] = []
        # By device: when bytes were read, or copied, and when the stage was done with them.
        self._copies: dict[torch.device, list[tuple[float, torch.cuda.Event]]] = {}
        self._work: dict[torch.device, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}
        # By device: an event of a known time.
        self._known: dict[torch.device, tuple[float, torch.cuda.Event]] = {}

    def add(self, stage: str, device: torch.device, begin: float) -> None:
        """Add what began at a value of `time.perf_counter` and ends now, unless it is too short to be seen."""
        now = time.perf_counter()
        if now - begin > _SHORTEST_S:
            self._spans.append((stage, device, begin, now))

    def add_copy(self, device: torch.device, begin: float, copied: torch.cuda.Event) -> None:
        """Add a copy of what has been read since a value of `time.perf_counter`."""
        self._copies.setdefault(device, []).append((begin, copied))

    def add_work(self, device: torch.device, copied: torch.cuda.Event, worked: torch.cuda.Event) -> None:
        """Add the work between two events on values that were copied."""
        self._work.setdefault(device, []).append((copied, worked))

    @property
    def elapsed_s(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._begun

    def end(self) -> None:
        """Compare the clocks of the GPUs, which must be idle, with the host's; before `spans`."""
        for device in {**self._copies, **self._work}:
            now = timed_event()
            now.record(torch.cuda.default_stream(device))
            self._known[device] = time.perf_counter(), now

    def spans(self) -> tuple[Span, ...]:
        """Return all spans by their beginnings."""
        begun = self._begun
        found = [Span(stage, device, begin - begun, end - begun) for stage, device, begin, end in self._spans]
        for device in self._known:
            found += self._spans_on_gpu(device)
        return tuple(sorted(found, key=lambda span: span.begin_s))

    def _spans_on_gpu(self, device: torch.device) -> list[Span]:
        known_s, known = self._known[device]
        known.synchronize()

        def at(event: torch.cuda.Event) -> float:
            return known_s - self._begun - float(event.elapsed_time(known)) / 1000

        found, last_s = list[Span](), 0.0
        for read, copied in self._copies.get(device, ()):  # one after the other, on one stream
            begin_s, end_s = max(last_s, read - self._begun), at(copied)
            last_s = max(last_s, end_s)
            found.append(Span("copy", device, min(begin_s, end_s), end_s))
        last_s = 0.0
        for copied, worked in self._work.get(device, ()):
            begin_s, end_s = max(last_s, at(copied)), at(worked)
            last_s = max(last_s, end_s)
            found.append(Span("quantize", device, min(begin_s, end_s), end_s))
        return found


def timed_event() -> torch.cuda.Event:
    """Return an event of CUDA that knows when it happened."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def plain_event() -> torch.cuda.Event:
    """Return an event of CUDA that streams are ordered by."""
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
