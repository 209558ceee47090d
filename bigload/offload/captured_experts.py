"""Experts whose cache the GPU keeps, in graphs that others capture and replay: what such a graph relies on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from .expert_forwards import ExpertsForward
from .forwards import forward_override_of
from .on_device.expert_cache import ExpertCache
from .on_device.gpu_book import GpuBook


def capturable_experts(module: nn.Module) -> bool:
    """Whether a module holds offloaded experts, of whose cache the GPU keeps the book."""
    forward = forward_override_of(module)
    if not isinstance(forward, ExpertsForward) or not forward.is_usual:
        return False
    cache = forward.weights.cache()
    return cache is not None and cache.unread_book() is not None


class CapturedExperts:
    """The modules of a model with such experts.

    A graph has the addresses of their caches and of the weights at rest. What Python does in each call beside launching
    is done here for a replay: it sees whether weights at rest were written to, and orders calls of several streams.
    """

    def __init__(self, model: nn.Module) -> None:
        self._forwards: list[ExpertsForward] = []
        for module in model.modules():
            forward = forward_override_of(module)
            if isinstance(forward, ExpertsForward) and capturable_experts(module):
                self._forwards.append(forward)
        self._held = [self._now(forward) for forward in self._forwards]

    @staticmethod
    def _now(forward: ExpertsForward) -> tuple[ExpertCache | None, GpuBook | None]:
        cache = forward.weights.cache()
        return cache, None if cache is None else cache.unread_book()

    def are_same(self) -> bool:
        """Whether the caches are where they were. Weights at rest that were written to are taken over."""
        return all(
            now[0] is held[0] and now[1] is held[1]
            for now, held in zip(map(self._now, self._forwards), self._held, strict=True)
        )

    def are_ready(self) -> bool:
        """Whether a replay may go on from what is in the caches; else a call that is not captured sees to it."""
        return all(book is not None and book.is_current for _, book in self._held)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let a graph be captured or replayed while no other thread calls the experts."""
        with ExitStack() as stack:
            for cache, book in self._held:
                assert cache is not None  # capturable
                assert book is not None
                stack.enter_context(cache.held())
                book.follow()
                book.note_replay()
            yield
