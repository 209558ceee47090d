"""Copies of single experts into memory on the device, ordered by CUDA streams and events."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...hardware.pinned import Store, pinned_memory
from .slots import CudaSlotCopier, Slice, copy_slices, read_slices


class ExpertCopies:
    """Copies slices into one memory in host memory, synchronously."""

    def make_table(self, experts: int) -> torch.Tensor:
        """Return a table to be filled and copied: (experts,), int32, in host memory."""
        return torch.zeros(experts, dtype=torch.int32, device="cpu")

    def finish(self) -> None:
        """Wait until the table may be written to."""

    def copy(self, store: Store, slices: Sequence[Slice], table: torch.Tensor, target: torch.Tensor) -> None:
        """Begin to copy slices, and the table.

        Args:
            store: the slices' store.
            slices: what to copy.
            table: from `make_table`.
            target: where the table goes.

        Raises:
            OffloadError: a file cannot be read.
        """
        read_slices(store, slices)
        target.copy_(table)

    def await_copies(self) -> None:
        """Let what is computed from here on wait for the copies so far."""

    def discard(self, memory: torch.Tensor) -> None:
        """Let the memory that was copied into be freed as soon as the copies and computations with it are done."""


class CudaExpertCopies(ExpertCopies):
    """Copies slices into one memory on a GPU, on a stream that only copies; the host waits for nothing but files."""

    def __init__(self, copier: CudaSlotCopier) -> None:
        """Copy on a copier's stream; the memory has just been allocated on the current one."""
        self._device, self._stream, self._staging = copier.device, copier.stream, copier.staging
        self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._events: dict[int, torch.cuda.Event] = {}
        # The streams that have waited for the latest copies, and so may use the memory. The current one may still use a
        # tensor that had it before.
        current = torch.cuda.current_stream(self._device)
        self._streams: dict[int, torch.cuda.Stream] = {current.cuda_stream: current}

    def make_table(self, experts: int) -> torch.Tensor:
        """Pin it."""
        return pinned_memory(4 * experts).view(torch.int32).zero_()

    def finish(self) -> None:
        """Wait for the copies."""
        self._ready.synchronize()

    def copy(self, store: Store, slices: Sequence[Slice], table: torch.Tensor, target: torch.Tensor) -> None:
        """Begin to copy when all that was computed with the memory so far is done."""
        for number, stream in self._streams.items():
            event = self._events.get(number)
            if event is None:
                event = self._events[number] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
            self._stream.wait_event(event)
        with torch.cuda.stream(self._stream):
            copy_slices(store, slices, self._stream, self._staging)
            target.copy_(table, non_blocking=True)
            self._ready.record(self._stream)
        self._streams.clear()

    def await_copies(self) -> None:
        """Let the current stream wait for them, once."""
        current = torch.cuda.current_stream(self._device)
        if current.cuda_stream in self._streams:
            return
        # Added first, so that the next copies wait for the stream whatever happens here.
        self._streams[current.cuda_stream] = current
        try:
            current.wait_event(self._ready)
        except BaseException:
            self._streams.pop(current.cuda_stream, None)
            raise

    def discard(self, memory: torch.Tensor) -> None:
        """Let torch's allocator wait for the streams that have used it; earlier ones, the copies have waited for."""
        for stream in (self._stream, *self._streams.values()):
            memory.record_stream(stream)
