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

from ..errors import ConfigError, OffloadError
from ..hardware.layout import TensorSpec
from ..hardware.pinned import HostGroup, Store
from ..quantization.experts import has_quantized_experts
from .at_rest import hook_embedding, hook_state_dicts, keep_writes, stop_keeping_writes
from .expert_forwards import ExpertsForward
from .forwards import CpuForward, ForwardOverride, StreamedForward
from .leaves import (
    Group,
    Leaf,
    NonCopyable,
    StreamedTensor,
    remove_all,
    require_owned,
    require_stored,
    streamed_by_leaf,
    streamed_tensors_of,
    without_torch_function,
)
from .on_device.slot_pool import SlotPool, StreamStats
from .on_device.slots import Slot
from .residency import Residency

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
        self._model = weakref.ref(model)
        self._streamed = {group: streamed_by_leaf(group) for group in groups}
        for group, streamed in self._streamed.items():
            require_stored(group, streamed)
        require_owned(model, self._streamed, embeddings)
        self.pool = SlotPool(groups, device, slots, self._forget_slot)
        self._weights: list[Residency] = []
        self._forwards: list[ForwardOverride] = []
        self._state_hooks: list[Any] = []
        self._is_leaving = False
        try:
            self._install()
        except BaseException:  # Ctrl-C too
            self._uninstall()
            self._stop_keeping_writes()
            self.pool.copier.close()
            raise
        # The memory of the slots must not be reused while a copy into them is running.
        self._close = weakref.finalize(self, self.pool.copier.close)
        self._close.atexit = False

    def _install(self) -> None:
        own = weakref.ref(self)

        def adopt(group: Group) -> None:
            engine = own()
            if engine is not None:
                engine.adopt(group)

        for group, by_leaf in self._streamed.items():
            for leaf, streamed in by_leaf.items():
                self._put_at_rest(group, streamed)
                weights = Residency(self.pool, group, leaf, streamed, adopt)
                self._weights.append(weights)
                is_experts = has_quantized_experts(leaf.module)
                self._forwards.append(ExpertsForward(weights) if is_experts else StreamedForward(weights))
                self._state_hooks += hook_state_dicts(weights, self.pool)
        self._forwards += [
            CpuForward(leaf.path, leaf.module, self.device, None if files is None else files.require_unchanged)
            for leaf, files in self._embeddings.items()
        ]
        for leaf in self._embeddings:
            self._state_hooks.append(hook_embedding(leaf.module))
        for parameter in self._embedded():
            keep_writes(parameter, self.pool)

    def _embedded(self) -> list[nn.Parameter]:
        """List the parameters that the CPU computes with. The biases of experts are on the device."""
        return [
            parameter
            for leaf in self._embeddings
            for name, parameter in leaf.module.named_parameters()
            if name in leaf.parameters or not has_quantized_experts(leaf.module)
        ]

    def _put_at_rest(self, group: Group, streamed: Sequence[StreamedTensor]) -> None:
        for each in streamed:
            if each.parameter is not None:
                keep_writes(each.parameter, self.pool)
            each.put_at_rest(group.store.tensors[each.name])

    def adopt(self, group: Group) -> None:
        """Stream what others have written to a group's weights, or put in their place, of any dtype and shape.

        The caller holds the pool's lock.

        Raises:
            OffloadError: a weight is in use, on meta, or shared with a module that would not find it.
        """
        before = {each for own in self._streamed[group].values() for each in own}
        for each in before:
            writes = each.writes(group.store.tensors[each.name])
            if each.is_written(writes):
                group.store.use_written(each.name)
                self.pool.forget(group)
                each.note_writes(writes)  # last: if Ctrl-C comes before, the next call finds them again
        if not self._is_replaced(group):
            return
        if any(each.is_used() for each in before):
            raise OffloadError(f"a weight of {group.name!r} was replaced while others are in use on the device")
        with without_torch_function():
            for each in before:
                each.swap_out(group.store.tensors)  # what Ctrl-C has left
        streamed = streamed_by_leaf(group)
        tensors = {each.name: each.get() for own in streamed.values() for each in own}
        for name, tensor in tensors.items():
            if tensor.is_meta:
                raise OffloadError(f"{name!r} was offloaded, and has been put on meta since: give it values")
        model = self._model()
        if model is not None:
            require_owned(model, self._streamed | {group: streamed}, self._embeddings)
        specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        store: Store = group.store
        if specs != store.layout.parts:
            store = HostGroup(specs, self.device)
        other = [name for name, tensor in tensors.items() if tensor.data_ptr() != store.tensors[name].data_ptr()]
        if other:
            self.pool.copier.finish()  # forwards that a GPU has not computed yet read the old values from there
        for name in other:
            store.tensors[name].copy_(tensors[name])
            store.use_written(name)
        if other:
            self.pool.exchange_store(group, store)
        # All follow before the first tensor is at rest: until all are, the next call finds one that is replaced.
        own = [weights for weights in self._weights if weights.group is group]
        for weights in own:
            weights.follow(streamed[weights.leaf])
        self._streamed[group] = streamed
        for weights in own:
            self._put_at_rest(group, streamed[weights.leaf])

    def _uninstall(self) -> None:
        remove_all(self._state_hooks)
        remove_all(self._forwards)

    def _stop_keeping_writes(self) -> None:
        own = [each.parameter for by_leaf in self._streamed.values() for held in by_leaf.values() for each in held]
        stop_keeping_writes([parameter for parameter in own if parameter is not None] + self._embedded())

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
                if not self._is_leaving:  # else what is not at rest any more, an interrupted call has put there
                    self._adopt_replaced()
                self.pool.free_all()
                self._copy_all_to_device(copies)
            except BaseException:
                copies.clear()  # the traceback keeps this frame, and the slots need the memory
                with suppress(torch.OutOfMemoryError):
                    self.pool.make_slots()
                raise
            self._is_leaving = True
            with without_torch_function():
                for put, tensor in copies:
                    put(tensor)
            self._uninstall()
            self._stop_keeping_writes()
            while self._streamed:
                group, _ = self._streamed.popitem()
                self.pool.drop(group)
                group.store.release()
            self._embeddings = {}
            self._close()

    def _adopt_replaced(self) -> None:
        for group in self._streamed.copy():
            self.adopt(group)

    def _is_replaced(self, group: Group) -> bool:
        at_rest, by_leaf = group.store.tensors, self._streamed[group]
        return any(each.is_replaced(at_rest[each.name]) for streamed in by_leaf.values() for each in streamed)

    def _copy_all_to_device(self, copies: list[tuple[Callable[[torch.Tensor], None], torch.Tensor]]) -> None:
        """Append a copy of each weight on the device, with the function that puts it into the model."""
        stores = [group.store for group in self._streamed] + [files for files in self._embeddings.values() if files]
        for store in stores:
            store.require_unchanged()  # reading a mapping of a file that was truncated would kill the process
        for group, by_leaf in self._streamed.items():
            for each in {each for streamed in by_leaf.values() for each in streamed}:
                copies.append((each.restore, group.store.source_of(each.name).to(self.device, copy=True)))
        with without_torch_function():
            for own in self._embedded():
                copies.append((functools.partial(setattr, own, "data"), own.data.to(self.device, copy=True)))
        for leaf in self._embeddings:
            for each in streamed_tensors_of(leaf) if has_quantized_experts(leaf.module) else ():
                if each.parameter is None:  # scales
                    copies.append((each.put, each.get().to(self.device, copy=True)))
        for store in stores:
            store.require_unchanged()
