"""Writes safetensors files piece by piece: headers are computed from shapes, then bytes are written in any order.

Source of the format: the safetensors README, "Format". Within a file, tensors are sorted by element size, the largest
first, as in safetensors' own writer, so that all are aligned.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..hardware.interrupts import WAIT_S, check_interrupt, interruptible
from ..hardware.pinned import pinned_memory
from ..io.ring import as_bytes
from .record import layout_of
from .safetensors import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
STEM = "model"  # of the names of files, as transformers has them
# The end of the name of a part of a quantized weight, such as "weight.absmax".
_PART = re.compile(r"(?<![^.])(weight\..+|SCB|weight_format)$")
# Steps that may wait for the disk at the same time; each keeps a file open.
_MAX_WAITING = 4
# A file is synced to the disk after this many bytes, while more is written: the system alone would start much later.
_SYNC_BYTES = 256 * 2**20
# Bytes that are copied from a GPU at once.
_STAGED_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Entry:
    """A tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


class ShardWriter:
    """Writes a checkpoint of safetensors files into a folder; each file has its final name only when it is complete."""

    def __init__(
        self,
        folder: Path,
        entries: Iterable[Entry],
        max_shard_bytes: int,
        stem: str = STEM,
        *,
        joins: bool = False,
    ) -> None:
        """Divide the tensors among files.

        Args:
            folder: exists; complete files of the same layout that are there are kept.
            entries: all tensors, in the order in which files are filled.
            max_shard_bytes: the maximum size of a file's tensors; a larger weight gets a file of its own.
            stem: what the files' names begin with.
            joins: write into files that another process creates and completes.

        Raises:
            CheckpointError: safetensors does not support a dtype.
        """
        self._index = folder / f"{stem}.safetensors.index.json"
        self._syncing = FsyncQueue()
        self._staged: torch.Tensor | None = None
        groups = _split(entries, max_shard_bytes)
        self._shards = [
            _Shard(folder / _file_name(stem, number, len(groups)), group, self._syncing, joins=joins)
            for number, group in enumerate(groups, 1)
        ]
        self._shard_of = {name: shard for shard in self._shards for name in shard.entries}

    @property
    def layout(self) -> str:
        """`record.layout_of` all tensors."""
        entries = (entry for shard in self._shards for entry in shard.entries.values())
        return layout_of((entry.name, entry.dtype, entry.shape) for entry in entries)

    @property
    def places(self) -> str:
        """A hash of all tensors and of the files that they are in, which processes that write together compare."""
        return layout_of(
            (f"{number} {entry.name}", entry.dtype, entry.shape)
            for number, shard in enumerate(self._shards)
            for entry in shard.entries.values()
        )

    def create(self) -> None:
        """Create the files, so that other processes can write into them."""
        for shard in self._shards:
            shard.create()

    def sync(self) -> None:
        """Wait until what was written into files that another process completes is durable."""
        for shard in self._shards:
            shard.sync()

    def is_written(self, name: str) -> bool:
        """Whether a tensor's file is complete."""
        return self._shard_of[name].is_whole

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, from any device.

        Raises:
            OSError: the disk is full, for instance.
        """
        entry = self._shard_of[name].entries[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), name
        self.write_values(name, 0, tensor)
        self.complete(name)

    def write_values(self, name: str, at: int, values: torch.Tensor) -> None:
        """Write some of a tensor's bytes.

        Args:
            name: the tensor.
            at: the offset in the tensor, in bytes.
            values: of any dtype, on any device.

        Raises:
            OSError: the disk is full, for instance.
        """
        values = values.detach().contiguous().view(-1)
        if not values.numel():
            return
        for piece in torch.split(values.view(torch.uint8), _STAGED_BYTES):
            check_interrupt()
            self._shard_of[name].write(name, at, as_bytes(self._on_host(piece)))
            at += len(piece)

    def _on_host(self, piece: torch.Tensor) -> torch.Tensor:
        if piece.device.type != "cuda":
            return piece.cpu()
        if self._staged is None:
            self._staged = pinned_memory(_STAGED_BYTES)
        return self._staged[: len(piece)].copy_(piece)

    def complete(self, name: str) -> None:
        """Mark a tensor as written. After its last tensor, a file is synced in the background, then renamed."""
        self._shard_of[name].complete(name)

    def finish(self) -> None:
        """Wait until all files are durable, and write the index if there are several.

        Raises:
            OSError: the disk is full, for instance.
        """
        self._syncing.finish()
        assert all(shard.is_whole for shard in self._shards)
        if len(self._shards) == 1:
            return
        weight_map = {name: shard.path.name for name, shard in self._shard_of.items()}
        total = sum(entry.nbytes for shard in self._shards for entry in shard.entries.values())
        write_json(self._index, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def close(self) -> None:
        """Close the files."""
        self._syncing.__exit__()
        for shard in self._shards:
            shard.close()


class _Shard:
    """One file.

    Attributes:
        path: its final name, which it has when it is complete.
        entries: its tensors by name.
        is_whole: whether it is complete.
    """

    def __init__(self, path: Path, entries: Sequence[Entry], syncing: FsyncQueue, *, joins: bool = False) -> None:
        self.path, self._syncing, self._joins = path, syncing, joins
        self.entries = {entry.name: entry for entry in entries}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._begins, end = {}, 0
        for entry in sorted(entries, key=lambda entry: -entry.dtype.itemsize):
            if entry.dtype not in _NAMES:
                raise CheckpointError(f"'{entry.name}' is {entry.dtype}, which safetensors files cannot hold")
            self._begins[entry.name] = end
            end += entry.nbytes
            offsets = [self._begins[entry.name], end]
            header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._head, self._nbytes = len(text).to_bytes(8, "little") + text, 8 + len(text) + end
        self._descriptor: int | None = None
        self._unwritten = set(self.entries)
        self._unsynced = 0
        self.is_whole = self._is_there()

    def _is_there(self) -> bool:
        if not self.path.is_file() or self.path.stat().st_size != self._nbytes:
            return False
        with self.path.open("rb") as file:
            return file.read(len(self._head)) == self._head

    @property
    def _partial(self) -> Path:
        return self.path.with_name(f"{self.path.name}.partial")

    def write(self, name: str, at: int, buffer: memoryview) -> None:
        if self.is_whole:  # and written again only because another part of the same weight is not
            return
        descriptor = self._opened()
        _write(descriptor, buffer, len(self._head) + self._begins[name] + at)
        self._unsynced += len(buffer)
        if self._unsynced >= _SYNC_BYTES and self._syncing.is_idle:
            self._unsynced = 0
            self._syncing.begin(partial(os.fsync, descriptor))

    def create(self) -> None:
        self._opened()

    def sync(self) -> None:
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def complete(self, name: str) -> None:
        self._unwritten.discard(name)
        if not self._unwritten and not self.is_whole:
            self._opened()
            self._syncing.begin(self._seal)

    def _seal(self) -> None:
        os.fsync(self._opened())
        self.close()
        self._partial.rename(self.path)
        self.is_whole = True

    def _opened(self) -> int:
        if self._descriptor is None and self._joins:
            self._descriptor = os.open(self._partial, os.O_WRONLY)
        elif self._descriptor is None:
            self._descriptor = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            _write(self._descriptor, memoryview(self._head), 0)
            os.ftruncate(self._descriptor, self._nbytes)
        return self._descriptor

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def write_json(path: Path, content: object) -> None:
    """Write a JSON file and sync it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, sort_keys=True, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _split(entries: Iterable[Entry], max_bytes: int) -> list[list[Entry]]:
    """Divide tensors among files. The parts of a quantized weight stay together: diffusers reads file by file."""
    weights: dict[str, list[Entry]] = {}
    for entry in interruptible(entries):
        weights.setdefault(_PART.sub("weight", entry.name), []).append(entry)
    groups: list[list[Entry]] = [[]]
    filled = 0
    for parts in interruptible(weights.values()):
        nbytes = sum(entry.nbytes for entry in parts)
        if groups[-1] and filled + nbytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1] += parts
        filled += nbytes
    return groups


def _file_name(stem: str, number: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05}-of-{count:05}.safetensors"


def _write(descriptor: int, buffer: memoryview, offset: int) -> None:
    while buffer:
        written = os.pwrite(descriptor, buffer, offset)
        buffer, offset = buffer[written:], offset + written


class FsyncQueue(AbstractContextManager["FsyncQueue"]):
    """Runs steps that wait for the disk, in order, in a thread; the end of the `with` block waits for all.

    An error in a step is raised by a later call.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._going: deque[Future[object]] = deque()

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits for the disk."""
        return all(step.done() for step in self._going)

    def begin(self, step: Callable[[], object]) -> None:
        """Add a step; wait first while too many are pending."""
        self._wait_until(_MAX_WAITING - 1)
        self._going.append(self._pool.submit(step))

    def finish(self) -> None:
        """Wait for all steps."""
        self._wait_until(0)

    def _wait_until(self, max_pending: int) -> None:
        while self._going and (len(self._going) > max_pending or self._going[0].done()):
            while not self._going[0].done():
                wait(self._going, WAIT_S, FIRST_COMPLETED)
                check_interrupt()
            self._going.popleft().result()

    def __exit__(self, *raised: object) -> None:
        self._pool.shutdown()  # complete files are worth the wait
