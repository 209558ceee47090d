"""The ring of pinned host memory that file reads fill and copies to GPUs empty, reused by later loads."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from ..errors import ConfigError
from ..hardware.pinned import pinned_memory
from ..notation import parse_size

logger = logging.getLogger(__name__)

SLOT_BYTES = 16 * 2**20
# Small, so that much of it is still in the CPU's cache when it is copied: 256 MiB were slower.
RING_BYTES = 128 * 2**20


def needs_ring(device: torch.device) -> bool:
    """Whether what goes to a device passes through pinned memory."""
    return device.type == "cuda"


def reader_threads(gpus: int = 1) -> int:
    """Return the number of threads that read: BIGLOAD_THREADS, or by default one a core, from 2 to 12 for each GPU.

    Args:
        gpus: how many GPUs the bytes go to.

    Raises:
        ConfigError: BIGLOAD_THREADS is not a number, 1 or more.
    """
    asked = os.environ.get("BIGLOAD_THREADS")
    if asked is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
        return max(2, min(12 * gpus, cores))
    if not asked.isdecimal() or int(asked) < 1:
        raise ConfigError(f"BIGLOAD_THREADS is {asked!r}; expected a number of threads, 1 or more")
    return int(asked)


def ring_bytes() -> int:
    """Return the size of the ring: BIGLOAD_RING_BYTES, or 128 MiB by default.

    It is the host memory that a load needs in addition to the weights that stay there.

    Raises:
        ConfigError: BIGLOAD_RING_BYTES is not a size, 1 KiB or more.
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
    """Return the size of a slot, the most that is read at once: 16 MiB, or less, so that a small ring has two slots.

    Args:
        ring: size of the ring in bytes; None is `ring_bytes()`.
    """
    nbytes = ring_bytes() if ring is None else ring
    return int(min(SLOT_BYTES, 2 ** ((nbytes // 2).bit_length() - 1)))


class Ring:
    """Slots of equal size, at least two, in one block of host memory.

    Attributes:
        asked: the bytes it was to have.
        is_quiet: whether nothing reads or writes it, so that another load may use it.
        slot_bytes: size of a slot.
        count: number of slots.
        memory: all of it, (bytes,), uint8.
        slots: each (slot_bytes,), uint8.
    """

    def __init__(self, nbytes: int) -> None:
        self.asked = nbytes
        self.is_quiet = True
        self.slot_bytes = slot_bytes(nbytes)
        memory = pinned_memory(nbytes, 2 * self.slot_bytes)
        self.memory = memory
        self.count = len(memory) // self.slot_bytes
        self.slots: list[torch.Tensor] = list(memory[: self.count * self.slot_bytes].view(self.count, self.slot_bytes))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a contiguous CPU tensor's memory as a buffer."""
    flat = tensor if tensor.dtype == torch.uint8 else tensor.view(torch.uint8)  # a view takes longer than the question
    return memoryview(flat.numpy())  # type: ignore[arg-type]


class _KeptRing:
    """The ring that is kept from one load for the next, since pinning takes 0.4 s a GiB."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kept: Ring | None = None
        self.pinning: threading.Thread | None = None


_kept_ring = _KeptRing()


def pin_ahead(device: torch.device) -> None:
    """Begin, in a thread, to pin the ring for a coming load onto a GPU, unless one is kept already."""

    def pin() -> None:
        try:
            with torch.cuda.device(device):  # pinning initializes the current GPU
                ring = Ring(nbytes)
        except Exception as error:  # the load meets it again, and reports it
            logger.debug("pinning ahead failed: %s", error)
            return
        with _kept_ring.lock:
            _kept_ring.kept = _kept_ring.kept or ring

    nbytes = ring_bytes()
    with _kept_ring.lock:
        if _kept_ring.pinning is None and (_kept_ring.kept is None or _kept_ring.kept.asked != nbytes):
            _kept_ring.kept = None
            # Not a daemon: the interpreter must wait for it at exit, or torch would abort the process.
            thread = threading.Thread(target=pin)
            with suppress(RuntimeError):  # the system has no more threads: the load pins its ring itself
                thread.start()
                _kept_ring.pinning = thread


def _wait_for_pinning() -> None:
    with _kept_ring.lock:
        thread, _kept_ring.pinning = _kept_ring.pinning, None
    if thread is not None:
        thread.join()


@contextmanager
def take_ring() -> Iterator[Ring]:
    """Use the kept ring for a load, or a new one if that is in use or differs in size, and keep it afterwards."""
    nbytes = ring_bytes()
    _wait_for_pinning()
    with _kept_ring.lock:
        ring = None
        if _kept_ring.kept is not None and _kept_ring.kept.asked == nbytes:
            ring, _kept_ring.kept = _kept_ring.kept, None
    ring = ring or Ring(nbytes)
    try:
        yield ring
    finally:
        if ring.is_quiet:
            with _kept_ring.lock:
                _kept_ring.kept = ring


def release_ring() -> None:
    """Free the pinned host memory (128 MiB, unless set otherwise) that is kept from one load for the next."""
    _wait_for_pinning()
    with _kept_ring.lock:
        _kept_ring.kept = None
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        # torch caches freed pinned memory; this returns it to the system.
        empty_cache = getattr(torch._C, "_host_emptyCache", None)
        if empty_cache is not None:
            empty_cache()
