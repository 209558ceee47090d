"""CUDA graphs: warmed up and captured on a stream of their own, with memory of one pool, and ended when one fails."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

import torch

from ..hardware.collector import without_collections

_T = TypeVar("_T")
# The allocator of pinned memory goes on asking a graph whose capture failed whether it is capturing: it is not freed.
_failed: list[Any] = []
# One capture at a time in a process: each begins with a wait for the device, which would end another one.
_one_at_a_time = threading.Lock()


class Graph(Protocol):
    """What has been captured."""

    def replay(self) -> None:
        """Run it on the current stream, with the memory that it was captured with."""

    def reset(self) -> None:
        """Free it."""


class Graphs(Protocol):
    """Captures what is launched on a device. Tests have one that needs no GPU."""

    device: torch.device

    def warming_up(self) -> Any:
        """Return a context in which a step runs as before, on the stream that captures it afterwards."""

    def capture(self, step: Callable[[], _T]) -> tuple[Graph, _T]:
        """Capture a step, which is launched but not run; return its graph, and what it returned."""

    def follow(self) -> None:
        """Order what is launched from now on after the last replay."""

    def allocated(self) -> int:
        """Return the bytes that are reserved on the device."""


class CudaGraphs:
    """Captures on one GPU. The graphs share a pool of memory, since only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        self._last: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._live: weakref.WeakSet[Any] = weakref.WeakSet()

    def _side_stream(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return self._stream

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """Run a step on the side stream: libraries allocate there what they need for a stream when it first runs."""
        with torch.cuda.device(self.device):
            stream, current = self._side_stream(), torch.cuda.current_stream(self.device)
            stream.wait_stream(current)
            try:
                with torch.cuda.stream(stream):
                    yield
            finally:
                current.wait_stream(stream)

    def capture(self, step: Callable[[], _T]) -> tuple[Graph, _T]:
        """Capture a step.

        Raises:
            RuntimeError: something in it cannot be captured, such as a wait of the host for the GPU.
            torch.OutOfMemoryError: there is no room for what it computes.
        """
        # To collect garbage may free a graph of a model that is no more, which ends a capture in the same thread.
        with _one_at_a_time, without_collections(), torch.cuda.device(self.device):
            if not self._live:
                self._pool = torch.cuda.graph_pool_handle()  # that of graphs that are no more cannot be used again
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize(self.device)
            with torch.cuda.stream(self._side_stream()):
                try:
                    # The work of other threads may go on: it would end a capture of the usual mode.
                    graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                    out = step()
                    graph.capture_end()
                except BaseException:  # Ctrl-C too
                    self._abandon(graph)
                    raise
        self._live.add(graph)
        return _CapturedGraph(graph, self), out

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that failed. torch does so by halves: its allocator would think that it goes on."""
        with suppress(RuntimeError):
            graph.capture_end()
        try:
            graph.pool()  # raises unless the capture has ended in order
        except RuntimeError:
            _failed.append(graph)
            index = torch.cuda.current_device()
            for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
                with suppress(RuntimeError, AttributeError):
                    getattr(torch._C, name)(index, self._pool)
            with suppress(RuntimeError):
                graph.reset()
            with suppress(RuntimeError):
                torch.cuda.synchronize(self.device)
            _revive_generator(index)
        with suppress(RuntimeError):
            graph.reset()
        for _ in range(2):  # an error of the capture, if one is left, shows here and is then forgotten
            with suppress(RuntimeError):
                torch.cuda.synchronize(self.device)
        if not self._live:
            self._pool = None

    def follow(self) -> None:
        """Have the current stream wait for the last one, if that is another."""
        current = torch.cuda.current_stream(self.device)
        if self._last is not None and self._last != current:
            current.wait_stream(self._last)
        self._last = current

    def allocated(self) -> int:
        """Return the bytes that torch has reserved on the GPU."""
        return torch.cuda.memory_reserved(self.device)


def _revive_generator(index: int) -> None:
    """Let random numbers be drawn again: until torch 2.12, the generator would think that the capture goes on."""
    with suppress(RuntimeError, AttributeError, IndexError):
        generator = torch.cuda.default_generators[index]
        before = generator.get_state()
        try:
            torch.empty(1, device=f"cuda:{index}").uniform_(generator=generator)
        except RuntimeError:
            generator.graphsafe_set_state(generator.clone_state())
        generator.set_state(before)


class _CapturedGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, graphs: CudaGraphs) -> None:
        self._graph, self._graphs = graph, graphs
        self.replay = graph.replay

    def reset(self) -> None:
        """Free the graph when the GPU has run it."""
        self._graphs._live.discard(self._graph)
        last = self._graphs._last
        if last is not None:
            last.synchronize()
        self._graph.reset()


def graphs_on(device: torch.device) -> Graphs | None:
    """Return what captures on a device; None for one that has no graphs."""
    return CudaGraphs(device) if device.type == "cuda" and not torch.version.hip else None
