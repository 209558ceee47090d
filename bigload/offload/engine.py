"""Streams weights from host memory, or files, to the device when forward or backward reaches them.

The forward of each leaf module is overridden. Weights are copied by groups (a decoder layer), each group in one copy on
a separate CUDA stream into one of a few slots, while the groups before it compute. The order of the groups is learned
as the model runs; a wrong guess costs one copy that forward waits for.
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
    """Streams the weights of a model's groups to one device. The model may run in several threads, on any CUDA stream.

    Attributes:
        groups: what is streamed.
        device: the device that computes the groups.
        pool: the slots on it.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        device: torch.device,
        slots: int = 2,
        embeddings: Mapping[Leaf, Store | None] = _NONE,
    ) -> None:
        """Override the forwards of the leaves; at rest, their tensors are views of their groups' memory.

        Args:
            model: everything in it that is not offloaded must be on the device already.
            groups: in the order in which forward is likely to reach them.
            device: the device that computes them, a GPU or the CPU.
            slots: the number of groups that are on the device at once: the one in use and those being copied.
            embeddings: modules that the CPU computes, where their weights stay, each with the files that hold the
                weights, or None if they are in memory.

        Raises:
            ConfigError: `slots` is below 1.
            OffloadError: a leaf cannot be streamed, or another module uses its weight too.
            torch.OutOfMemoryError: the device has no room for the slots. The model is unchanged.
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
        except BaseException:  # Ctrl-C too
            self._uninstall()
            self.pool.copier.close()
            raise
        # The memory of the slots must not be reused while a copy into them is running.
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
        """Return what has been streamed so far."""
        return self.pool.stats()

    @contextmanager
    def materialize(self, module: nn.Module) -> Iterator[None]:
        """Keep the weights of all leaves in a module on the device while the `with` block runs.

        Raises:
            torch.OutOfMemoryError: the device has no room for that many groups.
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
        """Move all weights to the device for good, and free the slots and the host memory.

        A second call finishes one that was interrupted.

        Raises:
            OffloadError: a leaf is running, or a file has changed.
            torch.OutOfMemoryError: the device has no room for all weights; they are still streamed.
        """
        with self.pool.lock:
            copies: list[tuple[Callable[[torch.Tensor], None], torch.Tensor]] = []
            try:
                self.pool.free_all()
                self._copy_all_to_device(copies)
            except BaseException:
                copies.clear()  # the traceback keeps this frame, and the slots need the memory
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
        """Append a copy of each weight on the device, with the function that puts it into the model."""
        stores = [group.store for group in self._streamed] + [files for files in self._embeddings.values() if files]
        for store in stores:
            store.require_unchanged()  # reading a mapping of a file that was truncated would kill the process
        for group, by_leaf in self._streamed.items():
            for each in {each for streamed in by_leaf.values() for each in streamed}:
                copies.append((each.restore, group.store.source_of(each.name).to(self.device, copy=True)))
        for leaf in self._embeddings:
            for own in leaf.module.parameters():
                copies.append((functools.partial(setattr, own, "data"), own.data.to(self.device, copy=True)))
        for store in stores:
            store.require_unchanged()
