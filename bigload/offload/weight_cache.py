"""Weights that are offloaded to the disk: read from the checkpoint itself, or quantized once into files of a folder.

A file holds one weight. Its name is a hash of everything that its bytes depend on: the checkpoint's file (its header,
size and time), the tensors in it, the format, the dtypes, bitsandbytes' version and the kind of device that quantized.
So a load with another device map finds the file too, and a load of a changed checkpoint does not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..checkpoint.merged import MergedTensor
from ..checkpoint.safetensors import read_header
from ..checkpoint.scaled.tensor import ScaledTensor
from ..errors import CheckpointError, OffloadError, reason
from ..io.tensors import ComputedTensor, LazyTensor, StoredTensor, read_at
from ..planning.planned_tensors import PlannedTensor
from ..planning.sources import Source
from ..quantization.bnb import library
from .files import FilePart

logger = logging.getLogger(__name__)

# To be increased when the same weight would be written differently.
_VERSION = 1
_SAMPLE_BYTES = 2**12
# Files are written in a subfolder, since save_file makes temporary files beside them. Each user has their own, since
# several may write to one folder.
_WRITING = f".writing-{os.getuid()}" if hasattr(os, "getuid") else ".writing"
# Unfinished files that are older were left by a process that was killed: no weight takes so long to write.
_LEFT_BEHIND_S = 3600


class WeightCache:
    """The files of quantized weights in one folder."""

    def __init__(self, folder: str | os.PathLike[str] | None, torch_dtype: torch.dtype) -> None:
        """Use a folder, which is created with the first file.

        Args:
            folder: None if nothing will be written, which the plan has checked.
            torch_dtype: the dtype that weights are cast to before they are quantized.
        """
        self._folder = None if folder is None else Path(folder).expanduser().absolute()
        self._torch_dtype = torch_dtype
        self._fingerprints = SourceFingerprints(with_samples=True)
        self._is_swept = False

    def parts(self, planned: PlannedTensor) -> dict[str, FilePart] | None:
        """Find a tensor's parts in files, by their names in its format; None if they are not written yet."""
        stored = planned.stored_as_is
        if stored is not None:
            return {"weight": FilePart(stored.file, stored.offset, planned.format.parts(planned.shape)["weight"])}
        return _read_parts(self._path(planned), planned)

    def put(self, planned: PlannedTensor, tensors: Mapping[str, torch.Tensor]) -> dict[str, FilePart]:
        """Write a tensor's parts.

        Args:
            planned: the tensor.
            tensors: its parts by their names in its format, on any device.

        Raises:
            OffloadError: the folder cannot be written, for instance because the disk is full.
        """
        path = self._path(planned)
        partial = path.parent / _WRITING / f"{path.name}.{os.getpid()}.{threading.get_ident()}"
        try:
            self._make_folder(partial.parent)
            partial.touch()
            mode = partial.stat().st_mode  # follows the user's umask, where save_file lets nobody else read
            save_file({part: tensor.detach().cpu().contiguous() for part, tensor in tensors.items()}, partial)
            partial.chmod(mode)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            _publish(partial, path, planned)
        except (OSError, SafetensorError) as error:
            raise OffloadError(f"offload_folder '{self._folder}' cannot be written: {reason(error)}") from error
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        found = _read_parts(path, planned)
        if found is None:
            raise OffloadError(f"'{path}' is not what was just written there: is another program writing it?")
        return found

    def _make_folder(self, folder: Path) -> None:
        """Create the folder for unfinished files, and delete those that killed processes have left there."""
        folder.mkdir(parents=True, exist_ok=True)
        if self._is_swept:
            return
        for path in folder.iterdir():
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _LEFT_BEHIND_S:
                    path.unlink()
        self._is_swept = True

    def _path(self, planned: PlannedTensor) -> Path:
        assert self._folder is not None
        key = {
            "version": _VERSION,
            "bitsandbytes": library().__version__,
            "device": planned.device.type,
            "format": str(planned.format),
            "dtype": str(self._torch_dtype),
            "shape": planned.shape,
            "sources": [self._fingerprints.of(source) for source in planned.sources],
        }
        return self._folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:40]}.safetensors"


def _publish(partial: Path, path: Path, planned: PlannedTensor) -> None:
    """Give a finished file its name, unless another thread or program was faster: a model may be using that file."""
    try:
        os.link(partial, path)
    except OSError:  # the name is taken, or the file system has no links
        if not path.is_file() or _read_parts(path, planned) is None:
            partial.replace(path)


def _read_parts(path: Path, planned: PlannedTensor) -> dict[str, FilePart] | None:
    """Read a file's header and return its parts; None if it is not there, damaged, or holds something else.

    Raises:
        OffloadError: the file may not be read.
    """
    expected = planned.format.parts(planned.shape)
    try:
        there = read_header(path)
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise OffloadError(
            f"'{path}' belongs to another user and cannot be read ({error}): name an offload_folder of your own"
        ) from error
    except (CheckpointError, OSError) as error:
        logger.warning("'%s' is damaged and will be written again: %s", path, error)
        return None
    if {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in there.items()} != {
        name: tuple(part) for name, part in expected.items()
    }:
        logger.warning("'%s' holds something else and will be written again", path)
        return None
    return {name: FilePart(path, there[name].offset, part) for name, part in expected.items()}


class SourceFingerprints:
    """Identifies the sources of weights, without reading the files in full."""

    def __init__(self, *, with_samples: bool) -> None:
        """Create it.

        Args:
            with_samples: whether to read a little of each tensor as well: two files with the same header may also have
                the same size and time.
        """
        self._with_samples = with_samples
        self._files: dict[Path, list[object]] = {}

    def of(self, source: Source) -> list[object]:
        """Return values for JSON that differ if the source's bytes differ.

        Raises:
            CheckpointError: a file cannot be read.
        """
        tensor = source.tensor
        region = [str(source.region), source.transposed]
        if isinstance(tensor, (torch.Tensor, ComputedTensor)):  # the model's own, or its code's: in no file
            values = tensor if isinstance(tensor, torch.Tensor) else tensor.load()
            return [content_hash(values), str(tensor.dtype), *region]
        if isinstance(tensor, MergedTensor):  # of several files
            return [*region, *(self.of(Source(piece)) for piece in tensor.pieces)]
        if isinstance(tensor, ScaledTensor):
            return [tensor.kind, *region, *(self.of(Source(part)) for part in (tensor.numbers, tensor.scales))]
        try:
            return [*self._of_stored(tensor), *region]
        except OSError as error:
            raise CheckpointError(f"reading '{tensor.name}' from '{tensor.file}' failed: {error}") from error

    def _of_stored(self, tensor: StoredTensor) -> list[object]:
        if tensor.file not in self._files:
            stat = tensor.file.stat()
            self._files[tensor.file] = [_header_hash(tensor.file), stat.st_size, stat.st_mtime_ns]
        known = [*self._files[tensor.file], tensor.name, str(tensor.dtype), tensor.offset]
        has_sample = self._with_samples and not isinstance(tensor, LazyTensor)
        return [*known, _sample_hash(tensor)] if has_sample else known


def content_hash(tensor: torch.Tensor) -> str:
    """Hash all bytes of a tensor in memory."""
    values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def _sample_hash(tensor: StoredTensor) -> str:
    found = hashlib.sha256()
    with tensor.file.open("rb") as opened:
        for at in (0, tensor.nbytes // 2, max(0, tensor.nbytes - _SAMPLE_BYTES)):
            found.update(read_at(opened.fileno(), tensor.offset + at, min(_SAMPLE_BYTES, tensor.nbytes)))
    return found.hexdigest()


def _header_hash(file: Path) -> str:
    # The first eight bytes of a safetensors file are the length of its header.
    with file.open("rb") as opened:
        begin = opened.read(8)
        length = int.from_bytes(begin, "little") if file.suffix == ".safetensors" else 0
        return hashlib.sha256(begin + opened.read(length)).hexdigest()
