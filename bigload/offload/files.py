"""Weights at rest in files, which are read whenever their group is brought to the device, and never written."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

from ..errors import OffloadError
from ..hardware.layout import Layout, TensorSpec, in_mapping
from ..hardware.pinned import Store, pinned_memory
from ..io.async_reads import Read, Reads
from ..io.ring import reader_threads

# That read one group at once, while another is computed with.
_THREADS = 8
# The bytes of a file, (size,), uint8, as numpy has them; what is written to them stays in memory.
_Pages = Any
# What tells a file from another of its name, and from what it was before it was written again: inode, size and time.
_Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class FilePart:
    """One part of a group as it lies in a file.

    Attributes:
        file: where.
        offset: of its first byte there.
        part: its dtype and shape.
    """

    file: Path
    offset: int
    part: TensorSpec


class FileGroup(Store):
    """A group's parts in files. At rest the model's tensors view the files' pages: what is read is there, if slowly.

    A write to such a tensor stays in memory, and is not what comes to the device.

    Attributes:
        stays_in_page_cache: what was read of the files is left there, to be found again.
    """

    @torch.inference_mode(False)
    def __init__(self, parts: Mapping[str, FilePart]) -> None:
        """Open the files.

        Args:
            parts: where they are, by name.

        Raises:
            OffloadError: a file cannot be opened, or ends before a part does.
        """
        self.layout = Layout({name: where.part for name, where in parts.items()})
        self._parts = dict(parts)
        self.stays_in_page_cache = True
        mapped = {file: _mapped(file) for file in dict.fromkeys(where.file for where in parts.values())}
        self._stamps = {file: stamp for file, (stamp, _) in mapped.items()}
        self.tensors = {}
        for name, where in parts.items():
            _, pages = mapped[where.file]
            if where.offset + where.part.nbytes > len(pages):
                raise OffloadError(f"{name!r} does not lie wholly in {where.file}; the file was cut short")
            self.tensors[name] = in_mapping(pages, where.part.dtype, where.offset, where.part.shape)

    def read_into(self, memory: torch.Tensor) -> None:
        """Read all parts to where the layout has them.

        Args:
            memory: (layout.nbytes or more,), uint8, in host memory.

        Raises:
            OffloadError: a file is gone, cut short, was written again, or cannot be read.
        """
        target = memoryview(memory.numpy())  # type: ignore[arg-type]
        with Reads(min(reader_threads(), _THREADS)) as reads:
            going: list[tuple[str, FilePart, Read]] = []
            for name, where in self._parts.items():
                begin = self.layout.offsets[name]
                part = target[begin : begin + where.part.nbytes]
                with _read_errors_of(name, where.file):
                    going.append((name, where, reads.begin(where.file, [part], where.offset)))
            for name, where, read in going:
                with _read_errors_of(name, where.file):
                    if reads.finish(read) < where.part.nbytes:
                        raise OSError("it was cut short since the model was loaded; load the model anew")
        self.require_unchanged()
        if not self.stays_in_page_cache:
            for name, where in self._parts.items():
                with _read_errors_of(name, where.file):
                    _drop_from_page_cache(where)

    def require_unchanged(self) -> None:
        """Refuse files that are not those which were opened.

        Raises:
            OffloadError: one is gone, was cut short, or written again.
        """
        for file, stamp in self._stamps.items():
            name = next(name for name, where in self._parts.items() if where.file == file)
            with _read_errors_of(name, file):
                if _stamp(file.stat()) != stamp:
                    raise OSError("it was cut short or written again since the model was loaded; load the model anew")


def _stamp(stat: os.stat_result) -> _Stamp:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


@contextmanager
def _read_errors_of(name: str, file: Path) -> Iterator[None]:
    """Say of an error what could not be read from where."""
    try:
        yield
    except OSError as error:
        raise OffloadError(f"{name!r} cannot be read from {file}, which the model needs as it runs: {error}") from error


def _drop_from_page_cache(part: FilePart) -> None:
    if not hasattr(os, "posix_fadvise"):
        return
    # Whole pages, since the system drops no others, and no larger pieces of its cache of which one is left.
    begin = part.offset // mmap.PAGESIZE * mmap.PAGESIZE
    nbytes = -(-(part.offset + part.part.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE - begin
    descriptor = os.open(part.file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, begin, nbytes, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def limit_page_cache(groups: Sequence[FileGroup], nbytes: int) -> None:
    """Let so many groups stay in the page cache as it has room for, and drop the others whenever they were read.

    What is read round and round, and is more than there is room for, would else always have been dropped just before
    it is wanted again. Those that are dropped are spread evenly, so that the disk has time for each.

    Args:
        groups: in the order in which they are read.
        nbytes: room in the page cache.
    """
    total, count = sum(group.layout.nbytes for group in groups), len(groups)
    dropped = count - count * nbytes // total if total > nbytes else 0
    for index, group in enumerate(groups):
        group.stays_in_page_cache = (index + 1) * dropped // count == index * dropped // count


# One for each file, of which a model may have several weights.
_mappings: WeakValueDictionary[tuple[Path, _Stamp], _Pages] = WeakValueDictionary()


def _mapped(file: Path) -> tuple[_Stamp, _Pages]:
    """Map a file, without a descriptor that stays open: a model may have weights in more files than there may be."""
    try:
        stat = file.stat()
        stamp = _stamp(stat)
        pages = _mappings.get((file, stamp))
        if pages is None:
            pages = torch.from_file(str(file), shared=False, size=stat.st_size, dtype=torch.uint8).numpy()
            _mappings[file, stamp] = pages
        return stamp, pages
    except (OSError, RuntimeError) as error:
        raise OffloadError(f"{file} cannot be opened: {error}") from error


class Staging:
    """Two pinned buffers that weights pass through in turn, each again when the copy out of it is done."""

    def __init__(self) -> None:
        self._buffers: list[tuple[torch.Tensor, torch.cuda.Event]] = []

    def take(self, nbytes: int) -> tuple[torch.Tensor, torch.cuda.Event]:
        """Return a buffer that nobody copies from, (nbytes or more,), and the event to record after the copy."""
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
