"""Experts that stay on the device: of each module of fused experts those that were used last."""

from __future__ import annotations

import functools
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch

from ...errors import OffloadError
from ...hardware.allocation import allocate
from ...hardware.devices import is_capturing
from ...hardware.pinned import HostGroup, Store
from ...quantization.formats import FourBit, part_name
from ...quantization.packed_experts import TABLE, PackedExperts, Places, cache_layout
from ..leaves import Group, Leaf, NonCopyable
from .expert_books import CacheMemory, ExpertBook, HostBook, Wanted
from .gpu_book import GpuBook
from .slots import Slice, SlotCopier

logger = logging.getLogger(__name__)
_T = TypeVar("_T")
# So few choices are read one by one; of more, a GPU tells first which differ.
_FEW_CHOICES = 1024


class ExpertCache(NonCopyable):
    """Memory for some experts of one module, least recently used first to go.

    A thread that computes with it locks it until all is launched.

    Attributes:
        slots: how many experts it holds at most.
    """

    def __init__(self, leaf: Leaf, store: Store, slots: int, copier: SlotCopier) -> None:
        """Allocate the memory; nothing is copied yet.

        Args:
            leaf: a module of fused experts in 4 bit.
            store: where its weights are at rest.
            slots: how many experts may stay; more than there are have no use.
            copier: of the device.

        Raises:
            torch.OutOfMemoryError: the device has no room.
        """
        module: Any = leaf.module
        self._module, self._store, self._copier = module, store, copier
        experts = module.quantized_experts
        self._experts: int = experts.num_experts
        self.slots = min(slots, self._experts)
        self._prefix = f"{leaf.path}." if leaf.path else ""
        self._weights = {name: _format_of(module._parameters[name]) for name in experts.weights}
        # What each expert has of its own; the rest belongs to all.
        self._sliced = [part for name in experts.weights for part in (name, part_name(name, "absmax"))]
        self._copied_elsewhere = 0
        self._counted = 0, 0, 0  # by books that are no more
        self._lock = threading.RLock()
        self._running: set[object] = set()
        self._is_captured = False  # by who sees to it that a replay finds what it relies on
        # From so many pairs on a call will probably want all experts.
        self._too_many_pairs = _pairs_that_choose(max(self.slots, self._experts // 2), self._experts)
        self._book: ExpertBook | None = None
        self.allocate()

    @torch.inference_mode(False)
    def allocate(self) -> None:
        """Allocate the memory, unless it is there.

        Raises:
            torch.OutOfMemoryError: the device has no room.
        """
        if self._book is not None or not self.slots:
            return
        layout = cache_layout(self._weights, self.slots)
        whole = allocate((layout.nbytes,), torch.uint8, self._copier.device)
        tensors = layout.views(whole)
        memory = CacheMemory(whole, layout, tensors, self._prefix, self._sliced, self.slots, self._experts)
        book = _book_of(memory, self._store, self._copier)
        places = Places(book.places, tensors[TABLE])
        states = {name: self._module._parameters[name].quant_state for name in self._weights}
        self._packed = [PackedExperts.cached(name, state, tensors, places) for name, state in states.items()]
        self._book = book

    def wanted(self, ids: torch.Tensor) -> Wanted | None:
        """Return the experts that a call wants; None if these are so many that all should be copied.

        Args:
            ids: their numbers; those that are no expert's count for nothing. A GPU that does not keep the book itself
                is waited for, to read them.

        Raises:
            OffloadError: a CUDA graph is being captured.
        """
        book = self._book
        takes_unread = book is not None and book.takes_unread(ids)
        if is_capturing(self._copier.device) and not (self._is_captured and takes_unread):
            raise OffloadError(_NO_GRAPH)
        if takes_unread:
            return ids
        found = _distinct(ids, self._experts)
        if len(found) > max(self.slots, self._experts // 2):
            self._too_many_pairs = ids.numel()
            return None
        self._too_many_pairs = max(self._too_many_pairs, ids.numel() + 1)
        return found

    def run(self, wanted: Wanted, compute: Callable[[Sequence[PackedExperts]], _T]) -> _T | None:
        """Call `compute` with the module's two weights, which hold the experts that are wanted.

        Args:
            wanted: from `wanted`.
            compute: has launched all that reads the weights when it returns.

        Returns:
            What `compute` returns; None, without a call, if more experts are wanted than have room.

        Raises:
            OffloadError: a file cannot be read.
        """
        if not isinstance(wanted, torch.Tensor) and len(wanted) > self.slots:
            return None
        with self._lock:
            if self._book is None or self._running:  # a hook within the experts calls them again
                if is_capturing(self._copier.device):
                    raise OffloadError(_NO_GRAPH)
                return None
            running = object()
            try:
                self._running.add(running)
                self._book.bring(wanted)
                return compute(self._packed)
            finally:
                self._running.discard(running)

    def unread_book(self) -> GpuBook | None:
        """Return the book if the GPU keeps it, so that calls with few pairs can be captured."""
        return self._book if isinstance(self._book, GpuBook) else None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other threads' calls out while a call is captured, or replayed."""
        with self._lock:
            self._is_captured = True
            try:
                yield
            finally:
                self._is_captured = False

    def slices(self, wanted: Wanted, parts: Mapping[str, torch.Tensor]) -> list[Slice]:
        """Return what is copied of experts into memory that has room for all of them.

        Args:
            wanted: from `wanted`.
            parts: of the weights in that memory, by name.
        """
        numbers = _distinct(wanted, self._experts) if isinstance(wanted, torch.Tensor) else wanted
        found = []
        for name in self._parts():
            memory = parts[self._prefix + name].view(-1).view(torch.uint8)
            if name in self._sliced:
                rows = memory.view(self._experts, -1)
                found += [Slice(self._prefix + name, expert, self._experts, rows[expert]) for expert in numbers]
            else:
                found.append(Slice(self._prefix + name, 0, 1, memory))
        self._copied_elsewhere += len(numbers)
        return found

    def packed_in(self, parts: Mapping[str, torch.Tensor]) -> list[PackedExperts]:
        """Return the two weights in memory that has room for all experts: `parts` by name."""
        own = {name: parts[self._prefix + name] for name in self._parts()}
        states = {name: self._module._parameters[name].quant_state for name in self._weights}
        return [PackedExperts.whole(name, state, own) for name, state in states.items()]

    def _parts(self) -> list[str]:
        return [part_name(name, part) for name, (fmt, shape) in self._weights.items() for part in fmt.parts(shape)]

    def expects_too_many(self, pairs: int) -> bool:
        """Whether a call with so many pairs of token and expert will probably want all experts."""
        return pairs >= self._too_many_pairs

    def forget(self) -> None:
        """Have all copied again from the next call on: the weights at rest may have changed."""
        if self._book is not None:
            self._book.forget()

    def count(self) -> tuple[int, int, int]:
        """Return the experts that calls found here, each once for a call; those copied by themselves; and the bytes
        copied here.
        """
        hits, misses, nbytes = self._counted
        if self._book is not None:
            own = self._book.count()
            hits, misses, nbytes = hits + own[0], misses + own[1], nbytes + own[2]
        return hits, misses + self._copied_elsewhere, nbytes

    def discard(self) -> None:
        """Let the memory be freed when the calls that use it have ended, on the device too."""
        if self._book is not None:
            self._book.discard()

    def free(self) -> None:
        """Free the memory; calls want the whole module until `allocate`. All copies have ended.

        Raises:
            OffloadError: a call uses it.
        """
        if not self._lock.acquire(blocking=False):
            raise OffloadError(_IN_USE)
        try:
            if self._running:
                raise OffloadError(_IN_USE)
            hits, misses, nbytes = self.count()
            self._counted = hits, misses - self._copied_elsewhere, nbytes
            self.discard()  # a call may have come since the copies ended
            self._book, self._packed = None, []
        finally:
            self._lock.release()


_IN_USE = "experts on the device are in use: call remove() outside of forward"
_NO_GRAPH = (
    "offloaded experts are copied as the router chooses them, which no CUDA graph can capture: run the model without "
    "one"
)


def _book_of(memory: CacheMemory, store: Store, copier: SlotCopier) -> ExpertBook:
    """Let the GPU keep the book where it can."""
    if GpuBook.suits(memory, store, copier.device):
        try:
            return GpuBook(memory, cast(HostGroup, store))
        except Exception as error:
            _warn_of_host(copier.device, str(error))
    return HostBook(memory, store, copier)


@functools.cache  # once, not for each module
def _warn_of_host(device: torch.device, error: str) -> None:
    logger.warning(
        "%s cannot read pinned memory by itself, so that the host reads each choice of experts, which takes longer: %s",
        device,
        error,
    )


class ExpertCaches:
    """The caches on one device.

    Attributes:
        pairs: of token and expert, in the call that ran last.
    """

    def __init__(self, groups: Iterable[Group], copier: SlotCopier) -> None:
        """Make the caches that groups ask for.

        Raises:
            torch.OutOfMemoryError: the device has no room.
        """
        self.pairs = 0
        self._caches = {
            leaf: ExpertCache(leaf, group.store, group.cached, copier)
            for group in groups
            if group.cached is not None
            for leaf in group.leaves
        }

    def of(self, leaf: Leaf) -> ExpertCache | None:
        """Return a leaf's cache, if it has one."""
        return self._caches.get(leaf)

    def suffice_for(self, group: Group) -> bool:
        """Whether the next call will probably find what it wants of a group here, and not want the whole group."""
        own = [self._caches.get(leaf) for leaf in group.leaves]
        return all(cache is not None and not cache.expects_too_many(self.pairs) for cache in own)

    def forget(self, group: Group) -> None:
        """Have a group's experts copied again."""
        for leaf in group.leaves:
            if leaf in self._caches:
                self._caches[leaf].forget()

    def drop(self, group: Group) -> None:
        """Stop caching a group's experts."""
        for leaf in group.leaves:
            cache = self._caches.pop(leaf, None)
            if cache is not None:
                cache.discard()

    def free(self) -> None:
        """Free all memory.

        Raises:
            OffloadError: a call uses it.
        """
        for cache in self._caches.values():
            cache.free()

    def allocate(self) -> None:
        """Allocate what `free` has freed.

        Raises:
            torch.OutOfMemoryError: the device has no room.
        """
        for cache in self._caches.values():
            cache.allocate()

    def count(self) -> tuple[int, int, int]:
        """Return the hits, the misses and the bytes copied, of all caches."""
        counts = [cache.count() for cache in self._caches.values()]
        return sum(count[0] for count in counts), sum(count[1] for count in counts), sum(count[2] for count in counts)


def _format_of(parameter: Any) -> tuple[FourBit, tuple[int, ...]]:
    state = parameter.quant_state
    return FourBit(state.quant_type, state.blocksize, bool(state.nested), parameter.dtype), tuple(state.shape)


def _distinct(ids: torch.Tensor, experts: int) -> list[int]:
    """Return the experts among `ids`, in order."""
    flat = ids.detach().reshape(-1)
    found = set(flat.tolist()) if flat.numel() <= _FEW_CHOICES else torch.unique(flat).tolist()
    return sorted(expert for expert in found if 0 <= expert < experts)


def _pairs_that_choose(slots: int, experts: int) -> int:
    """Return how many random choices hit more than `slots` of the experts, on average."""
    if slots >= experts:
        return 2**62
    if experts == 1:
        return 1
    return math.ceil(math.log(1 - slots / experts) / math.log(1 - 1 / experts)) + 1
