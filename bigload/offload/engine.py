"""Weights that rest in host memory, or files, and come to the device when forward, or backward, reaches them.

Leaves get a forward of ours one by one, and their weights come by groups (a decoder layer): one copy each, on a stream
of its own, into one of a few slots, while the groups before compute. Which group comes next is learned as the model
runs; a wrong guess costs one copy that was waited for.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..hardware.pinned import Store
from .at_rest import hook_state_dicts
from .forwards import CpuForward, ForwardOverride, StreamedForward
from .leaves import Group, Leaf, NonCopyable, remove_all, require_owned, streamed_by_leaf
from .residency import Residency
from .slot_pool import SlotPool, StreamStats
from .slots import Slot

_NONE: Mapping[Leaf, Store | None] = {}


class Engine(NonCopyable):
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
        self._embeddings = dict(embeddings)
        self._streamed = {group: streamed_by_leaf(group) for group in groups}
        require_owned(model, self._streamed, embeddings)
        self.pool = SlotPool(groups, device, slots, self._forget_slot)
        self._weights: list[Residency] = []
        self._forwards: list[ForwardOverride] = []
        self._state_hooks: list[Any] = []
        try:
            self._install()
        except BaseException:  # Ctrl-C too: the leaves are as they were
            self._uninstall()
            self.pool.copier.close()
            raise
        # Slots must not be another's while a copy into them goes on.
        self._close = weakref.finalize(self, self.pool.copier.close)
        self._close.atexit = False

    def _install(self) -> None:
        for group, by_leaf in self._streamed.items():
            for leaf, streamed in by_leaf.items():
                for each in streamed:
                    each.put(group.store.tensors[each.name])
                weights = Residency(self.pool, group, leaf, streamed)
                self._weights.append(weights)
                self._forwards.append(StreamedForward(weights))
                self._state_hooks += hook_state_dicts(weights, self.pool)
        self._forwards += [
            CpuForward(leaf.path, leaf.module, self.device, None if files is None else files.require_unchanged)
            for leaf, files in self._embeddings.items()
        ]

    def _uninstall(self) -> None:
        remove_all(self._state_hooks)
        remove_all(self._forwards)

    def _forget_slot(self, slot: Slot) -> None:
        for forward in self._forwards:
            if isinstance(forward, StreamedForward):
                forward.forget(slot)

    def stats(self) -> StreamStats:
        """Tell what was streamed so far."""
        return self.pool.stats()

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
                        stack.enter_context(weights.swapped_in())
                yield
        finally:
            with self.pool.lock:
                self.pool.trim()

    def remove(self) -> None:
        """Return the model its weights back, on the device and there to stay, and free the slots and the host memory.

        What is interrupted is finished by a second call.

        Raises:
            OffloadError: a leaf is running, or a file is not what it was.
            torch.OutOfMemoryError: the device has no room for all; they are streamed still.
        """
        with self.pool.lock:
            copies: list[tuple[Callable[[torch.Tensor], None], torch.Tensor]] = []
            try:
                self.pool.free_all()
                self._copy_all_to_device(copies)
            except BaseException:
                copies.clear()  # here, since the error holds who made them, and the slots need their room
                with suppress(torch.OutOfMemoryError):
                    self.pool.make_slots()
                raise
            for put, tensor in copies:
                put(tensor)
            self._uninstall()
            while self._streamed:
                group, _ = self._streamed.popitem()
                self.pool.drop(group)
                group.store.release()
            self._embeddings = {}
            self._close()

    def _copy_all_to_device(self, copies: list[tuple[Callable[[torch.Tensor], None], torch.Tensor]]) -> None:
        """Bring all weights to the device.

        Args:
            copies: is given each, with what puts it into the model.

        Raises:
            OffloadError: a file is not what it was.
            torch.OutOfMemoryError: the device has no room.
        """
        stores = [group.store for group in self._streamed] + [files for files in self._embeddings.values() if files]
        for store in stores:
            store.require_unchanged()  # before: a map of a file that was cut short ends the process
        for group, by_leaf in self._streamed.items():
            for each in {each for streamed in by_leaf.values() for each in streamed}:
                copies.append((each.restore, group.store.source_of(each.name).to(self.device, copy=True)))
        for leaf in self._embeddings:
            for own in leaf.module.parameters():
                copies.append((functools.partial(setattr, own, "data"), own.data.to(self.device, copy=True)))
        for store in stores:
            store.require_unchanged()
