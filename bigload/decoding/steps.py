"""One captured step: its graph, the places of what it is given, and the cache that it works on."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .cache_state import CacheState, LeftLayer
from .calls import Call, UnknownOutputError, output_maker
from .graphs import Graphs
from .lending import lend
from .lookups import Lookups


class NotCapturedError(Exception):
    """A step cannot be captured; the message says why. What it was called with is as it was before."""


class CachePlace:
    """Where caches lie in memory that graphs work on, several of them maybe: as a window fills, and when it is full.

    Attributes:
        tensors: what lies there.
        users: weak references to the caches that lie there now, and to what is in them: who has a layer, or a shallow
            copy of a cache, uses the place too.
    """

    def __init__(self, tensors: list[torch.Tensor], state: CacheState) -> None:
        self.tensors, self.users = tensors, state.objects

    def is_free_for(self, objects: Sequence[weakref.ref[Any]]) -> bool:
        """Whether nobody but those with some caches uses it."""
        theirs = {id(found) for each in objects if (found := each()) is not None}
        return all(user() is None or id(user()) in theirs for user in self.users)

    def overlaps(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether one of some tensors lies there."""
        known = {id(tensor) for tensor in self.tensors}
        return any(id(tensor) in known for tensor in tensors)


class CapturedStep:
    """A graph of one step, for calls with one key and caches with one signature.

    Attributes:
        key: of the calls.
        place: of its caches.
        nbytes: that were reserved on the device for it.
        seconds: that the capture took.
    """

    def __init__(
        self,
        key: Any,
        call: Call,
        state: CacheState,
        place: CachePlace,
        lookups: Lookups,
        run: Callable[..., Any],
        graphs: Graphs,
    ) -> None:
        """Capture a step; nothing of it is run.

        Args:
            key: of the call.
            call: the call, which is not kept.
            state: of its caches.
            place: of these.
            lookups: of a step that ran as before.
            run: the step, called with the arguments of the call.
            graphs: captures.

        Raises:
            NotCapturedError: it cannot be captured.
        """
        begun, reserved = time.perf_counter(), graphs.allocated()
        self.key, self._graphs, self._others = key, graphs, call.others
        self._rows = call.rows
        self._owners, self._lookups = [weakref.ref(each) for each in call.states], lookups
        self._state, self._own, self.place = state, state.tensors(), place
        self._left: list[LeftLayer] | None = None  # of the cache that was there last
        before = state.snapshot()
        try:
            with torch.inference_mode(False):
                self._inputs = [torch.empty_like(tensor) for tensor in call.tensors]
                self._masks = [mask.place() for mask in call.masks]
            self._fill(call)
            args, kwargs = call.with_tensors(self._inputs)

            def step() -> Any:
                with lookups.captured(self._inputs):
                    return run(*args, **call.with_masks(kwargs, self._masks))

            with state.watched() as asked, _without_kept_casts():
                self._graph, output = graphs.capture(step)
            if reason := problem_of(state, before, asked):
                raise NotCapturedError(reason)
            self._output: Callable[[Call], Any] = output_maker(output, call, self._inputs)
        except NotCapturedError:
            raise
        except UnknownOutputError as error:
            raise NotCapturedError(str(error)) from error
        except Exception as error:
            raise NotCapturedError(_said(error)) from error
        finally:
            state.restore(before)
        self.seconds, self.nbytes = time.perf_counter() - begun, max(0, graphs.allocated() - reserved)

    def _fill(self, call: Call) -> None:
        if self._inputs:
            torch._foreach_copy_(self._inputs, call.tensors)
        for place, mask in zip(self._masks, call.masks, strict=True):
            place.fill(mask)
        self._lookups.fill(call)

    def is_of(self, states: Sequence[Any]) -> bool:
        """Whether these are the caches that it works on."""
        return len(self._owners) == len(states) and all(
            owner() is state for owner, state in zip(self._owners, states, strict=True)
        )

    def let_go(self) -> None:
        """Keep nothing of a cache that is no more."""
        if self._left is None and any(owner() is None for owner in self._owners):
            self._left, self._state = self._state.left(self._own), CacheState(())

    def is_free_for(self, state: CacheState) -> bool:
        """Whether nobody has the caches any more that lie where it works, unless a call has them."""
        return self.place.is_free_for(state.objects)

    @property
    def is_left(self) -> bool:
        """Whether the caches that lay where it works are no more."""
        return self._left is not None and self.place.is_free_for(())

    def lend_to(self, cache: Any, rows: int) -> bool:
        """Give the tensors of a cache that is no more to one that has none; say whether it has them."""
        if len(self._owners) != 1 or rows != self._rows or not lend(self._left or (), cache):
            return False
        self.place.users = CacheState([cache]).objects
        return True

    def finds_all_in_place(self) -> bool:
        """Whether its caches hold what they did after its last run."""
        return self._state.is_same()

    def replay(self, call: Call, state: CacheState | None = None) -> Any:
        """Run the step.

        Args:
            call: of the same key.
            state: of its caches, if they are others than those of the last run, or hold others than then.

        Returns:
            What the step returns, in memory of its own.
        """
        self._graphs.follow()
        if state is not None:
            state.put(self._own)
            state.note()
            self._state, self._owners = state, [weakref.ref(each) for each in call.states]
            self._left, self.place.users = None, state.objects
        self._fill(call)
        self._graph.replay()
        self._state.advance()
        return self._output(call)

    def reset(self) -> None:
        """Free the graph. Its caches keep their tensors."""
        self._graph.reset()
        vars(self).pop("_output", None)
        self._inputs, self._masks, self._own, self._others = [], [], [], []


@contextmanager
def _without_kept_casts() -> Iterator[None]:
    """Have autocast cast weights anew: what it keeps while it lasts would be freed before a replay."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def problem_of(state: CacheState, before: Any, asked: list[str]) -> str | None:
    """Say what a step did that a replay would not do again; None if nothing."""
    if asked:
        return f"it asks its cache for {asked[0]}() in Python, as a layer with a sliding window counts"
    if change := state.changes(before):
        return f"it {change}"
    return None


def _said(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "there was no memory for it on the device"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
