"""Weights at rest in files, which are read whenever their group is brought to the device, and never written."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

import torch

from .errors import OffloadError
from .formats import Part
from .host import Layout, Store, in_mapping


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
    part: Part


class FileGroup(Store):
    """A group's parts in files. At rest the model's tensors view the files' pages: what is read is there, if slowly.

    A write to such a tensor stays in memory, and is not what comes to the device.
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
        files = dict.fromkeys(where.file for where in parts.values())
        mappings = {file: _mapped(file) for file in files}
        self._stamps = {file: _stamp(file.stat()) for file in files}
        self.tensors = {}
        for name, where in parts.items():
            if where.offset + where.part.nbytes > len(mappings[where.file]):
                raise OffloadError(f"{name!r} does not lie wholly in {where.file}; the file was cut short")
            mapping = mappings[where.file]
            self.tensors[name] = in_mapping(mapping, where.part.dtype, where.offset, where.part.shape)

    def read_into(self, memory: torch.Tensor) -> None:
        """Read all parts to where the layout has them.

        Args:
            memory: (layout.nbytes or more,), uint8, in host memory.

        Raises:
            OffloadError: a file is gone, cut short, or cannot be read.
        """
        opened: dict[Path, int] = {}
        target = memoryview(memory.numpy())  # type: ignore[arg-type]
        try:
            for name, where in self._parts.items():
                begin = self.layout.offsets[name]
                _read(opened, self._stamps, name, where, target[begin : begin + where.part.nbytes])
        finally:
            for descriptor in opened.values():
                os.close(descriptor)


def _stamp(stat: os.stat_result) -> tuple[int, int, int]:
    """Tell a file from another of its name, and from what it was before it was written again."""
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _read(
    opened: dict[Path, int],
    stamps: Mapping[Path, tuple[int, int, int]],
    name: str,
    where: FilePart,
    target: memoryview,
) -> None:
    done = 0
    try:
        if where.file not in opened:
            opened[where.file] = os.open(where.file, os.O_RDONLY)
            if _stamp(os.fstat(opened[where.file])) != stamps[where.file]:
                raise OffloadError(
                    f"{name!r} cannot be read: {where.file} was cut short or written again since the model was loaded, "
                    "which needs it as it was; load the model anew"
                )
        while done < len(target):
            count = os.preadv(opened[where.file], [target[done:]], where.offset + done)
            if not count:
                raise OffloadError(
                    f"{name!r} cannot be read: {where.file} was cut short; the model needs it as it runs"
                )
            done += count
    except OSError as error:
        raise OffloadError(
            f"{name!r} cannot be read from {where.file}, which the model needs as it runs: {error}"
        ) from error


class _PrivateMapping(mmap.mmap):
    """The pages of a file; what is written to them stays in memory."""


# One for each file: a mapping holds a descriptor, and a model may have hundreds of weights in files.
_mappings: WeakValueDictionary[tuple[Path, tuple[int, int, int]], _PrivateMapping] = WeakValueDictionary()


def _mapped(file: Path) -> mmap.mmap:
    try:
        with file.open("rb") as opened:
            key = file, _stamp(os.fstat(opened.fileno()))
            mapping = _mappings.get(key)
            if mapping is None:
                mapping = _mappings[key] = _PrivateMapping(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            return mapping
    except (OSError, ValueError) as error:
        raise OffloadError(f"{file} cannot be opened: {error}") from error


class Staging:
    """Two pinned buffers that files are read into in turn, each again when the copy out of it is done."""

    def __init__(self) -> None:
        self._buffers: list[tuple[torch.Tensor, torch.cuda.Event]] = []

    def take(self, nbytes: int) -> tuple[torch.Tensor, torch.cuda.Event]:
        """Give a buffer that nobody copies from, (nbytes or more,), and the event to record after the copy."""
        with torch.inference_mode(False):
            if len(self._buffers) < 2:
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._buffers.append((torch.empty(nbytes, dtype=torch.uint8, pin_memory=True), event))
            else:
                memory, event = self._buffers.pop(0)
                event.synchronize()
                if memory.numel() < nbytes:
                    memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
                self._buffers.append((memory, event))
        return self._buffers[-1]
