"""Which experts are in a cache, kept by the GPU itself: the host waits for no router's choice and for no copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType

import torch

from ...hardware.devices import current_gpu, is_capturing
from ...hardware.pinned import HostGroup, Store
from ...quantization.expert_launches import next_power_of_2, runs_kernels
from ...quantization.packed_experts import BOOK, BOOK_HEAD, BOOK_SLOT, TABLE
from .expert_books import CacheMemory, ExpertBook, Wanted

# The most pairs of token and expert of a call that are taken unread, and that one program compares with all experts.
_MAX_PAIRS, _AT_ONCE = 64, 16
_WORD = 4  # bytes that the kernels copy at once; a thread reads four of them
# Programs for each missing expert, words that each copies at a time, and warps.
_FETCH = {"programs": 16, "block": 4096, "num_warps": 8}


class GpuBook(ExpertBook):
    """A book that the GPU keeps, in two launches a call.

    The first notes what a call wants and chooses where that goes which is missing; the second copies it from host
    memory, which kernels can read if it is pinned. Calls on one stream follow each other, and a call on another stream
    waits for the last one.
    """

    def __init__(self, memory: CacheMemory, store: HostGroup) -> None:
        """Begin with nothing there.

        Raises:
            RuntimeError: the kernels cannot read the store.
        """
        self._memory, self._store, self._device = memory, store, memory.whole.device
        self._index = self._device.index or 0
        self._kernels = _kernels()
        self._table, self._book = memory.tensors[TABLE], memory.tensors[BOOK]
        self._parts_begin = BOOK_HEAD + BOOK_SLOT * memory.slots
        self._target, self._source = _words(memory.whole), _words(store.source)
        self._expert_nbytes = sum(memory.tensors[part][0].nbytes for part in memory.sliced)
        self.places: _PlacesInTable = _PlacesInTable(self._table)
        self._changes, self._changes_seen = 0, -1
        self._shared_nbytes = 0
        self._last = torch.cuda.current_stream(self._device)
        self._blocks = next_power_of_2(memory.experts), next_power_of_2(memory.slots)
        with current_gpu(self._device):
            self._book.zero_()
            self._book[self._parts_begin :].copy_(torch.tensor(_parts(memory, store), device="cpu"))
            self._fetch(1)  # of nothing: this finds out whether it can

    @classmethod
    def suits(cls, memory: CacheMemory, store: Store, device: torch.device) -> bool:
        """Whether the GPU can keep it: there are kernels, and they can read each expert 16 bytes at a time."""
        if device.type != "cuda" or not isinstance(store, HostGroup) or not store.is_pinned or not memory.slots:
            return False
        is_even = all(not number % 4 for number in _parts(memory, store))
        return is_even and runs_kernels(device)

    def takes_unread(self, ids: torch.Tensor) -> bool:
        """Whether there is a slot for each pair, and so for each expert."""
        return ids.numel() <= min(self._memory.slots, _MAX_PAIRS) and ids.device == self._device

    def bring(self, wanted: Wanted) -> None:
        """Launch what keeps the book and copies.

        What a call wants is brought in turns. There are slots for all, and the oldest go: a turn leaves alone what an
        earlier one brought, but what a later one wants may go, and is then copied again.
        """
        if not isinstance(wanted, torch.Tensor):
            wanted = torch.tensor(wanted, dtype=torch.int64, device=self._device)
        changes = self._changes
        self.places.forget()
        if not is_capturing(self._device):  # a replay is ordered when it runs
            self.follow()
        with current_gpu(self._device):  # on which Triton launches
            if changes != self._changes_seen:
                self._empty()
            # Whatever ends this between two launches, the next call empties the table.
            self._changes_seen = -1
            for turn, ids in enumerate(torch.split(wanted.reshape(-1), _AT_ONCE)):
                if pairs := ids.numel():
                    self._admit(ids, pairs, turn == 0)
                    self._fetch(pairs)
            self._changes_seen = changes

    def _admit(self, ids: torch.Tensor, pairs: int, is_first: bool) -> None:
        self._kernels.admit[(1,)](
            ids,
            self._table,
            self._book,
            pairs,
            int(is_first),
            self._memory.experts,
            self._memory.slots,
            next_power_of_2(pairs),
            *self._blocks,
            num_warps=1,
        )

    def _fetch(self, pairs: int) -> None:
        self._kernels.fetch[(_FETCH["programs"], pairs)](
            self._source,
            self._target,
            self._book,
            self._memory.slots,
            len(self._memory.sliced),
            _FETCH["block"],
            num_warps=_FETCH["num_warps"],
        )

    def _empty(self) -> None:
        self._table.fill_(-1)
        self._book[BOOK_HEAD : self._parts_begin].zero_()
        for name, target in self._memory.shared().items():
            target.copy_(self._store.slice_of(name, 0, 1), non_blocking=True)
            self._shared_nbytes += target.numel()

    @property
    def is_current(self) -> bool:
        """Whether the table names what is there, and nothing at rest has changed since: a replay may go on from it."""
        return self._changes == self._changes_seen

    def note_replay(self) -> None:
        """Have the table read again when it is next asked for: a replay changes it."""
        self.places.forget()

    def follow(self) -> None:
        """Have the current stream wait for the last call, if that was on another one."""
        if torch._C._cuda_getCurrentRawStream(self._index) != self._last.cuda_stream:
            current = torch.cuda.current_stream(self._device)  # which takes ten times as long
            current.wait_stream(self._last)
            self._last = current

    def forget(self) -> None:
        """Have the next call find nothing."""
        self._changes += 1

    def count(self) -> tuple[int, int, int]:
        """Read the counts from the GPU, when the last call has run, whatever its stream."""
        self._last.synchronize()
        _, hits, misses, _ = self._book[:BOOK_HEAD].tolist()
        return hits, misses, misses * self._expert_nbytes + self._shared_nbytes

    def discard(self) -> None:
        """Let torch's allocator wait for the last call's stream, which has waited for the others."""
        self._table.record_stream(self._last)


class _PlacesInTable(Mapping[int, int]):
    """Reads a table on the GPU, once a call: only ways to compute that wait for the GPU anyway ask for it."""

    def __init__(self, table: torch.Tensor) -> None:
        self._table = table
        self._read: dict[int, int] | None = None

    def __getitem__(self, expert: int) -> int:
        return self._there()[expert]

    def __iter__(self) -> Iterator[int]:
        return iter(self._there())

    def __len__(self) -> int:
        return len(self._there())

    def forget(self) -> None:
        """Read it again when it is next asked for."""
        self._read = None

    def _there(self) -> dict[int, int]:
        if self._read is None:
            self._read = {expert: slot for expert, slot in enumerate(self._table.tolist()) if slot >= 0}
        return self._read


def _parts(memory: CacheMemory, store: HostGroup) -> list[int]:
    """Return for each part, in words: where it begins in the store, its size in each expert, where it goes.

    What does not fit into words is odd, so that it is not taken for four of them.
    """
    found = []
    for part in memory.sliced:
        each = memory.tensors[part][0].nbytes
        found += [store.layout.offsets[memory.prefix + part], each, memory.layout.offsets[part]]
    return [number // _WORD if number % _WORD == 0 else 1 for number in found]


def _words(memory: torch.Tensor) -> torch.Tensor:
    return memory[: memory.numel() // _WORD * _WORD].view(torch.int32)


def _kernels() -> ModuleType:
    from . import cache_kernels

    return cache_kernels
