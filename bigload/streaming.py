"""Weights that rest in host memory and come to the device when forward, or backward, reaches them.

Leaves are hooked one by one, and their weights come by groups (a decoder layer): one copy each, on a stream of its own,
into one of a few slots, while the groups before compute. Which group comes next is learned as the model runs; a wrong
guess costs one copy that was waited for.
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .cells import Cell, Leaf, cells_of
from .disk import FileGroup
from .errors import ConfigError, OffloadError
from .host import HostGroup, Store
from .slots import Slot, lane_to
from .streamed import HostForward, OwnForward, StreamedForward, Uncopyable
from .tree import leaves, modules_by_path


@dataclass(frozen=True, eq=False)
class Group:
    """Leaves whose weights come to the device together.

    Attributes:
        name: of the group, such as the path of a decoder layer.
        leaves: its modules.
        store: where the weights rest; its parts are named as in `Leaf.tensors`.
    """

    name: str
    leaves: tuple[Leaf, ...]
    store: Store

    @classmethod
    def copied(cls, name: str, leaves: Sequence[Leaf], device: torch.device) -> Group:
        """Copy the weights of leaves, wherever they are, into host memory.

        Raises:
            OffloadError: a leaf cannot be streamed.
        """
        tensors = {part: tensor for leaf in leaves for part, tensor in leaf.tensors().items()}
        return cls(name, tuple(leaves), HostGroup.from_tensors(tensors, device))


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


# A group in forward, or in backward, where the order is another.
_Node = tuple[bool, Group]


# Without bitsandbytes' say in what is done to its parameters, in which it has none and which takes Python's time.
_plainly = torch._C.DisableTorchFunctionSubclass


def _refuse_files(group: Group, leaf: Leaf, state: Mapping[str, object], prefix: str, *_: object) -> None:
    """Refuse a state_dict with weights that lie in files, which are never written.

    Raises:
        OffloadError: says which.
    """
    if isinstance(group.store, FileGroup) and any(prefix + name in state for name in leaf.parameters):
        raise OffloadError(
            f"the weights of {leaf.path!r} lie in files, which a load_state_dict does not change; take the model off "
            "its engine first (model.offload.remove()), then load them"
        )


class _Refreshing:
    """A hook that has a group copied anew when a state_dict was loaded into one of its leaves."""

    def __init__(self, engine: Engine, group: Group) -> None:
        self._engine, self._group = weakref.ref(engine), group

    def __call__(self, module: nn.Module, keys: object) -> None:
        engine = self._engine()
        if engine is not None:
            engine.forget(self._group)


class _Residency(AbstractContextManager[torch.Tensor]):
    """Has a leaf's weights on the device for one call of it; gives the memory of their group there."""

    __slots__ = ("_cells", "_engine", "_group", "slot")

    def __init__(self, engine: Engine, group: Group, cells: Sequence[Cell]) -> None:
        self._engine, self._group, self._cells = engine, group, cells
        self.slot: Slot | None = None

    def __enter__(self) -> torch.Tensor:
        engine = self._engine
        try:
            with engine.lock, _plainly():
                return engine.enter(self, self._group, self._cells).memory
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *raised: object) -> None:
        engine = self._engine
        with engine.lock, _plainly():
            engine.exit(self, self._group, self._cells)


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
        embeddings: Sequence[Leaf] = (),
    ) -> None:
        """Hook the leaves; from then on their tensors view their groups' host memory while they rest.

        Args:
            model: all of it that is not streamed must be on the device already.
            groups: in the order in which forward is likely to reach them.
            device: where the model computes, a GPU or the CPU.
            slots: groups that are on the device at once: the one in use and those that come.
            embeddings: modules whose weights are in host memory and stay there: they run on the host.

        Raises:
            ConfigError: no slot.
            OffloadError: a leaf cannot be streamed, or its weight is another module's too.
            torch.OutOfMemoryError: the device has no room for the slots. The model is as it was.
        """
        if slots < 1:
            raise ConfigError(f"slots is {slots}; expected 1 or more")
        self.groups, self.device = tuple(groups), device
        self._asked_slots = slots
        self._cells = {group: _cells(group) for group in groups}
        _require_owned(model, self._cells, embeddings)
        self._lane = lane_to(device)
        self._slot_nbytes = max((group.store.layout.nbytes for group in groups), default=0)
        self._slots = [self._lane.make_slot(self._slot_nbytes) for _ in range(min(slots, len(self.groups)))]
        self._next = _first_guess(self.groups)
        self.lock = threading.RLock()
        self._last = threading.local()
        self._clock = 0
        self._nbytes = self._fetches = self._demand_fetches = 0
        self._forwards: list[OwnForward] = []
        self._state_hooks: list[Any] = []
        try:
            self._take_over(embeddings)
        except BaseException:  # Ctrl-C too: the leaves are as they were
            self._let_go()
            self._lane.close()
            raise
        # Slots must not be another's while a copy into them goes on.
        self._close = weakref.finalize(self, self._lane.close)
        self._close.atexit = False

    def _take_over(self, embeddings: Sequence[Leaf]) -> None:
        for group, by_leaf in self._cells.items():
            for leaf, cells in by_leaf.items():
                for cell in cells:
                    cell.put(group.store.tensors[cell.name])
                resident = functools.partial(_Residency, self, group, cells)
                self._forwards.append(StreamedForward(leaf, cells, resident))
                shown, refreshed = functools.partial(self._show_at_rest, group.store), _Refreshing(self, group)
                self._state_hooks += [
                    leaf.module.register_state_dict_post_hook(shown),  # type: ignore[no-untyped-call]
                    leaf.module._register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
                        functools.partial(_refuse_files, group, leaf)
                    ),
                    leaf.module.register_load_state_dict_post_hook(refreshed),  # type: ignore[no-untyped-call]
                ]
        self._forwards += [HostForward(leaf.path, leaf.module, self.device) for leaf in embeddings]

    def _let_go(self) -> None:
        for hook in self._state_hooks:
            hook.remove()
        for forward in self._forwards:
            forward.remove()
        self._forwards, self._state_hooks = [], []

    def forget(self, group: Group) -> None:
        """Have a group copied anew when it is next used: its weights at rest may have changed."""
        with self.lock:
            for slot in self._slots:
                if slot.group is group and not slot.users:
                    slot.group = None

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
                for group, by_leaf in self._cells.items():
                    for leaf, cells in by_leaf.items():
                        if leaf.module in inside:
                            stack.enter_context(_Residency(self, group, cells))
                yield
        finally:
            self._trim()

    def remove(self) -> None:
        """Give the model its weights back, on the device and there to stay, and free the slots and the host memory.

        Raises:
            OffloadError: a leaf is running.
            torch.OutOfMemoryError: the device has no room; groups that had it are there, the others are streamed still.
        """
        with self.lock:
            if any(slot.users for slot in self._slots):
                raise OffloadError("leaves are running: the engine cannot be removed from within their forward")
            self._lane.finish()
            self._slots.clear()
            for forward in self._forwards:
                if isinstance(forward, HostForward):
                    forward.module.to(self.device)
            for group, by_leaf in self._cells.items():
                for cell in {cell for cells in by_leaf.values() for cell in cells}:
                    cell.put(group.store.source_of(cell.name).to(self.device, copy=True))
                group.store.release()
            self._let_go()
            self._cells = {}
            self._close()

    def enter(self, use: _Residency, group: Group, cells: Sequence[Cell]) -> Slot:
        """Bring a leaf's weights to the device, or find them there, and those of the groups that are likely next.

        Raises:
            OffloadError: a weight was replaced or moved since, or cannot be read.
            torch.OutOfMemoryError: the device has no room.
        """
        last: _Node | None = getattr(self._last, "node", None)
        is_backward = torch._C._current_graph_task_id() != -1
        is_same = last is not None and last[1] is group and last[0] == is_backward
        node = last if last is not None and is_same else (is_backward, group)
        if not is_same:
            self._learn(node)
        rest = group.store.tensors
        for cell in cells:
            cell.require_at_rest(rest[cell.name])
        slot = self._slot_of(group)
        if slot is None:
            slot = self._free_slot(keep=()) or self._grow()
            self._fetch(group, slot)
            self._demand_fetches += 1
            is_same = False
        use.slot = slot
        slot.users.add(use)
        slot.used = self._tick()
        self._lane.await_copy(slot)
        views = slot.views(group.store)
        for cell in cells:
            is_first = not cell.users
            cell.users.add(use)
            if is_first:
                cell.is_away = True
                cell.put(views[cell.name])
        if not is_same:  # what a group's other leaves would fetch has been fetched for its first
            self._prefetch(node)
        return slot

    def exit(self, use: _Residency, group: Group, cells: Sequence[Cell]) -> None:
        """Let a leaf's weights go to rest, if nobody else uses them; what was not entered may be left too."""
        for cell in cells:
            cell.users.discard(use)
            if cell.is_away and not cell.users:
                cell.put(group.store.tensors[cell.name])
                cell.is_away = False
        if use.slot is not None:
            use.slot.users.discard(use)

    def _learn(self, node: _Node) -> None:
        last: _Node | None = getattr(self._last, "node", None)
        if last is not None and last != node:
            self._next[last] = node
        self._last.node = node

    def _prefetch(self, node: _Node) -> None:
        """Bring the groups that are likely to be next into slots that nobody uses."""
        wanted = [node[1]]
        for _ in range(len(self._next)):
            if len(wanted) >= len(self._slots):
                break
            node = self._next[node]
            if node[1] not in wanted:
                wanted.append(node[1])
        for group in wanted[1:]:
            if self._slot_of(group) is None:
                slot = self._free_slot(keep=wanted)
                if slot is None:
                    return
                self._fetch(group, slot)

    def _slot_of(self, group: Group) -> Slot | None:
        return next((slot for slot in self._slots if slot.group is group), None)

    def _free_slot(self, keep: Sequence[Group]) -> Slot | None:
        free = [slot for slot in self._slots if not slot.users and slot.group not in keep]
        return min(free, key=lambda slot: (slot.group is not None, slot.used), default=None)

    def _grow(self) -> Slot:
        """Make one slot more: all are in use, and to wait for one could be to wait for ever."""
        slot = self._lane.make_slot(self._slot_nbytes)
        self._slots.append(slot)
        return slot

    def _fetch(self, group: Group, slot: Slot) -> None:
        self._lane.copy(group.store, slot)
        slot.group = group
        slot.used = self._tick()
        self._fetches += 1
        self._nbytes += group.store.layout.nbytes

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _trim(self) -> None:
        """Free the slots that are too many, when they were needed for once only."""
        with self.lock:
            if len(self._slots) <= self._asked_slots:
                return
            self._lane.finish()
            for slot in [slot for slot in self._slots if not slot.users][: len(self._slots) - self._asked_slots]:
                self._slots.remove(slot)

    def _show_at_rest(
        self, store: Store, module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: object
    ) -> None:
        """Give a state_dict that is taken while a leaf runs the tensors that will not be overwritten."""
        memories = {slot.memory.untyped_storage().data_ptr() for slot in self._slots}
        for name, tensor in state.items():
            is_own = name.startswith(prefix) and type(tensor) is torch.Tensor
            if is_own and tensor.untyped_storage().data_ptr() in memories:
                state[name] = store.at_rest(tensor)


def _cells(group: Group) -> dict[Leaf, list[Cell]]:
    """List the cells of each leaf, one and the same for a tensor that several leaves share.

    Raises:
        OffloadError: the store lacks one.
    """
    known: dict[tuple[int, str], Cell] = {}
    found: dict[Leaf, list[Cell]] = {}
    modules: set[nn.Module] = set()
    for leaf in group.leaves:
        if leaf.module in modules:
            raise OffloadError(f"{leaf.path!r} is twice in the group {group.name!r}")
        modules.add(leaf.module)
        found[leaf] = [known.setdefault(cell.identity, cell) for cell in cells_of(leaf)]
    for cell in known.values():
        part = group.store.layout.parts.get(cell.name)
        there = cell.get()
        if part is None or (part.dtype, part.shape) != (there.dtype, tuple(there.shape)):
            raise OffloadError(f"{cell.name!r} is {there.dtype} {tuple(there.shape)}, its store holds {part}")
    return found


def _require_owned(model: nn.Module, cells: dict[Group, dict[Leaf, list[Cell]]], embeddings: Sequence[Leaf]) -> None:
    """Refuse weights that a module reads which is not given them.

    Raises:
        OffloadError: one is in two groups, or held by a module that is in none.
    """
    group_of: dict[int, Group] = {}
    allowed = {module for leaf in embeddings for module in leaf.module.modules()}
    for group, by_leaf in cells.items():
        for leaf, own in by_leaf.items():
            allowed.update(leaf.module.modules())
            for cell in own:
                if cell.parameter is not None and group_of.setdefault(id(cell.parameter), group) is not group:
                    raise OffloadError(f"{cell.name!r} is in two groups; weights that are tied must be in one")
    modules = modules_by_path(model)
    for name, parameter in leaves(modules, "_parameters").items():
        if id(parameter) in group_of and modules[name.rpartition(".")[0]] not in allowed:
            raise OffloadError(f"{name!r} is streamed for another module, and this one would not find it on the device")


def _first_guess(groups: Sequence[Group]) -> dict[_Node, _Node]:
    """Guess that forward goes through the groups in their order, again and again, and backward the other way."""
    ahead = zip(groups, [*groups[1:], *groups[:1]], strict=True)
    guess: dict[_Node, _Node] = {(False, group): (False, after) for group, after in ahead}
    back = groups[::-1]
    guess |= {(True, group): (True, before) for group, before in itertools.pairwise(back)}
    if groups:
        guess[(True, groups[0])] = (False, groups[0])
    return guess
