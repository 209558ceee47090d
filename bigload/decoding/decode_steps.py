"""Overrides the method of a model that computes its decode steps: some are replayed, the others run as before."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn

from ..errors import ConfigError, OffloadError
from ..offload.captured import CapturedOffload
from ..offload.leaves import MethodOverride
from .cache_state import CacheState
from .calls import Call, caches_in, first_difference, tokens_of
from .constants import constants_in_graph
from .fused.fusions import Fusions
from .graphs import Graphs
from .lookups import Lookups
from .masks import deferring, made
from .model_state import HeldTensors, ModelState
from .obstacles import obstacle_now, obstacle_of, obstacle_of_rows
from .steps import CachePlace, CapturedStep, NotCapturedError, problem_of

logger = logging.getLogger(__name__)
# How many kinds of calls are remembered, and after how many new ones in a row it is said that each step is another.
_MAX_KINDS, _MANY_NEW = 64, 8
_UNCAPTURED = object()  # in the place of an output, of a step that is to run as before


@dataclass(frozen=True)
class DecodeStats:
    """What `capture_decode` has done so far.

    Attributes:
        replayed: steps that were replayed, the first run of each graph included.
        uncaptured: steps that ran as before: the first of each kind, and those that cannot be captured.
        captures: graphs that were captured.
        graphs: graphs that are kept now.
        capture_s: seconds that the captures took.
        nbytes: reserved on the device for the graphs that are kept.
        reasons: why steps were not captured, each once.

    Examples:
        >>> import bigload, torch
        >>> capture = bigload.capture_decode(torch.nn.Linear(8, 8))
        >>> capture.stats().replayed
        0
    """

    replayed: int
    uncaptured: int
    captures: int
    graphs: int
    capture_s: float
    nbytes: int
    reasons: tuple[str, ...]


@dataclass
class _Kind:
    """Calls that one graph, for each of their caches, can stand for.

    Attributes:
        reason: why they cannot be captured.
        lookups: what they look up on the CPU; None if they cannot be captured.
        fusions: what of them takes fewer kernels.
        steps: the graphs, those used last at the end.
    """

    reason: str | None = None
    lookups: Lookups | None = None
    fusions: Fusions | None = None
    steps: list[CapturedStep] = field(default_factory=list)


class DecodeSteps(MethodOverride):
    """Overrides the method of a model that computes its steps."""

    def __init__(self, model: nn.Module, name: str, device: torch.device, graphs: Graphs, max_graphs: int) -> None:
        self.own: Callable[..., Any] = getattr(model, name)
        self.__wrapped__ = self.own  # for inspect.signature
        self._device, self._graphs, self._max_graphs = device, graphs, max_graphs
        self._is_every_call_one = name != "forward"
        self._is_removed = self._is_running = False
        self._lock = threading.RLock()
        self._kinds: OrderedDict[Any, _Kind] = OrderedDict()
        self._last: CapturedStep | None = None
        self._model_state: ModelState | None = None
        self._offload: CapturedOffload
        self._obstacle: str | None = None
        self._said: dict[str, None] = {}
        self._last_key: Any = ()
        self._new_in_a_row = self._changes_in_a_row = 0
        self._replayed = self._uncaptured = self._captures = 0
        self._capture_s = 0.0
        super().__init__(model, name)
        self._masks = deferring(model) if name == "forward" else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Replay a decode step; run all else as before."""
        if self._is_removed or torch.compiler.is_compiling() or torch._C._is_tracing():
            return self.own(*args, **made(kwargs))
        if not self._is_step(args, kwargs):
            self._lend(args, kwargs)
            return self.own(*args, **made(kwargs))
        with self._lock:
            if self._is_running:  # a step of the model calls the model
                return self.own(*args, **made(kwargs))
            self._is_running = True
            try:
                out = self._step(args, kwargs)
            finally:
                self._is_running = False
        return self.own(*args, **made(kwargs)) if out is _UNCAPTURED else out

    def _is_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if self._is_every_call_one:
            return True
        tokens = tokens_of(args, kwargs)
        if tokens is None or tokens.dim() < 2 or tokens.shape[1] != 1:
            return False
        caches, last = caches_in(args, kwargs), self._last
        if caches and last is not None and last.is_of(caches):
            return True
        if not caches or not all(getattr(cache, "is_initialized", True) for cache in caches):
            return False
        if all(cache.is_compileable for cache in caches):
            return True
        self._say(f"a {type(caches[0]).__name__} grows with each token: generate with cache_implementation='static'")
        return False

    def _lend(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let the cache of a prompt lie where a graph had one that is no more."""
        caches, tokens = caches_in(args, kwargs), tokens_of(args, kwargs)
        if len(caches) != 1 or getattr(caches[0], "is_initialized", True) or tokens is None:
            return
        if self.module.training or torch.is_grad_enabled():
            return
        with self._lock:
            if self._is_running or not self._kinds:
                return
            self._note_model()  # of which another dtype is another cache
            modes = _modes(self._device.type)
            left = [step for step in self._let_go() if step.is_left and step.key[0] == modes]
            self._graphs.follow()
            next((step for step in reversed(left) if step.lend_to(caches[0], tokens.shape[0])), None)

    def _let_go(self) -> list[CapturedStep]:
        """Keep nothing of caches that are no more; return all steps."""
        steps = [step for kind in self._kinds.values() for step in kind.steps]
        for step in steps:
            step.let_go()
        return steps

    def _step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (reason := obstacle_now(self.module, kwargs)) is not None:
            return self._leave(reason)
        state = self._note_model()
        if self._obstacle is not None:
            return self._leave(self._obstacle)
        if not self._offload.are_ready():
            self._uncaptured += 1
            return _UNCAPTURED
        call = Call(args, kwargs)
        key = (_modes(self._device.type), call.key, state.of_steps())
        last = self._last
        if last is not None and last.key == key and last.is_of(call.states) and last.finds_all_in_place():
            return self._replay(last, call)
        return self._step_of_kind(key, call, args, kwargs)

    def _note_model(self) -> ModelState:
        """Drop what was captured of another state of the model; return that of now."""
        state = self._model_state
        if state is not None and state.is_same() and self._offload.are_same():
            self._changes_in_a_row = 0
            return state
        self.release()
        self._obstacle = obstacle_of(self.module)
        self._model_state = state = ModelState(self.module)
        self._offload = CapturedOffload(self.module)
        self._changes_in_a_row += 1
        if self._changes_in_a_row >= _MANY_NEW:
            self._say("tensors, hooks or modules of the model are exchanged between steps")
        return state

    def _step_of_kind(self, key: Any, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = CacheState(call.states)
        kind = self._kinds.get((key, state.signature))
        if kind is None:
            return self._warm_up(key, call, state, args, kwargs)
        self._kinds.move_to_end((key, state.signature))
        if kind.reason is not None:
            return self._leave(kind.reason)
        self._new_in_a_row = 0
        step = next((each for each in kind.steps if each.is_of(call.states)), None)
        if step is None:
            self._let_go()
            step = next((each for each in kind.steps if each.is_free_for(state)), None)
        if step is None:
            try:
                step = self._capture(kind, key, call, state)
            except NotCapturedError as error:
                kind.reason = str(error)
                is_full = isinstance(error.__cause__, torch.OutOfMemoryError)
                return self._leave(kind.reason, None if is_full else call)
        if step is None:  # another thread uses offloaded weights on the device, so that no graph could be replayed
            self._uncaptured += 1
            return _UNCAPTURED
        kind.steps.remove(step)
        kind.steps.append(step)
        return self._replay(step, call, state)

    def _replay(self, step: CapturedStep, call: Call, state: CacheState | None = None) -> Any:
        is_replayed, out = self._offload.replay(partial(step.replay, call, state))
        if not is_replayed:  # another thread uses offloaded weights on the device
            self._uncaptured += 1
            return _UNCAPTURED
        self._last = step
        self._replayed += 1
        return out

    def _leave(self, reason: str, call: Call | None = None) -> Any:
        """Say why a step runs as before."""
        if call is None or not self._makes_masks_as_before(call):
            self._say(reason)
        self._uncaptured += 1
        return _UNCAPTURED

    def _makes_masks_as_before(self, call: Call) -> bool:
        """Whether a step was given a deferred mask, which may be why no graph has it: the next one is given none."""
        if call.masks and self._masks is not None:
            self._masks.stop()
        return bool(call.masks)

    def _warm_up(self, key: Any, call: Call, state: CacheState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the first step of a kind, and see whether it does what a replay would not do again."""
        reason = self._reason_of(call, tokens_of(args, kwargs))
        if reason is not None:
            self._remember(key, state, _Kind(reason))
            return self._leave(reason)
        self._note_new(key)
        before, written, held = state.snapshot(), _Versions(call.tensors), HeldTensors(self.module)
        lookups, fusions = Lookups(self.module), Fusions(self.module)
        asked: list[str] = []
        done = False
        try:
            with (
                self._offload.noting(),
                self._graphs.warming_up(),
                lookups.noting(call),
                fusions.noting(),
                state.watched() as asked,
            ):
                out = self.own(*args, **made(kwargs))
                done = True
        except OffloadError as error:
            if not done:
                raise
            reason = str(error)
        self._uncaptured += 1
        if written.differ():
            reason = "it writes to a tensor that it is given: keep what a step changes in a cache object or a buffer"
        reason = reason or lookups.reason or held.change() or problem_of(state, before, asked)
        if reason is not None:
            self._makes_masks_as_before(call)
        self._remember(key, state, _Kind(reason, lookups, fusions))
        return out

    def _reason_of(self, call: Call, tokens: torch.Tensor | None) -> str | None:
        elsewhere = [tensor for tensor in call.tensors if tensor.device != self._device]
        if elsewhere:
            return f"it is given a tensor on {elsewhere[0].device}"
        return obstacle_of_rows(self.module, tokens.shape[0]) if tokens is not None and tokens.dim() > 1 else None

    def _note_new(self, key: Any) -> None:
        self._new_in_a_row += 1
        if self._new_in_a_row >= _MANY_NEW:
            self._say(f"each step differs from the one before, in {first_difference(key[1], self._last_key[1])}")
        self._last_key = key

    def _remember(self, key: Any, state: CacheState, kind: _Kind) -> None:
        self._kinds[key, state.signature] = kind
        while len(self._kinds) > _MAX_KINDS:
            _, kind = self._kinds.popitem(last=False)
            for step in kind.steps:
                self._drop(step)

    def _capture(self, kind: _Kind, key: Any, call: Call, state: CacheState) -> CapturedStep | None:
        with self._offload.held():
            return self._captured(kind, key, call, state) if self._offload.are_slots_free() else None

    def _captured(self, kind: _Kind, key: Any, call: Call, state: CacheState) -> CapturedStep:
        kept = [(other, step) for other in self._kinds.values() for step in other.steps]
        kept.sort(key=lambda each: not each[1].is_left)  # first those whose cache is no more
        for other, old in kept[: max(0, len(kept) - self._max_graphs + 1)]:
            other.steps.remove(old)
            self._drop(old)
        places, tensors = (step.place for other in self._kinds.values() for step in other.steps), state.tensors()
        place = next((each for each in places if each.overlaps(tensors)), None) or CachePlace(tensors, state)
        assert kind.lookups is not None
        assert kind.fusions is not None
        run = self._offload.captured(partial(self._own_for_a_graph, kind.fusions))
        step = CapturedStep(key, call, state, place, kind.lookups, run, self._graphs)
        kind.steps.append(step)
        self._captures += 1
        self._capture_s += step.seconds
        return step

    def _own_for_a_graph(self, fusions: Fusions, *args: Any, **kwargs: Any) -> Any:
        with constants_in_graph(self.module, self._device), fusions.captured():
            return self.own(*args, **kwargs)

    def _drop(self, step: CapturedStep) -> None:
        if self._last is step:
            self._last = None
        step.reset()

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said[reason] = None
            logger.warning("decode steps of %s run uncaptured: %s", type(self.module).__name__, reason)

    def release(self) -> None:
        """Free all graphs."""
        with self._lock:
            self._last = None
            while self._kinds:
                _, kind = self._kinds.popitem()
                for step in kind.steps:
                    step.reset()

    def remove(self) -> None:
        """Free all graphs and restore the model's own method; may be called again."""
        self._is_removed = True
        super().remove()
        if self._masks is not None:
            self._masks.remove()
        self.release()
        self._model_state = None

    def __deepcopy__(self, memo: object) -> NoReturn:
        """Refuse to be copied with the model."""
        _refuse_copy()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be pickled with the model."""
        _refuse_copy()

    def stats(self) -> DecodeStats:
        """Return what was done so far."""
        steps = [step for kind in self._kinds.values() for step in kind.steps]
        return DecodeStats(
            self._replayed,
            self._uncaptured,
            self._captures,
            len(steps),
            self._capture_s,
            sum(step.nbytes for step in steps),
            tuple(self._said),
        )


def _refuse_copy() -> NoReturn:
    raise ConfigError(
        "the decode steps of this model are captured, in graphs of its own memory: call remove() of what "
        "capture_decode returned before the model is copied or pickled"
    )


class _Versions:
    """Tells whether tensors are written to."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._tensors = tensors
        # Those that are made in inference mode are not counted by torch.
        self._before = [tensor.clone() if tensor.is_inference() else tensor._version for tensor in tensors]

    def differ(self) -> bool:
        """Whether one was written to."""
        return any(
            not torch.equal(tensor, before) if isinstance(before, torch.Tensor) else tensor._version != before
            for tensor, before in zip(self._tensors, self._before, strict=True)
        )


def _modes(kind: str) -> tuple[Any, ...]:
    """Return torch's modes of this thread, which decide what a step launches."""
    is_autocast = torch.is_autocast_enabled(kind)
    return (
        torch.is_inference_mode_enabled(),
        torch.get_autocast_dtype(kind) if is_autocast else None,
        torch.get_default_dtype(),
    )
