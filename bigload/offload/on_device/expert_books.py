"""Which experts of a module are in its cache: kept by the host, for any device, and the interface of who keeps it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch

from ...hardware.layout import Layout
from ...hardware.pinned import Store
from ...quantization.packed_experts import BOOK, TABLE
from .expert_copies import CudaExpertCopies, ExpertCopies
from .slots import CudaSlotCopier, Slice, SlotCopier

# The numbers of the experts that a call wants: of each one, or as the call was given them, unread.
Wanted: TypeAlias = Sequence[int] | torch.Tensor


class CacheMemory(NamedTuple):
    """The memory of a cache.

    Attributes:
        whole: (bytes,), uint8.
        layout: of it, from `cache_layout`.
        tensors: its parts, by name.
        prefix: of the parts' names in the store.
        sliced: the parts of which each expert has its own; what is not here belongs to all.
        slots: how many experts it holds.
        experts: how many there are.
    """

    whole: torch.Tensor
    layout: Layout
    tensors: Mapping[str, torch.Tensor]
    prefix: str
    sliced: Sequence[str]
    slots: int
    experts: int

    def shared(self) -> dict[str, torch.Tensor]:
        """Return what belongs to all experts, (bytes,), uint8, by name in the store."""
        own = {name: tensor for name, tensor in self.tensors.items() if name not in (*self.sliced, TABLE, BOOK)}
        return {self.prefix + name: tensor.view(-1).view(torch.uint8) for name, tensor in own.items()}


class ExpertBook(ABC):
    """Knows which experts are in a cache, and has those copied that are missing. One thread at a time brings experts.

    Attributes:
        places: the slot of each expert that is there.
    """

    places: Mapping[int, int]

    @abstractmethod
    def bring(self, wanted: Wanted) -> None:
        """Let what is launched from here on find experts in the memory.

        Args:
            wanted: their numbers, no more than there are slots. A tensor of them is from a call that `takes_unread`.

        Raises:
            OffloadError: a file cannot be read.
        """

    def takes_unread(self, ids: torch.Tensor) -> bool:
        """Whether `bring` takes the experts of a call as they are, so that nobody need wait to read them."""
        return False

    @abstractmethod
    def forget(self) -> None:
        """Have all copied again from the next call on: the weights at rest may have changed."""

    @abstractmethod
    def count(self) -> tuple[int, int, int]:
        """Return the hits, the misses and the bytes copied."""

    @abstractmethod
    def discard(self) -> None:
        """Let the memory be freed when the calls that use it have ended, on the device too."""


class HostBook(ExpertBook):
    """A book that the host keeps. Ctrl-C may come at any time: an expert counts as there only when its copy and what
    orders it are under way.
    """

    def __init__(self, memory: CacheMemory, store: Store, copier: SlotCopier) -> None:
        """Begin with nothing there."""
        self._memory, self._store = memory, store
        self._copies = CudaExpertCopies(copier) if isinstance(copier, CudaSlotCopier) else ExpertCopies()
        self._table = self._copies.make_table(memory.experts)
        self._rows = {
            memory.prefix + part: memory.tensors[part].view(memory.slots, -1).view(torch.uint8).unbind()
            for part in memory.sliced
        }
        self._there: OrderedDict[int, int] = OrderedDict()
        self.places = self._there
        self._changes, self._changes_seen = 0, -1
        self._hits = self._misses = self._nbytes = 0

    def bring(self, wanted: Wanted) -> None:
        """Begin to copy what is missing, to where nothing was or what was used least recently."""
        assert not isinstance(wanted, torch.Tensor)
        there, changes, memory = self._there, self._changes, self._memory
        slices: list[Slice] = []
        if changes != self._changes_seen:
            there.clear()
            slices += [Slice(name, 0, 1, target) for name, target in memory.shared().items()]
        missing = [expert for expert in wanted if expert not in there]
        for expert in wanted:
            if expert in there:
                there.move_to_end(expert)
        if missing or slices:
            slots = self._free_slots(len(missing))
            self._copies.finish()
            for expert, slot in zip(missing, slots, strict=True):
                self._table[expert] = slot
                slices += [Slice(name, expert, memory.experts, rows[slot]) for name, rows in self._rows.items()]
            self._copies.copy(self._store, slices, self._table, memory.tensors[TABLE])
            there.update(zip(missing, slots, strict=True))
            self._changes_seen = changes
            self._nbytes += sum(each.target.numel() for each in slices)
        self._copies.await_copies()
        self._hits += len(wanted) - len(missing)
        self._misses += len(missing)

    def _free_slots(self, count: int) -> list[int]:
        """Return slots that hold nothing, then those of the experts whose last use is longest ago."""
        used = set(self._there.values())
        free = [slot for slot in range(self._memory.slots) if slot not in used][:count]
        return free + [self._there.popitem(last=False)[1] for _ in range(count - len(free))]

    def forget(self) -> None:
        """Have the next call find nothing."""
        self._changes += 1

    def count(self) -> tuple[int, int, int]:
        """Return what was counted."""
        return self._hits, self._misses, self._nbytes

    def discard(self) -> None:
        """Let torch's allocator wait for the copies."""
        self._copies.discard(self._memory.tensors[TABLE])
