"""A checkpoint's files and the page cache: read by threads, brought into memory, dropped from it. Imports no torch."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

PIECE_BYTES = 4 * 2**20

# Which buffer a piece is read into, from the thread's number and the count of pieces it has read.
Destination = Callable[["Piece", int, int], memoryview]


class Piece(NamedTuple):
    """A run of bytes of a file that is open.

    Attributes:
        descriptor: the file's.
        offset: where in the file it begins.
        nbytes: its length, at most `PIECE_BYTES`.
        position: where it begins in all the files laid end to end.
    """

    descriptor: int
    offset: int
    nbytes: int
    position: int


def shards(folder: Path) -> list[Path]:
    """List the safetensors files of a checkpoint.

    Raises:
        FileNotFoundError: the folder holds none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"'{folder}' holds no safetensors files; `python -m benchmarks make` writes some")
    return files


def total_bytes(files: Sequence[Path]) -> int:
    """Add up the sizes of files."""
    return sum(file.stat().st_size for file in files)


def config_of(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's config.json; empty where there is none."""
    path = folder / "config.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def tensor_count(folder: Path) -> int:
    """Count the tensors of a checkpoint, by the headers of its files."""
    count = 0
    for file in shards(folder):
        with file.open("rb") as opened_file:
            header = json.loads(opened_file.read(int.from_bytes(opened_file.read(8), "little")))
        count += len(header.keys() - {"__metadata__"})
    return count


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def opened(files: Sequence[Path], most: int | None = None) -> Iterator[list[Piece]]:
    """Open files for the length of a `with` block, cut into pieces.

    Args:
        files: in the order in which they are read.
        most: leave out what lies beyond this many bytes.
    """
    with ExitStack() as stack:
        pieces, position = [], 0
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            size = file.stat().st_size
            for offset in range(0, size, PIECE_BYTES):
                pieces.append(Piece(descriptor, offset, min(PIECE_BYTES, size - offset), position + offset))
            position += size
        yield [piece for piece in pieces if most is None or piece.position < most]


def read(pieces: Sequence[Piece], threads: int, destination: Destination) -> float:
    """Read pieces in their order, each by whichever thread is free.

    Returns:
        Seconds it took.

    Raises:
        OSError: a file cannot be read, or became shorter meanwhile.
    """
    waiting = deque(pieces)

    def work(thread: int) -> None:
        turn = 0
        while waiting:
            try:
                piece = waiting.popleft()
            except IndexError:  # another thread was faster
                return
            _fill(piece, destination(piece, thread, turn))
            turn += 1

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, thread) for thread in range(threads)]:
            done.result()
    return time.perf_counter() - started


def _fill(piece: Piece, buffer: memoryview) -> None:
    view, offset = buffer[: piece.nbytes], piece.offset
    while view:
        received = os.preadv(piece.descriptor, [view], offset)
        if not received:
            raise OSError("a file of the checkpoint was cut while it was read")
        view, offset = view[received:], offset + received


def warm(files: Sequence[Path]) -> None:
    """Bring files into the page cache by reading them once."""
    threads = max(2, min(16, cores()))
    buffers = [memoryview(bytearray(PIECE_BYTES)) for _ in range(threads)]
    with opened(files) as pieces:
        read(pieces, threads, lambda piece, thread, turn: buffers[thread])


def drop(files: Sequence[Path]) -> float | None:
    """Drop files from the page cache, so that the next read comes from the disk.

    Returns:
        The share of them that is cached all the same: some file systems keep their pages, as a tmpfs must, and so does
        the kernel where another process maps them. None where the file system does not tell.
    """
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # a page that is not written back yet cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return cached_share(files)


def cached_share(files: Sequence[Path], samples: int = 64) -> float | None:
    """Estimate the share of files that is in the page cache, from single bytes spread over them.

    Returns:
        None where the file system cannot be asked without waiting for the disk.
    """
    with opened(files) as pieces:
        asked = pieces[:: max(1, len(pieces) // samples)]
        try:
            return sum(map(_is_cached, asked)) / len(asked)
        except OSError:  # reads that do not wait are not supported
            return None


def _is_cached(piece: Piece) -> bool:
    offset = piece.offset + piece.nbytes // 2
    try:
        return os.preadv(piece.descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
