"""`model.offload`: what streams the offloaded weights of a loaded model."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from html import escape
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from ..errors import ConfigError, counted, listed
from ..hardware.devices import CPU, on_cpu_unless_named
from ..hardware.free_memory import free_bytes
from ..hardware.pinned import Store
from ..notation import html_table, show
from ..planning.offload_config import OffloadConfig
from ..planning.placing.accounts import PlacedUnit
from ..planning.plan import Plan, without_values
from .device_hooks import attach
from .engine import Engine
from .files import FileGroup, limit_page_cache
from .forwards import forward_override_of, is_exporting
from .leaves import Group, Leaf, NonCopyable, remove_all
from .model_device import ApplyGuards, ModelDevices, entries_of_whole
from .on_device.slot_pool import StreamStats
from .targets import OffloadTargets


class Offload:
    """Streams the offloaded weights of a model, which has it as `model.offload`.

    Attributes:
        plan: where each weight is stored and computed.

    Examples:
        >>> import bigload, torch
        >>> layers = torch.nn.Sequential(torch.nn.Linear(1024, 2048), torch.nn.Linear(2048, 8))
        >>> model = bigload.load_and_quantize_model(
        ...     layers, "nf4", device_map={"": "cpu", "0": "disk"}, offload_folder="offload"
        ... )
        >>> model.offload
        Offload(1 unit offloaded, 1.13 MiB streamed for each forward, 0 B so far)
    """

    def __init__(self, model: nn.Module, plan: Plan, config: OffloadConfig, targets: OffloadTargets) -> None:
        """Hook a loaded model.

        Args:
            model: its offloaded weights are in the memory and files of `targets`.
            plan: its plan.
            config: the number of slots.
            targets: the stores of its offloaded weights.

        Raises:
            OffloadError: a weight cannot be streamed.
            torch.OutOfMemoryError: a device has no room for the slots.
        """
        self.plan = without_values(plan)
        self._model = weakref.ref(model)
        self._engines: list[Engine] = []
        self._handles: list[Any] = []
        by_device: dict[torch.device, dict[PlacedUnit, list[Leaf]]] = defaultdict(dict)
        device_of: dict[Leaf, torch.device] = {}
        modules = {path for path, _ in model.named_modules(remove_duplicate=False)}
        try:
            for placed in plan.offloaded:
                leaves = leaves_of(model, placed)
                if leaves:
                    by_device[placed.device][placed] = leaves
                    device_of |= dict.fromkeys(leaves, placed.device)
                for path in modules.intersection(placed.unit.paths) if leaves else ():
                    self._handles += MoveAddedParameters(model, path, placed.device, leaves).register()
            if len(set(plan.execution_map.values())) == 1:
                for device in set(device_of.values()):
                    added = MoveAddedParameters(model, "", device, [*device_of], always=False)
                    self._handles += added.register()
            for device, units in by_device.items():
                self._engines.append(_make_engine(model, units, device, config, targets))
            self._spare_page_cache()
            self._handles.append(ModelDevices(model, self.plan))
            self._handles.append(ApplyGuards(model, device_of))
        except BaseException:
            self.remove()
            raise

    def _spare_page_cache(self) -> None:
        stores = [group.store for engine in self._engines for group in engine.groups]
        on_disk = [store for store in stores if isinstance(store, FileGroup)]
        if on_disk:
            limit_page_cache(on_disk, free_bytes(CPU) // 2)

    def __repr__(self) -> str:
        stats = self.stats()
        return (
            f"Offload({counted(len(self.plan.offloaded), 'unit')} offloaded, {show(self.plan.streamed_bytes)} streamed "
            f"for each forward, {show(stats.nbytes)} so far)"
        )

    def _repr_html_(self) -> str:
        stats = [(name, str(value)) for name, value in vars(self.stats()).items()]
        return f"<div>{escape(repr(self))}</div>{html_table([('stats()', ''), *stats])}"

    def stats(self) -> StreamStats:
        """Return what has been streamed since the load, summed over all devices; the rate is their mean.

        Examples:
            >>> import bigload, torch
            >>> layers = torch.nn.Sequential(torch.nn.Linear(1024, 2048), torch.nn.Linear(2048, 8))
            >>> model = bigload.load_and_quantize_model(
            ...     layers, "nf4", device_map={"": "cpu", "0": "disk"}, offload_folder="offload"
            ... )
            >>> _ = model(torch.ones(1, 1024))
            >>> model.offload.stats().fetches
            1
        """
        each = [engine.stats() for engine in self._engines]
        rates = [stats.gb_per_s for stats in each if stats.gb_per_s]
        return StreamStats(
            sum(stats.nbytes for stats in each),
            sum(stats.fetches for stats in each),
            sum(stats.demand_fetches for stats in each),
            sum(stats.slots for stats in each),
            sum(rates) / len(rates) if rates else 0.0,
            sum(stats.expert_hits for stats in each),
            sum(stats.expert_misses for stats in each),
        )

    @contextmanager
    def materialize(self, module: nn.Module) -> Iterator[None]:
        """Keep the weights of a module on the device while the `with` block runs, to read them outside its forward.

        Args:
            module: any module of the model, or the model itself.

        Raises:
            ConfigError: `module` is not an nn.Module.
            torch.OutOfMemoryError: the device has no room for the weights.

        Examples:
            >>> import bigload, torch
            >>> layers = torch.nn.Sequential(torch.nn.Linear(1024, 2048), torch.nn.Linear(2048, 8))
            >>> model = bigload.load_and_quantize_model(
            ...     layers, "nf4", device_map={"": "cpu", "0": "disk"}, offload_folder="offload"
            ... )
            >>> with model.offload.materialize(model[0]):
            ...     model[0].weight.shape  # 1024 * 2048 values, two in a byte
            torch.Size([1048576, 1])
        """
        if not isinstance(module, nn.Module):
            raise ConfigError(f"materialize takes a module of the model, not {module!r}")
        with ExitStack() as stack:
            for engine in self._engines:
                stack.enter_context(engine.materialize(module))
            yield

    @on_cpu_unless_named()
    def remove(self) -> None:
        """Move all weights to the devices that compute them, for good, and free the host memory.

        Raises:
            OffloadError: the model is running, or a file with offloaded weights has changed.
            torch.OutOfMemoryError: a device has no room for the weights; the model is still offloaded.

        Examples:
            >>> import bigload, torch
            >>> layers = torch.nn.Sequential(torch.nn.Linear(1024, 2048), torch.nn.Linear(2048, 8))
            >>> model = bigload.load_and_quantize_model(
            ...     layers, "nf4", device_map={"": "cpu", "0": "disk"}, offload_folder="offload"
            ... )
            >>> model.offload.remove()
            >>> hasattr(model, "offload")
            False
        """
        remove_all(self._engines)
        for handle in self._handles:
            handle.remove()
        model = self._model()
        if model is None:
            return
        if len(set(self.plan.execution_map.values())) == 1:
            attach(model, {}, entries=entries_of_whole(model))  # all of it is on one device now
        if vars(model).get("offload") is self:
            del model.offload


def require_not_offloaded(model: Any) -> None:
    """Refuse to load into a model that is offloaded.

    Raises:
        ConfigError: a module of it has offloaded weights.
    """
    streamed = [path for path, module in model.named_modules() if forward_override_of(module)]
    if streamed:
        raise ConfigError(
            f"the model is offloaded already ({listed(streamed)}): call model.offload.remove() first, or build it again"
        )


class _Registrations:
    """Counts what is registered with any module. What others add to a block shows here at no cost for its forwards."""

    def __init__(self) -> None:
        self.count = 0
        self._is_counting = False
        self._listed = weakref.WeakSet[nn.Module]()  # what lists of modules have held

    def start(self) -> None:
        """Count from now on."""
        if not self._is_counting:
            self._is_counting = True
            register_module_module_registration_hook(self._add)
            register_module_parameter_registration_hook(self._add)

    def _add(self, module: nn.Module, name: str, added: object) -> None:
        # A compiled forward registers nothing but slices of lists. Dynamo would guard each module that is listed here,
        # and end in an error where one of them is freed while it compiles.
        if torch.compiler.is_compiling():
            return
        if isinstance(module, nn.ModuleList) and isinstance(added, nn.Module):
            if added in self._listed:
                return  # models of transformers make a slice of their blocks in each forward
            self._listed.add(added)
        self.count += 1


_registrations = _Registrations()


class MoveAddedParameters(NonCopyable):
    """A pre-hook that moves parameters that others have added to an offloaded block to its device.

    PEFT creates an adapter on the device of the weight that it adapts, which for an offloaded weight is the CPU. It
    puts a layer with the adapter in the place of the layer that it adapts, so what is at the path counts. Its
    `layer_replication` also puts copies of blocks there, which are not hooked: then the model itself is, where one
    device computes it.
    """

    def __init__(
        self, model: nn.Module, path: str, device: torch.device, leaves: Sequence[Leaf], *, always: bool = True
    ) -> None:
        """Remember the offloaded weights, which stay where they are, even if others exchange their parameters.

        Args:
            model: the model.
            path: the path in it of the block.
            device: the device that computes the block.
            leaves: its modules with offloaded weights.
            always: whether to look in each forward with gradients, or only once anything was registered.
        """
        self._model, self._path, self._device = weakref.ref(model), path, device
        self._leaves, self._always = leaves, always
        self._seen = -1  # of the registrations
        _registrations.start()

    def register(self) -> list[Any]:
        """Hook the block; for a single layer also what calls it, since what takes its place is not hooked."""
        model, path = self._model(), self._path
        assert model is not None  # it is being hooked
        hooked = [block := model.get_submodule(path)]
        if path and any(leaf.module is block for leaf in self._leaves):
            path = path.rpartition(".")[0]
            while isinstance(model.get_submodule(path), (nn.ModuleList, nn.ModuleDict)) and path:
                path = path.rpartition(".")[0]
            hooked.append(model.get_submodule(path))
        return [module.register_forward_pre_hook(self, prepend=True) for module in hooked]

    def __call__(self, module: nn.Module, args: object) -> None:
        """Look for them where anything was registered since the last forward, and where gradients are enabled."""
        if self._seen == _registrations.count and not (self._always and torch.is_grad_enabled()):
            return
        self._seen = _registrations.count
        model = self._model()
        # torch.export goes on to an offloaded weight, which says that it cannot be exported. The Dynamo of torch 2.11,
        # which knows no id() of a parameter, would end here.
        if model is None or is_exporting():
            return
        away = {id(leaf.module._parameters.get(name)) for leaf in self._leaves for name in leaf.parameters}
        for parameter in model.get_submodule(self._path).parameters():
            if parameter.device != self._device and not parameter.is_meta and id(parameter) not in away:
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
        if placed.unit.is_embedding or placed.by_cpu:
            files = targets.store_of(placed) if placed.home == "disk" else None
            embeddings |= dict.fromkeys(leaves, files)
        else:
            cached = placed.cached if placed.is_by_expert else None
            groups.append(Group(placed.unit.name, tuple(leaves), targets.store_of(placed), cached))
    return Engine(model, groups, device, config.slots, embeddings)


def leaves_of(model: nn.Module, placed: PlacedUnit) -> list[Leaf]:
    """List the modules of a unit that have offloaded weights, with the names of those weights."""
    found: dict[str, list[str]] = defaultdict(list)
    for planned in placed.unit.offloaded:
        path, _, name = planned.tensor.name.rpartition(".")
        found[path].append(name)
    return [Leaf(path, model.get_submodule(path), tuple(names)) for path, names in found.items()]
