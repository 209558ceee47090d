"""Offloaded weights in files, which are read whenever their group is copied to the device, and never written."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

from ..errors import CheckpointError, OffloadError
from ..hardware.devices import CPU
from ..hardware.layout import Layout, TensorSpec, in_mapping
from ..hardware.pinned import Store, pinned_memory
from ..io.program import ReadTask, not_taken
from ..io.tensors import Stamp, StoredTensor, stamp_of
from ..io.transfer import read_all

# A private mapping of a file, as a numpy array (size,), uint8: writes to it stay in memory.
_Pages = Any
_CHANGED = "it was changed since the model was loaded; load the model again"
_TRUNCATED = "it was truncated since the model was loaded; load the model again"


@dataclass(frozen=True)
class FilePart:
    """One part of a group in a file.

    Attributes:
        file: the file.
        offset: the offset of its first byte.
        part: its dtype and shape.
    """

    file: Path
    offset: int
    part: TensorSpec


class FileGroup(Store):
    """A group's parts in files. At rest the model's tensors are views of the mapped files, so they can be read, slowly.

    What is written to such a tensor stays in memory, and is read from there from then on: the files never change.

    Attributes:
        stays_in_page_cache: whether the files' pages are left in the system's page cache after a read.
        written: names of the parts whose values are those in memory.
    """

    @torch.inference_mode(False)
    def __init__(self, parts: Mapping[str, FilePart], mappings: Mappings | None = None) -> None:
        """Map the files.

        Args:
            parts: name of each part -> where it is.
            mappings: those of the model that the group belongs to; None makes new ones.

        Raises:
            OffloadError: a file cannot be opened, or ends before a part does.
        """
        self.layout = Layout({name: where.part for name, where in parts.items()})
        self._parts = dict(parts)
        self.stays_in_page_cache = True
        self.written: set[str] = set()
        mappings = mappings or Mappings()
        mapped = {file: mappings.of(file) for file in dict.fromkeys(where.file for where in parts.values())}
        self._stamps = {file: stamp for file, (stamp, _) in mapped.items()}
        self.tensors = {}
        for name, where in parts.items():
            _, pages = mapped[where.file]
            if where.offset + where.part.nbytes > len(pages):
                raise OffloadError(f"{where.file} ends before the end of {name!r}: it was truncated")
            self.tensors[name] = in_mapping(pages, where.part.dtype, where.offset, where.part.shape)

    def read_into(self, memory: torch.Tensor) -> None:
        """Read all parts to their offsets in the layout.

        Args:
            memory: (layout.nbytes or more,), uint8, in host memory.

        Raises:
            OffloadError: a file is gone, was changed, or cannot be read.
        """
        self.require_unchanged()
        views, tasks = self.layout.views(memory), list[ReadTask]()
        for name, where in self._parts.items():
            if name in self.written:
                views[name].copy_(self.tensors[name])
            elif nbytes := where.part.nbytes:
                begin = self.layout.offsets[name]
                stored = StoredTensor(name, where.file, torch.uint8, (nbytes,), where.offset, nbytes)
                tasks.append(ReadTask(stored, CPU, not_taken, memory[begin : begin + nbytes]))
        try:
            read_all(tasks)
        except CheckpointError as error:
            self.require_unchanged()  # which says more
            raise OffloadError(f"{error}, and the model needs it as it runs") from error
        self.require_unchanged()
        if not self.stays_in_page_cache:
            for name, where in self._parts.items():
                with _read_errors_of(name, where.file):
                    _drop_from_page_cache(where)

    def read_slice(self, name: str, index: int, count: int, memory: torch.Tensor) -> None:
        """Read one of `count` slices of a part from its file.

        Raises:
            OffloadError: the file is gone, was changed, or cannot be read.
        """
        where = self._parts[name]
        nbytes = where.part.nbytes // count
        if name in self.written:
            memory.copy_(self.tensors[name].view(-1).view(torch.uint8)[index * nbytes : (index + 1) * nbytes])
            return
        with _read_errors_of(name, where.file):
            if stamp_of(where.file.stat()) != self._stamps[where.file]:
                raise OSError(_CHANGED)
            with where.file.open("rb", buffering=0) as file:
                left, at = memoryview(memory.numpy()), where.offset + index * nbytes  # type: ignore[arg-type]
                while left:
                    received = os.preadv(file.fileno(), [left], at)
                    if not received:
                        raise OSError(_TRUNCATED)
                    left, at = left[received:], at + received

    def use_written(self, name: str) -> None:
        """Read a part from memory from now on, where others have written to it."""
        self.written.add(name)

    def require_unchanged(self) -> None:
        """Refuse files that have changed since they were opened.

        Raises:
            OffloadError: a file is gone, or was written to.
        """
        for file, stamp in self._stamps.items():
            name = next(name for name, where in self._parts.items() if where.file == file)
            with _read_errors_of(name, file):
                if stamp_of(file.stat()) != stamp:
                    raise OSError(_CHANGED)


@contextmanager
def _read_errors_of(name: str, file: Path) -> Iterator[None]:
    """Turn errors of the system into OffloadErrors that name the weight and the file."""
    try:
        yield
    except OSError as error:
        raise OffloadError(f"{name!r} cannot be read from {file}, which the model needs as it runs: {error}") from error


def _drop_from_page_cache(part: FilePart) -> None:
    if not hasattr(os, "posix_fadvise"):
        return
    # The system drops only whole pages, and a large folio only if all of it is named.
    begin = part.offset // mmap.PAGESIZE * mmap.PAGESIZE
    nbytes = -(-(part.offset + part.part.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE - begin
    descriptor = os.open(part.file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, begin, nbytes, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def limit_page_cache(groups: Sequence[FileGroup], nbytes: int) -> None:
    """Let as many groups stay in the page cache as fit, and have the others dropped after each read.

    Without this, groups that are read in turn and do not all fit would each be evicted just before their next read. The
    groups to drop are spread evenly over the depth, so that the disk has time to read each.

    Args:
        groups: in the order in which they are read.
        nbytes: bytes that fit into the page cache.
    """
    total, count = sum(group.layout.nbytes for group in groups), len(groups)
    dropped = count - count * nbytes // total if total > nbytes else 0
    for index, group in enumerate(groups):
        group.stays_in_page_cache = (index + 1) * dropped // count == index * dropped // count


class Mappings:
    """One mapping of each file, which may hold several weights of a model.

    They are the model's own: another one that is loaded from the same files must not see what is written to this one.
    """

    def __init__(self) -> None:
        self._pages: WeakValueDictionary[tuple[Path, Stamp], _Pages] = WeakValueDictionary()

    def of(self, file: Path) -> tuple[Stamp, _Pages]:
        """Map a file, unless it is mapped.

        Raises:
            OffloadError: it cannot be opened.
        """
        # No descriptor stays open: a model's weights may be in more files than a process may open.
        try:
            stat = file.stat()
            stamp = stamp_of(stat)
            pages = self._pages.get((file, stamp))
            if pages is None:
                pages = torch.from_file(str(file), shared=False, size=stat.st_size, dtype=torch.uint8).numpy()
                self._pages[file, stamp] = pages
            return stamp, pages
        except (OSError, RuntimeError) as error:
            raise OffloadError(f"{file} cannot be opened: {error}") from error


class Staging:
    """Two pinned buffers that are used in turn, each when the copy out of it is done.

    Attributes:
        lock: of those who share them, from `take` until the event is recorded.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._buffers: list[tuple[torch.Tensor, torch.cuda.Event]] = []

    def take(self, nbytes: int) -> tuple[torch.Tensor, torch.cuda.Event]:
        """Return a free buffer, (nbytes or more,), uint8, and the event to record after the copy out of it."""
        with torch.inference_mode(False):
            if len(self._buffers) < 2:
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._buffers.append((pinned_memory(nbytes), event))
            else:
                memory, event = self._buffers.pop(0)
                event.synchronize()
                if memory.numel() < nbytes:
                    memory = pinned_memory(nbytes)
                self._buffers.append((memory, event))
        return self._buffers[-1]
