"""Executes a program: threads bring its bytes to where they go. This is what all executors have in common."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CheckpointError
from .program import Batch, Program
from .ring import Ring, needs_ring

# A file system that does not answer for as long is left alone, with the memory that it reads into.
END_S = 10


@dataclass(frozen=True, eq=False)
class Resources:
    """What a program is executed with.

    Attributes:
        windows: by device, (bytes,), uint8: where the batches go that go to no home.
        ring: pinned memory through which bytes pass to GPUs; None where none go there.
        threads: that read.
    """

    windows: Mapping[torch.device, torch.Tensor]
    ring: Ring | None
    threads: int


class Lane:
    """The streams of a GPU: one of its own, on which bytes come, and the default stream, which works on them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copies: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.work: Any = torch.cuda.default_stream(device)

    def begin(self) -> None:
        """Have copies wait for earlier work: homes and windows may have been other tensors' memory."""
        self.copies.wait_stream(self.work)

    def copy(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        """Copy pinned memory there, each (bytes,), uint8, on the stream for it."""
        with torch.cuda.stream(self.copies):
            torch._foreach_copy_(targets, sources, non_blocking=True)


class Feed(AbstractContextManager["Feed"]):
    """One execution of a program. It reads in the `with` block, whose end waits for all reads and copies.

    Attributes:
        lanes: of the GPUs that bytes go to.
        is_done: whether nothing reads or copies any more; False after the block if that wait was given up.
    """

    def __init__(self, program: Program, resources: Resources) -> None:
        self.is_done = True
        self._program, self._resources = program, resources
        self._descriptors: list[int] = []
        devices = dict.fromkeys(batch.device for batch in program.batches)
        self.lanes = {device: Lane(device) for device in devices if needs_ring(device)}

    @abstractmethod
    def batches(self) -> Iterator[Batch]:
        """Yield each batch when it is there, or on its way to a GPU: `take` it, work on it, and say that it is `done`.

        Raises:
            CheckpointError: a file cannot be read, or ends before a tensor does.
            RuntimeError: a GPU failed.
        """

    @abstractmethod
    def take(self, batch: Batch) -> None:
        """Have what is launched on the default stream from here on wait for a batch. Its GPU is the current one."""

    @abstractmethod
    def done(self, batch: Batch) -> None:
        """Let the memory of a batch be used again, after what has been launched. Its GPU is the current one."""

    @abstractmethod
    def begun(self, batch: Batch) -> float:
        """Return when the first byte of a batch was asked for, as `time.perf_counter` counts."""

    @abstractmethod
    def _start(self) -> None:
        """Begin to read."""

    @abstractmethod
    def _stop(self) -> bool:
        """Read no further, and wait for `END_S` at most. Return whether nothing reads or copies any more.

        The host waits for the copies: their slots, and the homes after an error, may be used by others right away.
        """

    def __enter__(self) -> Feed:
        try:
            self._open()
            for lane in self.lanes.values():
                lane.begin()
            self.is_done = False
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        self._end()

    def _end(self) -> None:
        try:
            self.is_done = self.is_done or self._stop()
        finally:
            if self.is_done:
                while self._descriptors:
                    os.close(self._descriptors.pop())
            else:
                _abandoned.append(self)

    def _open(self) -> None:
        for file in self._program.files:
            try:
                self._descriptors.append(os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)))
            except OSError as error:
                first = next(piece.task.tensor for piece in self._program.pieces if piece.task.tensor.file == file)
                raise CheckpointError(f"reading '{first.name}' from '{file}' failed: {error}") from error

    def _failure(self, span: int, at: int, error: OSError | None) -> CheckpointError:
        """Return the error of a span's read at an offset in its file; without an error the file has ended there."""
        tensor = self._program.pieces[span].task.tensor
        if error is None:
            return CheckpointError(
                f"'{tensor.file}' ended while '{tensor.name}' was read: it was truncated meanwhile, to {at} bytes"
            )
        return CheckpointError(f"reading '{tensor.name}' from '{tensor.file}' failed at byte {at}: {error}")


# Executions whose threads were left alone. They keep the memory that these may still use.
_abandoned: list[Feed] = []
