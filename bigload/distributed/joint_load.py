"""Carries out a load that several processes do together: each loads its shares, and all end with the model, or none."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import ConfigError, listed
from ..hardware.devices import DeviceMap
from ..io.timeline import Timeline
from ..model.view import ModelView
from ..offload.handle import require_not_offloaded
from ..pipeline.assembly import Assembly
from ..pipeline.execute import execute
from ..planning.offload_config import OffloadConfig
from ..planning.placing.shares import shared_among
from ..planning.plan import Plan
from ..planning.planned_tensors import PlannedTensor
from ..planning.planner import plan_load
from ..planning.request import LoadRequest
from .parts import Shares, placeholder, to_execute
from .ranks import Ranks
from .sameness import facts_of
from .sharding import Sharding, groups_of, unsharded_on_failure


class JointLoad:
    """A load by the processes of a mesh.

    Attributes:
        ranks: the processes.
        replicate: whether each process gets the whole model, instead of a share of it.
        own: the plan of what this process reads, set by `planned`.
    """

    own: Plan

    def __init__(
        self,
        ranks: Ranks,
        *,
        replicate: bool,
        options: Mapping[str, Any],
        adapters: Callable[[nn.Module], nn.Module] | None,
    ) -> None:
        """Prepare a load; arguments are as of `load_and_quantize_model`."""
        self.ranks, self.replicate, self._options, self._adapters = ranks, replicate, options, adapters

    def requested(self, make: Callable[[], LoadRequest]) -> LoadRequest:
        """Return the request of a load, for this process's share.

        Args:
            make: checks the arguments, for all of the model.

        Raises:
            ConfigError: a mode that no shares are made of.
        """
        with self.ranks.told("plan"):
            request = make()
            if request.config.llm_int8_has_fp16_weight:
                raise ConfigError(
                    "int8-training trains weights that are quantized anew in each forward, which mesh does not divide: "
                    "use 'nf4' or 'int8' with adapters"
                )
            if self.replicate:  # what it holds is planned, all of it, not what it reads
                return request
            return replace(request, placement=replace(request.placement, select=self._shares))

    def _shares(self, view: ModelView, tensors: Sequence[PlannedTensor]) -> list[PlannedTensor]:
        return shared_among(tensors, self.ranks.rank, self.ranks.ranks)

    def planned(self, model: nn.Module, request: LoadRequest) -> tuple[ModelView, Plan]:
        """Make this process's plan, and make sure that the others load the same.

        Raises:
            DistributedError: another process could not, or loads something else.
        """
        facts: dict[str, str] = {}
        with self.ranks.agreed("plan", facts):
            view = ModelView(model)
            if "offload" in vars(model):
                require_not_offloaded(model)
            plan = plan_load(view, request)
            ways = (self.replicate, sorted(self._options), self._adapters is not None)
            facts |= {**facts_of(request, plan), "arguments (replicate, fsdp_options, adapters)": repr(ways)}
            shares = tuple(self._shares(view, plan.tensors)) if self.replicate else plan.tensors
            self.own = replace(plan, tensors=shares)
        return view, plan

    def carry_out(
        self,
        view: ModelView,
        request: LoadRequest,
        plan: Plan,
        on_bytes: Callable[[int], object],
        timeline: Timeline,
        then: Callable[[nn.Module], object],
    ) -> nn.Module:
        """Load the shares and put the model together; returns it.

        Args:
            view: of the model.
            request: what is loaded.
            plan: from `plan`.
            on_bytes: called with the number of bytes that were loaded since the last call.
            timeline: gets the times.
            then: called with the complete model, if this process gets all of it.

        Raises:
            DistributedError: another process failed.
        """

        divided = [] if self.replicate else [planned for planned in self.own.tensors if planned.share is not None]

        @functools.cache
        def prepared() -> list[str]:
            """Make layers without weights, and find what is gathered together: needs nothing of what is read."""
            assembly.prepare()
            for planned in divided:
                assembly.add(planned.tensor.name, placeholder(planned, plan.config.load_dtype))
            return [] if self.replicate else groups_of(view, plan, request.placement.no_split_module_classes)

        with self.ranks.agreed("load"):
            assembly = Assembly(view, plan)
            loaded = execute(to_execute(self.own), on_bytes=on_bytes, meanwhile=prepared, timeline=timeline)
            if request.checkpoint is not None:
                request.checkpoint.require_unchanged()
            groups = prepared()  # if nothing was read
        with self.ranks.agreed("share"):
            parts = self._shared_out(Shares(self.ranks, self.own, loaded), assembly, divided)
        made: list[nn.Module] = []

        def finish(model: nn.Module) -> None:
            with unsharded_on_failure(model), self.ranks.agreed("commit"):
                if self.replicate:
                    then(model)
                    made.append(model)
                else:
                    sharding = Sharding(groups, self._options, self._adapters)
                    names = {planned.tensor.name: planned.tensor.names for planned in plan.tensors}
                    made.append(sharding.shard(model, parts, names, self.ranks))

        with self.ranks.told("commit"):
            assembly.commit(finish)
        return made[0]

    def _shared_out(
        self, shares: Shares, assembly: Assembly, divided: Sequence[PlannedTensor]
    ) -> dict[str, nn.Parameter]:
        """Return this process's parts of what is divided, by first name; whole tensors are added. Collectives."""
        parts, names = dict[str, nn.Parameter](), {planned.tensor.name for planned in divided}
        for planned in self.own.tensors:
            name = planned.tensor.name
            if name in names:
                parts[name] = shares.part(planned)
            elif (value := shares.gathered(planned)) is not None:
                assembly.add(name, value)
        return parts


def joint_load(
    mesh: Any,
    replicate: bool,
    options: Mapping[str, Any] | None,
    adapters: Callable[[nn.Module], nn.Module] | None,
    device_map: DeviceMap,
    offload: OffloadConfig | None,
    offload_folder: Any,
) -> JointLoad | None:
    """Return the load that processes do together, if there is a mesh of them.

    Args:
        mesh, replicate, options, adapters: as `load_and_quantize_model` is given them.
        device_map, offload, offload_folder: the arguments that a mesh leaves no choice of.

    Raises:
        ConfigError: the mesh is none, or arguments contradict it.
    """
    if mesh is None:
        if replicate or options is not None or adapters is not None:
            raise ConfigError(
                "replicate, fsdp_options and adapters say how processes share a model: pass the mesh of them too"
            )
        return None
    ranks = Ranks(mesh, "load_and_quantize_model", "plan")
    given = {"device_map": device_map, "offload": offload, "offload_folder": offload_folder}
    named = [name for name, value in given.items() if value is not None]
    with ranks.told("plan"):
        if named:
            raise ConfigError(
                f"{listed(named)}: with a mesh each process computes on its current device, with all weights on one; "
                "leave it out, and call torch.cuda.set_device before the mesh is made (to keep weights in host memory, "
                "pass fsdp_options={'offload_policy': CPUOffloadPolicy()})"
            )
        if replicate and (options is not None or adapters is not None):
            raise ConfigError(
                "fsdp_options and adapters are for fully_shard, which replicate=True does not use: leave them out "
                "(adapters can be added to the model that is returned)"
            )
    return JointLoad(ranks, replicate=replicate, options=options or {}, adapters=adapters)
