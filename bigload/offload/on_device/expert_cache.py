"""Experts that stay on the device: of each module of fused experts those that were used last."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from ...errors import OffloadError
from ...hardware.allocation import allocate
from ...hardware.pinned import Store
from ...quantization.formats import FourBit, part_name
from ...quantization.packed_experts import TABLE, PackedExperts, Places, cache_layout
from ..leaves import Group, Leaf, NonCopyable
from .expert_copies import CudaExpertCopies, ExpertCopies
from .slots import CudaSlotCopier, Slice, SlotCopier

_T = TypeVar("_T")
# So few choices are read one by one; of more, a GPU tells first which differ.
_FEW_CHOICES = 1024


class ExpertCache(NonCopyable):
    """Memory for some experts of one module, least recently used first to go.

    A thread that computes with it locks it until all is launched. Ctrl-C may come at any time: an expert counts as
    there only when its copy and what orders it are under way.

    Attributes:
        slots: how many experts it holds at most.
        hits: experts that calls found there, each once for a call.
        misses: experts that were copied by themselves.
        nbytes: bytes copied into the cache.
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
        self.hits = self.misses = self.nbytes = 0
        self._lock = threading.RLock()
        self._running: set[object] = set()
        self._there: OrderedDict[int, int] = OrderedDict()
        self._changes, self._changes_seen = 0, -1
        # From so many pairs on a call will probably want all experts.
        self._too_many_pairs = _pairs_that_choose(max(self.slots, self._experts // 2), self._experts)
        self._memory: dict[str, torch.Tensor] | None = None
        self.allocate()

    @torch.inference_mode(False)
    def allocate(self) -> None:
        """Allocate the memory, unless it is there.

        Raises:
            torch.OutOfMemoryError: the device has no room.
        """
        if self._memory is not None or not self.slots:
            return
        layout = cache_layout(self._weights, self.slots)
        device, copier = self._copier.device, self._copier
        memory = layout.views(allocate((layout.nbytes,), torch.uint8, device))
        self._copies = CudaExpertCopies(device, copier.stream) if isinstance(copier, CudaSlotCopier) else ExpertCopies()
        self._table = self._copies.make_table(self._experts)
        self._rows = {
            self._prefix + part: memory[part].view(self.slots, -1).view(torch.uint8).unbind() for part in self._sliced
        }
        self._shared = {
            self._prefix + part: memory[part].view(-1).view(torch.uint8)
            for part in memory
            if part not in self._sliced and part != TABLE
        }
        self._there.clear()
        self._changes_seen = self._changes - 1
        places = Places(self._there, memory[TABLE])
        states = {name: self._module._parameters[name].quant_state for name in self._weights}
        self._packed = [PackedExperts.cached(name, state, memory, places) for name, state in states.items()]
        self._memory = memory

    def wanted(self, ids: torch.Tensor) -> list[int] | None:
        """Return the experts that a call wants; None if these are so many that all should be copied.

        Args:
            ids: their numbers; those that are no expert's count for nothing. A GPU is waited for, to read them.
        """
        found = _distinct(ids, self._experts)
        if len(found) > max(self.slots, self._experts // 2):
            self._too_many_pairs = ids.numel()
            return None
        self._too_many_pairs = max(self._too_many_pairs, ids.numel() + 1)
        return found

    def run(self, wanted: Sequence[int], compute: Callable[[Sequence[PackedExperts]], _T]) -> _T | None:
        """Call `compute` with the module's two weights, which hold the experts that are wanted.

        Args:
            wanted: their numbers.
            compute: has launched all that reads the weights when it returns.

        Returns:
            What `compute` returns; None, without a call, if more experts are wanted than have room.

        Raises:
            OffloadError: a file cannot be read.
        """
        if len(wanted) > self.slots:
            return None
        with self._lock:
            if self._memory is None or self._running:  # a hook within the experts calls them again
                return None
            running = object()
            try:
                self._running.add(running)
                return compute(self._bring(wanted))
            finally:
                self._running.discard(running)

    def slices(self, wanted: Sequence[int], parts: Mapping[str, torch.Tensor]) -> list[Slice]:
        """Return what is copied of experts into memory that has room for all of them.

        Args:
            wanted: their numbers.
            parts: of the weights in that memory, by name.
        """
        found = []
        for name in self._parts():
            memory = parts[self._prefix + name].view(-1).view(torch.uint8)
            if name in self._sliced:
                rows = memory.view(self._experts, -1)
                found += [Slice(self._prefix + name, expert, self._experts, rows[expert]) for expert in wanted]
            else:
                found.append(Slice(self._prefix + name, 0, 1, memory))
        self.misses += len(wanted)
        return found

    def packed_in(self, parts: Mapping[str, torch.Tensor]) -> list[PackedExperts]:
        """Return the two weights in memory that has room for all experts: `parts` by name."""
        own = {name: parts[self._prefix + name] for name in self._parts()}
        states = {name: self._module._parameters[name].quant_state for name in self._weights}
        return [PackedExperts.whole(name, state, own) for name, state in states.items()]

    def _parts(self) -> list[str]:
        return [part_name(name, part) for name, (fmt, shape) in self._weights.items() for part in fmt.parts(shape)]

    def _bring(self, wanted: Sequence[int]) -> Sequence[PackedExperts]:
        there, changes = self._there, self._changes
        slices: list[Slice] = []
        if changes != self._changes_seen:
            there.clear()
            slices += [Slice(name, 0, 1, target) for name, target in self._shared.items()]
        missing = [expert for expert in wanted if expert not in there]
        for expert in wanted:
            if expert in there:
                there.move_to_end(expert)
        if missing or slices:
            slots = self._free_slots(len(missing))
            self._copies.finish()
            for expert, slot in zip(missing, slots, strict=True):
                self._table[expert] = slot
                slices += [Slice(name, expert, self._experts, rows[slot]) for name, rows in self._rows.items()]
            memory = self._memory
            assert memory is not None
            self._copies.copy(self._store, slices, self._table, memory[TABLE])
            there.update(zip(missing, slots, strict=True))
            self._changes_seen = changes
            self.nbytes += sum(each.target.numel() for each in slices)
        self._copies.await_copies()
        self.hits += len(wanted) - len(missing)
        self.misses += len(missing)
        return self._packed

    def _free_slots(self, count: int) -> list[int]:
        """Return slots that hold nothing, then those of the experts whose last use is longest ago."""
        used = set(self._there.values())
        free = [slot for slot in range(self.slots) if slot not in used][:count]
        return free + [self._there.popitem(last=False)[1] for _ in range(count - len(free))]

    def expects_too_many(self, pairs: int) -> bool:
        """Whether a call with so many pairs of token and expert will probably want all experts."""
        return pairs >= self._too_many_pairs

    def forget(self) -> None:
        """Have all copied again from the next call on: the weights at rest may have changed."""
        self._changes += 1

    def discard(self) -> None:
        """Let the memory be freed when the calls that use it have ended, on the device too."""
        if self._memory is not None:
            self._copies.discard(self._memory[TABLE])

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
            self._memory = None
            self._packed, self._rows, self._shared = [], {}, {}
        finally:
            self._lock.release()


_IN_USE = "experts on the device are in use: call remove() outside of forward"


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
        caches = self._caches.values()
        return sum(c.hits for c in caches), sum(c.misses for c in caches), sum(c.nbytes for c in caches)


def _format_of(parameter: Any) -> tuple[FourBit, tuple[int, ...]]:
    state = parameter.quant_state
    return FourBit(state.quant_type, state.blocksize, bool(state.nested), parameter.dtype), tuple(state.shape)


def _distinct(ids: torch.Tensor, experts: int) -> list[int]:
    """Return the experts among `ids`, in order.

    Raises:
        OffloadError: a CUDA graph is being captured, which cannot wait for them.
    """
    if ids.is_cuda and torch.cuda.is_current_stream_capturing():
        raise OffloadError(
            "offloaded experts are copied as the router chooses them, which no CUDA graph can capture: run the model "
            "without one"
        )
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
