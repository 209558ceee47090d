"""The ring of host memory that what is read passes through: made once, pinned for GPUs, kept for the next load."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from ..errors import ConfigError
from ..hardware.pinned import pinned_memory
from ..sizes import parse_size

logger = logging.getLogger(__name__)

SLOT_BYTES = 16 * 2**20
# Small, so that much of it stays in the CPU's cache on its way from the reads to the copies: 256 MiB were slower.
RING_BYTES = 128 * 2**20


def reader_threads() -> int:
    """Threads that read: the cores, but no more than 16.

    The environment variable BIGLOAD_THREADS says otherwise.

    Raises:
        ConfigError: it holds no number from 1 on.
    """
    asked = os.environ.get("BIGLOAD_THREADS")
    if asked is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
        return max(2, min(16, cores))
    if not asked.isdecimal() or int(asked) < 1:
        raise ConfigError(f"BIGLOAD_THREADS is {asked!r}; expected a number of threads, 1 or more")
    return int(asked)


def ring_bytes() -> int:
    """Bytes of the ring: what a load needs of host memory, beside what stays there.

    The environment variable BIGLOAD_RING_BYTES says otherwise.

    Raises:
        ConfigError: it holds no size from 1 KiB on.
    """
    asked = os.environ.get("BIGLOAD_RING_BYTES")
    if asked is None:
        return RING_BYTES
    try:
        size = parse_size(int(asked) if asked.isdecimal() else asked)
    except ValueError as error:
        raise ConfigError(f"BIGLOAD_RING_BYTES is {asked!r}; expected bytes, or a size such as '256MiB'") from error
    if size < 2**10:
        raise ConfigError(f"BIGLOAD_RING_BYTES is {asked!r}; it takes 1 KiB at least")
    return size


def slot_bytes(ring: int | None = None) -> int:
    """Bytes of one slot, the most that is read at once: 16 MiB, or less that a small ring has two."""
    nbytes = ring_bytes() if ring is None else ring
    return int(min(SLOT_BYTES, 2 ** ((nbytes // 2).bit_length() - 1)))


class Ring:
    """Slots of equal size in one piece of host memory."""

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        """Allocate the slots, two at least."""
        self.asked = (nbytes, pinned)
        self.is_quiet = True  # nothing reads or writes it
        self.slot_bytes = slot_bytes(nbytes)
        if not pinned:  # what is touched costs time: no more slots than the threads keep busy
            nbytes = min(nbytes, 3 * self.slot_bytes)
        memory = pinned_memory(nbytes, 2 * self.slot_bytes) if pinned else torch.empty(nbytes, dtype=torch.uint8)
        self.count = len(memory) // self.slot_bytes
        self.slots = list(memory[: self.count * self.slot_bytes].view(self.count, self.slot_bytes))
        self.buffers = [as_bytes(slot) for slot in self.slots]


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a contiguous tensor's memory, to read into."""
    return memoryview(tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]


class _KeptRing:
    """The ring that is kept between loads: pinning costs 0.4 s a GiB."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kept: Ring | None = None
        self.pinning: threading.Thread | None = None


_kept_ring = _KeptRing()


def pin_ahead(device: torch.device) -> None:
    """Begin to pin a ring for a load that is about to come onto a GPU, in a thread, unless there is one."""

    def pin() -> None:
        try:
            with torch.cuda.device(device):  # no other GPU is to be woken up for it
                ring = Ring(nbytes, pinned=True)
        except Exception as error:  # the load will meet it again, where it can be told
            logger.debug("pinning ahead failed: %s", error)
            return
        with _kept_ring.lock:
            _kept_ring.kept = _kept_ring.kept or ring

    nbytes = ring_bytes()
    with _kept_ring.lock:
        if _kept_ring.pinning is None and (_kept_ring.kept is None or _kept_ring.kept.asked != (nbytes, True)):
            _kept_ring.kept = None
            # No daemon: a program that ends must wait for it, or torch would abort it.
            thread = threading.Thread(target=pin)
            with suppress(RuntimeError):  # no more threads are to be had: the load pins by itself
                thread.start()
                _kept_ring.pinning = thread


def _wait_for_pinning() -> None:
    with _kept_ring.lock:
        thread, _kept_ring.pinning = _kept_ring.pinning, None
    if thread is not None:
        thread.join()


@contextmanager
def take_ring(*, pinned: bool) -> Iterator[Ring]:
    """Lend a ring: the kept one, or where that is lent already or of another size, a new one."""
    nbytes = ring_bytes()
    _wait_for_pinning()
    with _kept_ring.lock:
        ring = None
        if _kept_ring.kept is not None and _kept_ring.kept.asked == (nbytes, pinned):
            ring, _kept_ring.kept = _kept_ring.kept, None
    ring = ring or Ring(nbytes, pinned=pinned)
    try:
        yield ring
    finally:
        if pinned and ring.is_quiet:
            with _kept_ring.lock:
                _kept_ring.kept = ring


def release_buffers() -> None:
    """Free the pinned host memory (128 MiB, unless set otherwise) that is kept from one load for the next."""
    _wait_for_pinning()
    with _kept_ring.lock:
        _kept_ring.kept = None
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        # torch keeps freed pinned memory for itself; without this the system would not get it back.
        empty_cache = getattr(torch._C, "_host_emptyCache", None)
        if empty_cache is not None:
            empty_cache()
