"""Reads tensors by threads that need no interpreter's lock, and hands them over in batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext

import torch

from ..hardware.devices import current_gpu
from .extents import ReadTask
from .feed import Feed, Lane
from .program import Batch, Window, lay_out
from .ring import reader_threads, slot_bytes, take_ring
from .staging import BUFFER_BYTES
from .timeline import Timeline

# What a GPU's copies of several threads pass through at once: small, so that the first copy begins early.
_READ_BYTES = 4 * 2**20
# Batches that a window has room for: one that is worked on, one that is there, one that arrives.
_LIVE = 3


def deliver(tasks: Sequence[ReadTask], on_bytes: Callable[[int], object], timeline: Timeline) -> None:
    """Read tensors and move them to their devices, as `transfer.read_all` says."""
    devices = list(dict.fromkeys(task.device for task in tasks))
    on_gpu = any(device.type == "cuda" for device in devices)
    with ExitStack() as stack:
        ring = stack.enter_context(take_ring(pinned=True)) if on_gpu else None
        windows, memories = {}, {}
        for device in devices:
            needs = any(task.home is None for task in tasks if task.device == device)
            batch_bytes = BUFFER_BYTES if device.type == "cuda" else slot_bytes()
            memory = torch.empty(_LIVE * batch_bytes if needs else 0, dtype=torch.uint8, device=device)
            memories[device] = memory
            windows[device] = Window(memory.data_ptr(), len(memory), batch_bytes)
        program, lanes = lay_out(tasks, windows), [Lane(device) for device in devices]
        for lane in lanes:
            if lane.copy is not None:
                lane.copy.wait_stream(
                    lane.work
                )  # memory of homes and windows may still be worked on as another tensor's
        at_once = min(_READ_BYTES, slot_bytes() if ring is None else ring.slot_bytes)
        feed = Feed(program, lanes, None if ring is None else ring.memory, at_once, reader_threads())
        try:
            with feed:
                for batch in feed.batches():
                    with nullcontext() if batch.device.type == "cpu" else current_gpu(batch.device):
                        feed.take(batch)
                        _work_on(batch, memories[batch.device], timeline)
                        feed.done()
                    on_bytes(batch.nbytes)
        finally:
            for lane in lanes:
                if lane.copy is not None:
                    lane.work.wait_stream(lane.copy)
            if ring is not None:
                ring.is_quiet = feed.is_done


def _work_on(batch: Batch, window: torch.Tensor, timeline: Timeline) -> None:
    begun = time.perf_counter()
    for task, begin, count, at in batch.pieces:
        if at is not None:
            dtype = task.tensor.dtype
            task.take(window[at : at + count * dtype.itemsize].view(dtype), begin)
        task.arrived(count)
    timeline.add("quantize", batch.device, begun)
