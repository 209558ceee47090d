"""Offloaded weights in graphs that others capture and replay: what such a graph relies on.

Blocks are copied by the graph itself, from pinned memory into slots that are fixed; experts whose cache the GPU keeps,
by their own kernels. What Python does in each call beside launching is done here for a replay: it sees whether weights
at rest were written to, and orders calls of several streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from ..errors import OffloadError
from .expert_forwards import ExpertsForward
from .forwards import StreamedForward, forward_override_of
from .leaves import without_torch_function
from .on_device.captured_copies import CapturedCopies
from .on_device.expert_cache import ExpertCache
from .on_device.gpu_book import GpuBook
from .on_device.slot_pool import SlotPool
from .residency import Residency


def is_capturable(module: nn.Module) -> bool:
    """Whether a graph can have the offloaded weights of a module: in pinned memory, and in no cache of the host's."""
    forward = forward_override_of(module)
    if not isinstance(forward, StreamedForward):
        return False
    weights = forward.weights
    if isinstance(forward, ExpertsForward) and (cache := weights.cache()) is not None:
        return forward.is_usual and cache.unread_book() is not None
    return weights.pool.copier.can_capture(weights.group.store)


class CapturedOffload:
    """The offloaded modules of a model that graphs can have."""

    def __init__(self, model: nn.Module) -> None:
        self._caches: list[tuple[StreamedForward, ExpertCache, GpuBook]] = []
        self._weights: dict[SlotPool, list[Residency]] = {}
        self._pools: dict[SlotPool, CapturedCopies | None] = {}
        for module in model.modules():
            forward = forward_override_of(module)
            if not isinstance(forward, StreamedForward) or not is_capturable(module):
                continue
            self._pools[forward.weights.pool] = None
            self._weights.setdefault(forward.weights.pool, []).append(forward.weights)
            cache = forward.weights.cache() if isinstance(forward, ExpertsForward) else None
            book = None if cache is None else cache.unread_book()
            if cache is not None and book is not None:
                self._caches.append((forward, cache, book))

    def are_same(self) -> bool:
        """Whether caches, slots and stores are where they were. Weights at rest that were written to are taken over."""
        for pool, weights in self._weights.items():
            with pool.lock, without_torch_function():
                for each in weights:
                    each.adopt_changes()
        for forward, cache, book in self._caches:
            pool = forward.weights.pool
            if pool.caches.of(forward.weights.leaf) is not cache or cache.unread_book() is not book:
                return False
        return all(copies is None or copies.is_same(pool.slots) for pool, copies in self._pools.items())

    def are_ready(self) -> bool:
        """Whether a replay may go on from what is in the caches; else a call that is not captured sees to it."""
        return all(book.is_current for _, _, book in self._caches)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note the order in which a step uses offloaded blocks.

        Raises:
            OffloadError: no graph can have that order.
        """
        with self._locked():
            for pool in self._pools:
                pool.visits = []
            try:
                yield
                for pool, known in self._pools.items():
                    if pool.visits:
                        copies = CapturedCopies(pool.copier, pool.visits, pool.slots)
                        self._pools[pool] = copies if known is None else known
                    if known is not None and (not pool.visits or known.order != copies.order):
                        raise OffloadError("steps of another kind use other offloaded blocks, or in another order")
            finally:
                for pool in self._pools:
                    pool.visits = None

    def captured(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return a step that is captured: with copies of its own, which end with it."""

        def captured(*args: Any, **kwargs: Any) -> Any:
            try:
                for pool, copies in self._pools.items():
                    if copies is not None:
                        copies.begin()
                        pool.captured = copies
                out = run(*args, **kwargs)
                for copies in self._pools.values():
                    if copies is not None:
                        copies.finish()
                return out
            finally:
                for pool in self._pools:
                    pool.captured = None

        return captured

    def are_slots_free(self) -> bool:
        """Whether no call uses a slot that a replay would begin with. To be asked within `held`."""
        return all(copies is None or copies.are_slots_free() for copies in self._pools.values())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other threads' calls out while a graph is captured or replayed, and order it after theirs."""
        with self._locked():
            for _, _, book in self._caches:
                book.follow()
                book.note_replay()
            yield

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with ExitStack() as stack:
            for pool in self._pools:
                stack.enter_context(pool.lock)
            for _, cache, _ in self._caches:
                stack.enter_context(cache.held())
            yield

    def replay(self, run: Callable[[], Any]) -> tuple[bool, Any]:
        """Replay a graph, which finds what it begins with in the slots.

        Returns:
            Whether it could, and what `run` returned.
        """
        if not self._pools:
            return True, run()
        with self.held():
            used = [(pool, copies) for pool, copies in self._pools.items() if copies is not None]
            if not all(pool.begin_replay(copies) for pool, copies in used):
                return False, None
            try:
                return True, run()
            finally:
                for pool, copies in used:
                    pool.end_replay(copies)
