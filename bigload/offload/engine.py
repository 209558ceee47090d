"""Weights that rest in host memory, or files, and come to the device when forward, or backward, reaches them.

Leaves get a forward of ours one by one, and their weights come by groups (a decoder layer): one copy each, on a stream
of its own, into one of a few slots, while the groups before compute. Which group comes next is learned as the model
runs; a wrong guess costs one copy that was waited for.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, OffloadError
from ..hardware.pinned import Store
from .files import FileGroup
from .forwards import HostForward, OwnForward, StreamedForward, Uncopyable
from .groups import Group, cells_by_leaf, require_owned
from .leaves import Cell, Leaf
from .prefetch_order import Step, Succession
from .residency import Residency
from .slots import Slot, Use, lane_to

_NONE: Mapping[Leaf, Store | None] = {}


@dataclass(frozen=True)
class StreamStats:
    """What an engine has done since it was made.

    Attributes:
        nbytes: copied to the device.
        fetches: groups that were copied.
        demand_fetches: those of them that were waited for, since nobody had guessed that they would be next.
        slots: on the device now.
        gb_per_s: of the copies that were timed, 10**9 bytes a second; 0 where none was.
    """

    nbytes: int
    fetches: int
    demand_fetches: int
    slots: int
    gb_per_s: float


def _is_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def _prepare_to_load(weights: Residency, state: Mapping[str, object], prefix: str, *_: object) -> None:
    """Make ready to load a state_dict into a leaf, or refuse it.

    Raises:
        OffloadError: its weights lie in files, which are never written, or are on the device for a call.
    """
    leaf = weights.leaf
    if not any(prefix + name in state for name in leaf.parameters):
        return
    if isinstance(weights.group.store, FileGroup):
        raise OffloadError(
            f"the weights of {leaf.path!r} lie in files, which a load_state_dict does not change; take the model off "
            "its engine first (model.offload.remove()), then load them"
        )
    if weights.is_used():
        raise OffloadError(f"the weights of {leaf.path!r} are on the device for now: load a state_dict when it has run")
    weights.put_back()


class _Refreshing:
    """A hook that has a group copied anew when a state_dict was loaded into one of its leaves."""

    def __init__(self, engine: Engine, group: Group) -> None:
        self._engine, self._group = weakref.ref(engine), group

    def __call__(self, module: nn.Module, keys: object) -> None:
        engine = self._engine()
        if engine is not None:
            engine.forget(self._group)


class Engine(Uncopyable):
    """Streams the weights of a model's groups to one device.

    It may be used from several threads, and on any stream.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        device: torch.device,
        slots: int = 2,
        embeddings: Mapping[Leaf, Store | None] = _NONE,
    ) -> None:
        """Hook the leaves; from then on their tensors view their groups' host memory while they rest.

        Args:
            model: all of it that is not streamed must be on the device already.
            groups: in the order in which forward is likely to reach them.
            device: where the model computes, a GPU or the CPU.
            slots: groups that are on the device at once: the one in use and those that come.
            embeddings: modules that run on the host, where their weights stay, with the files that these are in, if
                they are.

        Raises:
            ConfigError: no slot.
            OffloadError: a leaf cannot be streamed, or its weight is another module's too.
            torch.OutOfMemoryError: the device has no room for the slots. The model is as it was.
        """
        if slots < 1:
            raise ConfigError(f"slots is {slots}; expected 1 or more")
        self.groups, self.device = tuple(groups), device
        self._most_slots, self._embeddings = min(slots, len(groups)), dict(embeddings)
        self._cells = {group: cells_by_leaf(group) for group in groups}
        require_owned(model, self._cells, embeddings)
        self._lane = lane_to(device)
        self._slot_nbytes = max((group.store.layout.nbytes for group in groups), default=0)
        self._slots: list[Slot] = []
        self._make_slots()
        self._succession = Succession(self.groups)
        self.lock = threading.RLock()
        self._clock = 0
        self._nbytes = self._fetches = self._demand_fetches = 0
        self._weights: list[Residency] = []
        self._forwards: list[OwnForward] = []
        self._state_hooks: list[Any] = []
        try:
            self._take_over()
        except BaseException:  # Ctrl-C too: the leaves are as they were
            self._let_go()
            self._lane.close()
            raise
        # Slots must not be another's while a copy into them goes on.
        self._close = weakref.finalize(self, self._lane.close)
        self._close.atexit = False

    def _make_slots(self) -> None:
        while len(self._slots) < self._most_slots:
            self._slots.append(self._lane.make_slot(self._slot_nbytes))

    def _take_over(self) -> None:
        for group, by_leaf in self._cells.items():
            for leaf, cells in by_leaf.items():
                for cell in cells:
                    cell.put(group.store.tensors[cell.name])
                weights = Residency(self, group, leaf, cells)
                self._weights.append(weights)
                self._forwards.append(StreamedForward(weights))
                shown, refreshed = functools.partial(self._show_at_rest, group.store), _Refreshing(self, group)
                self._state_hooks += [
                    leaf.module.register_state_dict_post_hook(shown),  # type: ignore[no-untyped-call]
                    leaf.module._register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
                        functools.partial(_prepare_to_load, weights)
                    ),
                    leaf.module.register_load_state_dict_post_hook(refreshed),  # type: ignore[no-untyped-call]
                ]
        self._forwards += [
            HostForward(leaf.path, leaf.module, self.device, None if files is None else files.require_unchanged)
            for leaf, files in self._embeddings.items()
        ]

    def _let_go(self) -> None:
        while self._state_hooks:
            self._state_hooks[-1].remove()
            self._state_hooks.pop()
        while self._forwards:
            self._forwards[-1].remove()
            self._forwards.pop()

    def forget(self, group: Group) -> None:
        """Have a group copied anew when it is next used: its weights at rest may have changed."""
        with self.lock:
            for slot in self._slots:
                if slot.store is group.store:
                    slot.store = None  # calls that use it go on with what they had

    def stats(self) -> StreamStats:
        """Tell what was streamed so far."""
        rate = self._lane.timed_bytes / self._lane.timed_s / 1e9 if self._lane.timed_s else 0.0
        return StreamStats(self._nbytes, self._fetches, self._demand_fetches, len(self._slots), rate)

    @contextmanager
    def materialize(self, module: nn.Module) -> Iterator[None]:
        """Have the weights of all leaves in a module on the device while the block runs, to be read there.

        Raises:
            torch.OutOfMemoryError: they are more groups than there is room for.
        """
        inside = set(module.modules())
        try:
            with ExitStack() as stack:
                for weights in self._weights:
                    if weights.leaf.module in inside:
                        stack.enter_context(weights.placed())
                yield
        finally:
            with self.lock:
                self._trim()

    def remove(self) -> None:
        """Give the model its weights back, on the device and there to stay, and free the slots and the host memory.

        What is interrupted is finished by a second call.

        Raises:
            OffloadError: a leaf is running, or a file is not what it was.
            torch.OutOfMemoryError: the device has no room for all; they are streamed still.
        """
        with self.lock:
            if any(slot.users for slot in self._slots):
                raise OffloadError("leaves are running: the engine cannot be removed from within their forward")
            self._lane.finish()
            brought: list[tuple[Callable[[torch.Tensor], None], torch.Tensor]] = []
            try:
                while self._slots:
                    self._free(self._slots[0])
                self._bring_all(brought)
            except BaseException:
                brought.clear()  # here, since the error holds who made them, and the slots need their room
                with suppress(torch.OutOfMemoryError):
                    self._make_slots()
                raise
            for put, tensor in brought:
                put(tensor)
            self._let_go()
            while self._cells:
                group, _ = self._cells.popitem()
                group.store.release()
            self._embeddings, self._most_slots = {}, 0
            self._close()

    def _bring_all(self, brought: list[tuple[Callable[[torch.Tensor], None], torch.Tensor]]) -> None:
        """Bring all weights to the device.

        Args:
            brought: is given each, with what puts it into the model.

        Raises:
            OffloadError: a file is not what it was.
            torch.OutOfMemoryError: the device has no room.
        """
        stores = [group.store for group in self._cells] + [files for files in self._embeddings.values() if files]
        for store in stores:
            store.require_unchanged()  # before: a map of a file that was cut short ends the process
        for group, by_leaf in self._cells.items():
            for cell in {cell for cells in by_leaf.values() for cell in cells}:
                brought.append((cell.settle, group.store.source_of(cell.name).to(self.device, copy=True)))
        for leaf in self._embeddings:
            for own in leaf.module.parameters():
                brought.append((functools.partial(setattr, own, "data"), own.data.to(self.device, copy=True)))
        for store in stores:
            store.require_unchanged()

    def enter(self, use: Use, group: Group, leaf: Leaf, cells: Sequence[Cell]) -> Slot:
        """Bring a group to the device, or find it there, and those that are likely next; under the lock.

        Args:
            use: for which; its slot is set.
            group: to bring.
            leaf: of it, that will run.
            cells: those of the leaf that are parameters.

        Raises:
            OffloadError: a weight of the leaf was replaced or moved since, or cannot be read, or is streamed no more.
            torch.OutOfMemoryError: the device has no room.
        """
        if group not in self._cells:
            raise OffloadError(f"the weights of {leaf.path!r} were brought back meanwhile, by remove(): run it again")
        is_backward = _is_backward()
        step = self._succession.arrive(group, leaf, is_backward=is_backward)
        rest = group.store.tensors
        for cell in cells:
            cell.require_at_rest(rest[cell.name])
        slot = self._slot_of(group)
        if slot is None or self._lane.has_failed(slot):  # what could not be read ahead may be there now
            slot = self._room()
            self._fetch(group, slot)
            self._demand_fetches += 1
            if step is None:
                step = self._succession.current(group, leaf, is_backward=is_backward)
                assert step is not None  # it has just arrived there
                self._succession.was_not_over(step)
        slot.used = self._clock = self._clock + 1
        self.join(use, slot)
        self._trim()
        if step is not None:  # what a group's other leaves would fetch has been fetched for its first
            self._prefetch(step, [group])
        return slot

    def join(self, use: Use, slot: Slot) -> None:
        """Use a slot that is in use; under the lock."""
        use.slot = slot
        slot.users.add(use)
        self._lane.await_copy(slot)

    def leave(self, group: Group, leaf: Leaf) -> None:
        """Bring what is likely next into the slot of a group that is likely not wanted any more; under the lock.

        Raises:
            torch.OutOfMemoryError: the device has no room.
        """
        step = self._succession.current(group, leaf, is_backward=_is_backward())
        if step is not None and self._succession.is_over(step, leaf):
            self._prefetch(step, [])

    def _prefetch(self, step: Step, wanted: list[Group]) -> None:
        """Bring the groups that are likely to be next into slots that nobody uses, beside those that are wanted now."""
        for group in self._succession.after(step):
            if len(wanted) >= len(self._slots):
                break
            if group not in wanted:
                wanted.append(group)
        for group in wanted:
            if self._slot_of(group) is None:
                slot = self._free_slot(keep=wanted)
                if slot is None:
                    return
                self._fetch(group, slot)

    def _slot_of(self, group: Group) -> Slot | None:
        store = group.store
        for slot in self._slots:
            if slot.store is store:
                return slot
        return None

    def _free_slot(self, keep: Sequence[Group]) -> Slot | None:
        kept = {group.store for group in keep}
        free = [slot for slot in self._slots if not slot.users and slot.store not in kept]
        return min(free, key=lambda slot: (slot.store is not None, slot.used), default=None)

    def _room(self) -> Slot:
        """Give a slot that may be filled: a new one where there are too few, or all are in use.

        Raises:
            torch.OutOfMemoryError: the device has no room, and none is free.
        """
        free = self._free_slot(keep=())
        if free is not None and len(self._slots) < self._most_slots:
            with suppress(torch.OutOfMemoryError):
                return self._grow()
        return free or self._grow()  # to wait for one could be to wait for ever

    def _grow(self) -> Slot:
        slot = self._lane.make_slot(self._slot_nbytes)
        self._slots.append(slot)
        return slot

    def _fetch(self, group: Group, slot: Slot) -> None:
        self._lane.copy(group.store, slot)
        slot.store = group.store
        slot.used = self._clock = self._clock + 1
        self._fetches += 1
        self._nbytes += group.store.layout.nbytes

    def _trim(self) -> None:
        """Free the slots that are more than were asked for, as soon as nobody uses them; under the lock."""
        while len(self._slots) > self._most_slots:
            slot = self._free_slot(keep=())
            if slot is None:
                return
            self._free(slot)

    def _free(self, slot: Slot) -> None:
        self._lane.discard(slot)
        self._slots.remove(slot)
        for forward in self._forwards:
            if isinstance(forward, StreamedForward):
                forward.forget(slot)

    def _show_at_rest(
        self, store: Store, module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: object
    ) -> None:
        """Give a state_dict that is taken while a leaf runs the tensors that will not be overwritten.

        Raises:
            OffloadError: they lie in a file that is not what it was.
        """
        store.require_unchanged()
        memories = {slot.memory.untyped_storage().data_ptr() for slot in self._slots}
        for name, tensor in state.items():
            is_own = name.startswith(prefix) and type(tensor) is torch.Tensor
            if is_own and tensor.untyped_storage().data_ptr() in memories:
                state[name] = store.at_rest(tensor)
