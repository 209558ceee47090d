"""Executes a program by threads of Python's, where there is no `feed.c`."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ..hardware.interrupts import WAIT_S, check_interrupt
from . import feed
from .feed import Feed, Lane, Resources
from .program import Batch, Program
from .ring import as_bytes
from .timeline import plain_event

logger = logging.getLogger(__name__)

# What is read at once into homes. After each read a thread waits for the interpreter's lock, so it is much.
_READ_BYTES = 16 * 2**20
# Every system's preadv takes as many buffers.
_MAX_BUFFERS = 1000


class _Part(NamedTuple):
    """Bytes of a span: its number, the first of them, and how many."""

    span: int
    begin: int
    nbytes: int


class _Slot:
    """Memory of the ring, and when the copies out of it are over."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.copied: torch.cuda.Event | None = None


class _StoppedError(Exception):
    """The load needs no more bytes."""


class ThreadedFeed(Feed):
    """A program that threads of Python's execute."""

    def __init__(self, program: Program, resources: Resources) -> None:
        super().__init__(program, resources)
        lock, ring = threading.Lock(), resources.ring
        self._news, self._room = threading.Condition(lock), threading.Condition(lock)
        self._slots = [] if ring is None else [_Slot(memory) for memory in ring.slots]
        self._read_bytes = _READ_BYTES if ring is None else ring.slot_bytes
        self._cursor, self._within = 0, 0  # the span that is read next, and how much of it is being read
        self._left = [batch.nbytes for batch in program.batches]
        self._complete, self._finished = 0, 0  # batches: that have come, and that were worked on
        self._begun: dict[int, float] = {}
        self._events: dict[int, torch.cuda.Event] = {}
        self._error: BaseException | None = None
        self._is_stopped = self._is_lost = False
        self._threads: list[threading.Thread] = []

    def _start(self) -> None:
        count = min(self._resources.threads, len(self._slots) or self._resources.threads)
        for number in range(count):
            thread = threading.Thread(target=self._work, args=(self._slots[number::count],), daemon=True)
            thread.start()
            self._threads.append(thread)

    def batches(self) -> Iterator[Batch]:
        known, batches = 0, self._program.batches
        while known < len(batches):
            with self._news:
                while self._complete == known and self._error is None:
                    self._news.wait(WAIT_S)
                    check_interrupt()
                complete, error = self._complete, self._error
            if error is not None:
                raise error
            yield from batches[known:complete]
            known = complete

    def take(self, batch: Batch) -> None:
        if batch.number in self._events:
            self.lanes[batch.device].work.wait_event(self._events[batch.number])

    def done(self, batch: Batch) -> None:
        if batch.number in self._events:
            self._events[batch.number].record(self.lanes[batch.device].work)
        with self._room:
            self._finished += 1
            self._room.notify_all()

    def begun(self, batch: Batch) -> float:
        return self._begun[batch.number]

    def _stop(self) -> bool:
        self._give_up(None)
        end = time.monotonic() + feed.END_S
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        while self._is_lost or not self._is_quiet():
            if self._is_lost or time.monotonic() > end:
                logger.warning("a file system or a GPU does not answer: what waits for it is left alone")
                return False
            time.sleep(1e-4)
        return True

    def _is_quiet(self) -> bool:
        """Whether no thread reads, and no GPU copies out of a slot: from then on it may be another load's."""
        copied = (slot.copied is None or slot.copied.query() for slot in self._slots)  # type: ignore[no-untyped-call]
        return not any(thread.is_alive() for thread in self._threads) and all(copied)

    def _give_up(self, error: BaseException | None) -> None:
        with self._room:
            self._error = self._error or error
            self._is_stopped = True
            self._room.notify_all()
            self._news.notify_all()

    def _work(self, slots: Sequence[_Slot]) -> None:
        turns = itertools.cycle(slots)
        try:
            while parts := self._next_parts():
                lane = self.lanes.get(self._batch_of(parts[0]).device)
                if lane is None:
                    self._bring_home(parts)
                else:
                    self._bring_away(parts, lane, next(turns))
        except _StoppedError:
            pass
        except BaseException as error:
            self._give_up(error)

    def _next_parts(self) -> list[_Part]:
        """Give out what one read gets: bytes that lie side by side in a file, for one device."""
        parts, room = list[_Part](), self._read_bytes
        with self._room:
            while self._cursor < len(self._program.pieces) and room and len(parts) < _MAX_BUFFERS:
                batch = self._batch_of(_Part(self._cursor, 0, 0))
                if self._is_stopped or (parts and not self._goes_on(parts, batch)):
                    break
                self._begun.setdefault(batch.number, time.perf_counter())
                left = self._program.spans[5 * self._cursor + 2] - self._within
                parts.append(_Part(self._cursor, self._within, min(left, room)))
                room -= parts[-1].nbytes
                self._within += parts[-1].nbytes
                if parts[-1].nbytes == left:
                    self._cursor, self._within = self._cursor + 1, 0
        return parts

    def _goes_on(self, parts: Sequence[_Part], batch: Batch) -> bool:
        """Whether the next span follows in the file, for the same device and for no batch that waits for these."""
        first, (file, offset) = self._batch_of(parts[0]), self._place_of(parts[-1])
        after = -1 if batch.after is None else batch.after.number
        follows = (file, offset + parts[-1].nbytes) == self._place_of(_Part(self._cursor, self._within, 0))
        return follows and batch.device == first.device and after < first.number

    def _batch_of(self, part: _Part) -> Batch:
        return self._program.batches[self._program.spans[5 * part.span + 4]]

    def _place_of(self, part: _Part) -> tuple[int, int]:
        """Return the number of its file, and the offset there."""
        file, offset = self._program.spans[5 * part.span : 5 * part.span + 2]
        return file, offset + part.begin

    def _target_of(self, part: _Part) -> torch.Tensor:
        task, first, _, at = self._program.pieces[part.span]
        if at is None:
            assert task.home is not None
            begin = first * task.tensor.dtype.itemsize + part.begin
            return task.home.view(-1).view(torch.uint8)[begin : begin + part.nbytes]
        return self._resources.windows[task.device][at + part.begin : at + part.begin + part.nbytes]

    def _bring_home(self, parts: Sequence[_Part]) -> None:
        """Read into host memory."""
        self._await_room(parts)
        self._read(parts, [as_bytes(self._target_of(part)) for part in parts])
        self._arrive(parts, None)

    def _bring_away(self, parts: Sequence[_Part], lane: Lane, slot: _Slot) -> None:
        """Read into a slot of the ring, and have a GPU copy from there."""
        if slot.copied is not None:
            slot.copied.synchronize()
        filled = slot.memory[: sum(part.nbytes for part in parts)]
        self._read(parts, [as_bytes(filled)])
        self._await_room(parts)
        sources = torch.split(filled, [part.nbytes for part in parts])
        slot.copied = slot.copied or plain_event()
        try:
            lane.copy([self._target_of(part) for part in parts], list(sources))
        finally:  # even after a failure, since some of it may be on its way
            try:
                slot.copied.record(lane.copies)
            except BaseException:
                self._is_lost = True  # nobody knows when it will have come
                raise
        self._arrive(parts, lane)

    def _await_room(self, parts: Sequence[_Part]) -> None:
        """Wait until memory that these go to is free, and have the copies wait for the work on what lies there."""
        for batch in dict.fromkeys(self._batch_of(part).after for part in parts):
            if batch is not None:
                with self._room:
                    while self._finished <= batch.number and not self._is_stopped:
                        self._room.wait()
                if batch.number in self._events:
                    self.lanes[batch.device].copies.wait_event(self._events[batch.number])
        if self._is_stopped:
            raise _StoppedError

    def _read(self, parts: Sequence[_Part], buffers: Sequence[memoryview]) -> None:
        number, offset = self._place_of(parts[0])
        while buffers:
            error = None
            try:
                received = os.preadv(self._descriptors[number], buffers, offset)
            except OSError as raised:
                received, error = 0, raised
            if not received:
                span = next(p.span for p in parts if offset < self._place_of(p)[1] + p.nbytes)
                raise self._failure(span, offset, error) from error
            buffers, offset = _without(buffers, received), offset + received

    def _arrive(self, parts: Sequence[_Part], lane: Lane | None) -> None:
        """Count bytes that have come, or whose copies have been asked for."""
        with self._news:
            for part in parts:
                number = self._program.spans[5 * part.span + 4]
                self._left[number] -= part.nbytes
                if not self._left[number] and lane is not None:
                    # Under the lock: whoever counted before has asked for its copies, and they are before this event.
                    self._events[number] = plain_event()
                    self._events[number].record(lane.copies)
            before = self._complete
            while self._complete < len(self._left) and not self._left[self._complete]:
                self._complete += 1
            if self._complete > before:
                self._news.notify()


def _without(buffers: Sequence[memoryview], count: int) -> Sequence[memoryview]:
    """Drop the first `count` bytes of the buffers."""
    for index, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[index + 1 :]]
        count -= len(buffer)
    return []
