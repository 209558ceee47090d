"""Safetensors files written a tensor at a time: the layout first, from sizes alone, then the bytes in any order.

Source of the format: the safetensors README, "Format"; within a file tensors lie by the size of their elements, the
largest first, as its own writer lays them, so that none is misaligned.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .checkpoint import DTYPES
from .errors import CheckpointError

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX_NAME = "model.safetensors.index.json"


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


@dataclass
class _Shard:
    entries: list[Entry] = field(default_factory=list)
    nbytes: int = 0


class ShardWriter:
    """Writes a checkpoint of safetensors files into a folder. Nothing of it is whole before `finish`."""

    def __init__(self, folder: Path, entries: Iterable[Entry], max_shard_bytes: int) -> None:
        """Lay out the files and write their headers.

        Args:
            folder: exists.
            entries: what will be written, in the order in which files are filled.
            max_shard_bytes: of the tensors in a file; one that is larger has a file of its own.

        Raises:
            CheckpointError: a dtype that safetensors does not have.
            OSError: the folder cannot be written to.
        """
        self._folder = folder
        self._entries: dict[str, Entry] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        self._unwritten: set[str] = set()
        self._descriptors: dict[Path, int] = {}
        shards = _divided(entries, max_shard_bytes)
        try:
            for number, shard in enumerate(shards, 1):
                self._lay_out(folder / _file_name(number, len(shards)), shard.entries)
        except BaseException:
            self.close()
            raise

    def _lay_out(self, path: Path, entries: list[Entry]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for entry in sorted(entries, key=lambda entry: -entry.dtype.itemsize):
            if entry.dtype not in _NAMES:
                raise CheckpointError(f"'{entry.name}' is {entry.dtype}, which safetensors files cannot hold")
            begin, end = end, end + entry.nbytes
            header[entry.name] = {
                "dtype": _NAMES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        for entry in entries:
            offsets = header[entry.name]["data_offsets"]  # type: ignore[index]
            self._entries[entry.name] = entry
            self._places[entry.name] = path, start + offsets[0]
        self._unwritten.update(entry.name for entry in entries)
        descriptor = self._descriptors[path] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        _write(descriptor, memoryview(len(text).to_bytes(8, "little") + text), 0)
        os.ftruncate(descriptor, start + end)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, from whatever device.

        Raises:
            OSError: the disk is full, for instance.
        """
        entry = self._entries[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), name
        values = tensor.detach().to("cpu").contiguous().view(-1)
        path, offset = self._places[name]
        if values.numel():
            _write(self._descriptors[path], memoryview(values.view(torch.uint8).numpy()), offset)  # type: ignore[arg-type]
        self._unwritten.discard(name)

    def finish(self) -> None:
        """Make all of it lasting, and write the index of several files.

        Raises:
            OSError: the disk is full, for instance.
        """
        assert not self._unwritten, self._unwritten
        for descriptor in self._descriptors.values():
            os.fsync(descriptor)
        if len(self._descriptors) > 1:
            weight_map = {name: path.name for name, (path, _) in self._places.items()}
            total = sum(entry.nbytes for entry in self._entries.values())
            write_json(self._folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
        self.close()

    def close(self) -> None:
        """Close the files."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


def write_json(path: Path, content: object) -> None:
    """Write a JSON file and make it lasting."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, sort_keys=True, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _divided(entries: Iterable[Entry], most: int) -> list[_Shard]:
    shards = [_Shard()]
    for entry in entries:
        if shards[-1].entries and shards[-1].nbytes + entry.nbytes > most:
            shards.append(_Shard())
        shards[-1].entries.append(entry)
        shards[-1].nbytes += entry.nbytes
    return shards


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def _write(descriptor: int, buffer: memoryview, offset: int) -> None:
    while buffer:
        written = os.pwrite(descriptor, buffer, offset)
        buffer, offset = buffer[written:], offset + written


@contextmanager
def new_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Fill a folder that is not there before all of it is: under another name beside it, then renamed.

    Args:
        target: where it is to be; nothing is lost there if the block fails.
        overwrite: whether what is there may be replaced.

    Yields:
        The folder to fill.

    Raises:
        CheckpointError: something is there that may not be replaced, or the folder cannot be written.
    """
    target = Path(os.path.realpath(target))
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"'{target}' is a file: name a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise CheckpointError(f"'{target}' is not empty: name another folder, or pass overwrite=True to replace it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise CheckpointError(f"'{target}' cannot be written: {error}") from error
    try:
        made.chmod(0o777 & ~_umask())  # as any other folder: mkdtemp's is its owner's alone
        yield made
        _sync(made)
        _replace(target, made)
        _sync(target.parent)
    except OSError as error:
        raise CheckpointError(f"'{target}' cannot be written: {error}; nothing there has been changed") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _replace(target: Path, made: Path) -> None:
    if not target.exists():
        made.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    target.rename(aside)  # onto an empty folder
    try:
        made.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0o022)  # it cannot be asked for without being set
    os.umask(mask)
    return mask
