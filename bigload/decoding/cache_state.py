"""What a step changes in a cache: tensors, which a graph has in places of its own, and counts that Python keeps."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch

from .calls import is_state
from .held_values import Container, HeldValues
from .simple import SIMPLE

# Counts of tokens that transformers' layers with a sliding window keep in Python, beside those on the GPU.
_COUNTS = ("cumulative_length", "cumulative_length_int")
# The methods that tell them: what a step computes from their results would stay as it was when it was captured.
_TELLING = ("get_seq_length", "get_mask_sizes")


class LeftLayer(NamedTuple):
    """What a layer held whose cache is no more: its class, its tensors and simple attributes."""

    kind: type
    held: dict[str, Any]


class CacheState:
    """The state of the caches of one call, as it is now.

    Attributes:
        signature: equal for caches that a graph can stand for: classes, shapes and all values but those of tensors and
            of counts; of a count whether its window is full.
        objects: weak references to the caches, and to the caches and layers in them.
    """

    def __init__(self, caches: Sequence[Any]) -> None:
        self._containers: list[Container] = []
        self._tensors: list[tuple[Container, Any]] = []
        self._counts: list[tuple[dict[Any, Any], str]] = []
        self._layers: list[Any] = []
        self._seen: dict[int, int] = {}
        self.objects: list[weakref.ref[Any]] = []
        signature: list[Any] = []
        for cache in caches:
            self._walk(cache, signature)
        self.signature = tuple(signature)
        self._held = HeldValues(self._containers)
        self._are_full = self._now_full()

    def _walk(self, value: Any, signature: list[Any]) -> None:
        if id(value) in self._seen:
            signature.append(("again", self._seen[id(value)]))
            return
        self._seen[id(value)] = len(self._seen)
        signature.append(type(value))
        container: Container = value if isinstance(value, (dict, list)) else vars(value)
        self._containers.append(container)
        if container is not value:
            with suppress(TypeError):  # one with slots
                self.objects.append(weakref.ref(value))
        slides = isinstance(container, dict) and container is not value and _slides(value)
        if slides:
            self._layers.append(value)
        items = enumerate(container) if isinstance(container, list) else [*container.items()]
        for name, each in items:
            if isinstance(each, torch.Tensor):
                self._tensors.append((container, name))
                signature.append((name, each.shape, each.stride(), each.dtype, each.device))
            elif slides and name in _COUNTS and type(each) is int:
                assert isinstance(container, dict)
                self._counts.append((container, name))
                signature.append((name, each >= container["max_cache_len"]))
            elif isinstance(each, SIMPLE):
                signature.append((name, each))
            elif isinstance(each, (dict, list)) or is_state(each):
                signature.append(name)
                self._walk(each, signature)
            else:
                signature.append((name, id(each)))

    def _now_full(self) -> list[bool]:
        return [held[name] >= held["max_cache_len"] for held, name in self._counts]

    def is_same(self) -> bool:
        """Whether the caches hold what they held when this was last noted, so that their signature is the same."""
        return self._held.are_same() and self._now_full() == self._are_full

    def note(self) -> None:
        """Note what the caches hold."""
        self._held.note()
        self._are_full = self._now_full()

    def tensors(self) -> list[torch.Tensor]:
        """List the tensors."""
        return [container[name] for container, name in self._tensors]

    def put(self, own: Sequence[torch.Tensor]) -> None:
        """Put a graph's own tensors into the caches, with the values that are there."""
        for (container, name), tensor in zip(self._tensors, own, strict=True):
            if container[name] is not tensor:
                tensor.copy_(container[name])
                container[name] = tensor

    def left(self, own: Sequence[torch.Tensor]) -> list[LeftLayer]:
        """Return the layers of the cache as they would be with a graph's own tensors in them, without the layers.

        Returns:
            An empty list if there are several caches.
        """
        found = [held["layers"] for held in self._containers if isinstance(held, dict) and "layers" in held]
        layers: list[Any] = found[0] if len(found) == 1 and isinstance(found[0], list) else []
        kept = (torch.Tensor, *SIMPLE)
        left = {
            id(vars(layer)): LeftLayer(
                type(layer), {name: each for name, each in vars(layer).items() if isinstance(each, kept)}
            )
            for layer in layers
        }
        for (container, name), tensor in zip(self._tensors, own, strict=True):
            if id(container) in left:
                left[id(container)].held[name] = tensor
        return [*left.values()]

    def advance(self) -> None:
        """Count a token, as Python would have. Of a window that is full now, it is still noted that it was not."""
        for container, name in self._counts:
            self._held.put(container, name, container[name] + 1)

    def snapshot(self) -> list[Container]:
        """Return what the caches hold now."""
        return [each.copy() for each in self._containers]

    def restore(self, before: Sequence[Container]) -> None:
        """Put back what they held. The values of tensors stay as they are."""
        for container, saved in zip(self._containers, before, strict=True):
            container.clear()
            if isinstance(container, dict):
                container.update(saved)
            else:
                container.extend(saved)

    def changes(self, before: Sequence[Container]) -> str | None:
        """Say what a step has put into the place of something else, beside counts; None if nothing."""
        counted = {(id(container), name) for container, name in self._counts}
        for container, saved in zip(self._containers, before, strict=True):
            names = list(container) if isinstance(container, dict) else range(max(len(container), len(saved)))
            if len(container) != len(saved):
                return "adds to its cache"
            for name in names:
                now: Any = container[name]
                old: Any = saved[name] if isinstance(saved, list) or name in saved else None
                if now is old:
                    continue
                if (id(container), name) in counted and now == old + 1:
                    continue
                if isinstance(now, SIMPLE) and type(now) is type(old) and now == old:
                    continue
                return f"puts another {name!r} into its cache"
        return None

    @contextmanager
    def watched(self) -> Iterator[list[str]]:
        """Note which counts are asked for in a `with` block, beside by the layers that keep them."""
        asked: list[str] = []
        for layer in self._layers:
            for name in _TELLING:
                if hasattr(layer, name):
                    vars(layer)[name] = _noting(getattr(layer, name), name, asked)
        try:
            yield asked
        finally:
            for layer in self._layers:
                for name in _TELLING:
                    vars(layer).pop(name, None)


def _slides(layer: Any) -> bool:
    return bool(getattr(layer, "is_sliding", False)) is True and "max_cache_len" in vars(layer)


def _noting(method: Any, name: str, asked: list[str]) -> Any:
    def note(*args: Any, **kwargs: Any) -> Any:
        asked.append(name)
        return method(*args, **kwargs)

    return note
