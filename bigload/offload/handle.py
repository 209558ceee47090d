"""`model.offload`: the weights of a loaded model that do not rest where they are computed."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..config import OffloadConfig
from ..errors import ConfigError, listed
from ..hardware.devices import CPU
from ..hardware.free_memory import free_bytes
from ..hardware.pinned import Store
from ..planning.plan import PlacedUnit, Plan
from .at_rest import ApplyGuards
from .device_hooks import detach
from .engine import Engine
from .files import FileGroup, limit_page_cache
from .forwards import forward_override_of
from .leaves import Group, Leaf, remove_all
from .model_device import ModelDevices
from .slot_pool import StreamStats
from .targets import OffloadTargets


class Offload:
    """What streams the weights of a model.

    Attributes:
        plan: where each of them rests and is computed.
    """

    def __init__(self, model: nn.Module, plan: Plan, config: OffloadConfig, targets: OffloadTargets) -> None:
        """Hook a model whose offloaded weights are in host memory, as the load has left them.

        Args:
            model: loaded.
            plan: by which.
            config: how many slots there are.
            targets: the memory that the weights are in.

        Raises:
            OffloadError: a weight cannot be streamed.
            torch.OutOfMemoryError: a device has no room for the slots.
        """
        self.plan = plan
        self._model = weakref.ref(model)
        self._engines: list[Engine] = []
        self._handles: list[Any] = []
        by_device: dict[torch.device, dict[PlacedUnit, list[Leaf]]] = defaultdict(dict)
        device_of: dict[Leaf, torch.device] = {}
        try:
            for placed in plan.offloaded:
                leaves = leaves_of(model, placed)
                if leaves:
                    by_device[placed.device][placed] = leaves
                    device_of |= dict.fromkeys(leaves, placed.device)
                for path in placed.unit.paths if placed.streamed_bytes else ():
                    hook = MoveAddedParameters(placed.device, leaves)
                    self._handles.append(model.get_submodule(path).register_forward_pre_hook(hook, prepend=True))
            for device, units in by_device.items():
                self._engines.append(_make_engine(model, units, device, config, targets))
            self._spare_page_cache()
            self._handles.append(ModelDevices(model, plan))
            self._handles.append(ApplyGuards(model, device_of))
        except BaseException:
            self.remove()
            raise

    def _spare_page_cache(self) -> None:
        stores = [group.store for engine in self._engines for group in engine.groups]
        on_disk = [store for store in stores if isinstance(store, FileGroup)]
        if on_disk:
            limit_page_cache(on_disk, free_bytes(CPU) // 2)

    def stats(self) -> StreamStats:
        """Tell what has been streamed since the load, over all devices."""
        each = [engine.stats() for engine in self._engines]
        rates = [stats.gb_per_s for stats in each if stats.gb_per_s]
        return StreamStats(
            sum(stats.nbytes for stats in each),
            sum(stats.fetches for stats in each),
            sum(stats.demand_fetches for stats in each),
            sum(stats.slots for stats in each),
            sum(rates) / len(rates) if rates else 0.0,
        )

    @contextmanager
    def materialize(self, module: nn.Module) -> Iterator[None]:
        """Have the weights in a module on the device while the block runs, to be read outside its forward.

        Raises:
            ConfigError: it is no module.
            torch.OutOfMemoryError: there is no room for them.
        """
        if not isinstance(module, nn.Module):
            raise ConfigError(f"materialize takes a module of the model, not {module!r}")
        with ExitStack() as stack:
            for engine in self._engines:
                stack.enter_context(engine.materialize(module))
            yield

    def remove(self) -> None:
        """Bring all weights to the devices that compute with them, there to stay, and free the host memory.

        Raises:
            torch.OutOfMemoryError: a device has no room for them.
        """
        remove_all(self._engines)
        for handle in self._handles:
            handle.remove()
        model = self._model()
        if model is None:
            return
        if len(set(self.plan.execution_map.values())) == 1:
            detach(model)  # all is on the device that computes
        if vars(model).get("offload") is self:
            del model.offload


def require_not_offloaded(model: Any) -> None:
    """Refuse to load into a model whose weights are streamed.

    Raises:
        ConfigError: it is offloaded.
    """
    streamed = [path for path, module in model.named_modules() if forward_override_of(module)]
    if streamed:
        raise ConfigError(
            f"the model is offloaded already ({listed(streamed)}): call model.offload.remove() first, or build it anew"
        )


class MoveAddedParameters:
    """A hook on a block that brings parameters to its device which others have put into it since the load.

    PEFT makes an adapter where the weight lies that it adapts, which for a streamed one is host memory.
    """

    def __init__(self, device: torch.device, leaves: Sequence[Leaf]) -> None:
        """Remember what shall stay in host memory."""
        self._away = {id(leaf.module.get_parameter(name)) for leaf in leaves for name in leaf.parameters}
        self._device = device
        self._has_looked = False

    def __call__(self, block: nn.Module, args: object) -> None:
        """Look for such parameters: before the first forward, and before each that gradients may be wanted of."""
        if self._has_looked and not torch.is_grad_enabled():
            return
        self._has_looked = True
        for parameter in block.parameters():
            if parameter.device != self._device and not parameter.is_meta and id(parameter) not in self._away:
                _move(parameter, self._device)


def _move(parameter: nn.Parameter, device: torch.device) -> None:
    parameter.data = parameter.data.to(device)


def _make_engine(
    model: nn.Module,
    units: Mapping[PlacedUnit, Sequence[Leaf]],
    device: torch.device,
    config: OffloadConfig,
    targets: OffloadTargets,
) -> Engine:
    groups: list[Group] = []
    embeddings: dict[Leaf, Store | None] = {}
    for placed, leaves in units.items():
        if placed.unit.is_embedding:
            files = targets.store_of(placed) if placed.home == "disk" else None
            embeddings |= dict.fromkeys(leaves, files)
        else:
            groups.append(Group(placed.unit.name, tuple(leaves), targets.store_of(placed)))
    return Engine(model, groups, device, config.slots, embeddings)


def leaves_of(model: nn.Module, placed: PlacedUnit) -> list[Leaf]:
    """List the modules of a unit whose weights rest elsewhere, with those weights."""
    found: dict[str, list[str]] = defaultdict(list)
    for planned in placed.unit.offloaded:
        path, _, name = planned.tensor.name.rpartition(".")
        found[path].append(name)
    return [Leaf(path, model.get_submodule(path), tuple(names)) for path, names in found.items()]
