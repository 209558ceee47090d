"""Pipelines over several processes: each loads the blocks of its stage alone, for torch.distributed.pipelining.

A stage runs the model's own forward, whatever it is, with the same arguments as the others. Modules of other stages are
passed by: embeddings give zeros, all others what they are given. Where the first block of the stage begins, what the
stage before has sent takes the place of what passed by.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage

from ..checkpoint.checkpoint import WeightsLocation
from ..errors import ConfigError, PlacementError, QuantizationError, counted, listed
from ..hardware.devices import Device, on_cpu_unless_named
from ..hardware.interrupts import deferred_interrupts
from ..hardware.nested_tensors import tensors_in
from ..io.timeline import Timeline
from ..model.transformers_facts import is_pretrained
from ..model.view import ModelView
from ..pipeline.assembly import Assembly
from ..pipeline.execute import execute
from ..pipeline.progress import progress_bar
from ..pipeline.report import LoadReport
from ..planning.plan import Plan
from ..planning.planned_tensors import PlannedTensor
from ..planning.planner import plan_load
from ..planning.request import LoadRequest, load_request
from ..planning.sources import KeyMapping
from ..planning.units import Unit, units_of
from .ranks import Ranks
from .sameness import facts_of_files
from .sharding import unsharded_on_failure


class StageModule(nn.Module):
    """The blocks of one stage of a pipeline, within the model that they are of.

    Attributes:
        model: the model; modules of other stages are replaced by what passes them by.
        index: the number of the stage, from 0.
        count: how many stages there are.
        blocks: the paths of its blocks.
        load_report: the figures of its load.
    """

    load_report: LoadReport

    def __init__(self, model: nn.Module, index: int, ranks: Ranks, blocks: Sequence[str]) -> None:
        super().__init__()
        self.model, self.index, self.count, self.blocks = model, index, ranks.ranks, tuple(blocks)
        self._ranks = ranks
        self._received: torch.Tensor | None = None
        self._made: torch.Tensor | None = None
        model.get_submodule(blocks[0]).register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True)
        model.get_submodule(blocks[-1]).register_forward_hook(self._leave)

    @property
    def is_last(self) -> bool:
        """Whether its output is the model's."""
        return bool(self.index == self.count - 1)

    def forward(self, hidden: torch.Tensor | None = None, **given: Any) -> torch.Tensor:
        """Run the stage.

        Args:
            hidden: what the stage before has made; None for the first.
            given: the model's arguments, the same in all stages, by name.

        Returns:
            What its last block makes; of the last stage the model's logits, or the first tensor of its output.
        """
        if is_pretrained(self.model):
            given.setdefault("use_cache", False)
        self._received, self._made = hidden, None
        try:
            out = self.model(**given)
            made = self._made if not self.is_last else getattr(out, "logits", None)
            return next(iter(tensors_in(out))) if made is None else made
        finally:
            self._received = self._made = None

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._received is None:
            return None
        if args:
            return (self._received, *args[1:]), kwargs
        name = next((name for name in ("hidden_states", "x", "input") if name in kwargs), next(iter(kwargs)))
        return args, {**kwargs, name: self._received}

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.count > 1 and not isinstance(output, torch.Tensor):
            raise QuantizationError(
                f"'{self.blocks[-1]}' returns a {type(output).__name__}, but stages send a tensor from block to block: "
                "use device_map='balanced' in one process, or mesh= in load_and_quantize_model, for this model"
            )
        self._made = output

    def pipeline_stage(self, **given: Any) -> PipelineStage:
        """Return it as schedules of torch.distributed.pipelining take it. Called in all processes.

        Args:
            given: the model's arguments for one micro-batch, by name; all micro-batches have these shapes.
        """
        with torch.no_grad():
            sent: list[Any] = [None]
            inputs: tuple[torch.Tensor, ...] = ()
            if self.index == 0:
                output = self(**given)
                sent = [(tuple(output.shape), output.dtype)]
            group = self._ranks.group
            dist.broadcast_object_list(sent, dist.get_global_rank(group, 0), group=group, device=self._ranks.device)
            if self.index > 0:
                shape, dtype = sent[0]
                inputs = (torch.zeros(shape, dtype=dtype, device=self._ranks.device),)
                output = self(*inputs, **given)
        return PipelineStage(
            self, self.index, self.count, self._ranks.device, inputs, (output,), group=self._ranks.group
        )


class _Passed(nn.Module):
    """Stands for a module of another stage."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self._width = module.embedding_dim if isinstance(module, nn.Embedding) else None
        self._dtype = dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else next(iter(kwargs.values()))
        if self._width is None:
            return given
        return torch.zeros(*given.shape, self._width, dtype=self._dtype, device=given.device)


class _Division:
    """Divides a model among stages, and keeps the tensors of one.

    Attributes:
        blocks: the paths of the stage's blocks.
        passed: the paths of modules of other stages.
    """

    def __init__(self, index: int, count: int, classes: Collection[str] | None) -> None:
        self._index, self._count, self._classes = index, count, classes
        self.blocks: list[str] = []
        self.passed: list[str] = []

    def select(self, view: ModelView, tensors: list[PlannedTensor]) -> list[PlannedTensor]:
        units = [unit for unit in units_of(view, tensors, self._classes, warns=False) if unit.has_parameters]
        blocks = [unit for unit in units if unit.is_block]
        if len(blocks) < self._count:
            raise PlacementError(
                f"the model has {counted(len(blocks), 'block')}, too few for {counted(self._count, 'stage')}: use a "
                "mesh of fewer processes, or name its blocks in no_split_module_classes"
            )
        order = {path: number for number, path in enumerate(view.modules)}
        first, last = (order[block.name] for block in (blocks[0], blocks[-1]))
        ends = [0, 0]  # bytes before the blocks, and after them
        stage_of: dict[str, int] = {}
        for unit in units:
            if unit.is_block:
                continue
            _require_modules(unit, view)
            for path in unit.paths:
                is_before = order[path] < first
                if not is_before and order[path] < last:
                    raise PlacementError(
                        f"'{path}' is between the blocks of the model, which stages cannot be made of: use "
                        "device_map='balanced' in one process"
                    )
                stage_of[path] = 0 if is_before else self._count - 1
                ends[not is_before] += unit.nbytes
        numbers = divided([block.nbytes for block in blocks], self._count, ends[0], ends[1])
        stage_of |= {block.name: number for block, number in zip(blocks, numbers, strict=True)}
        self.blocks = [block.name for block in blocks if stage_of[block.name] == self._index]
        self.passed = [path for path, stage in stage_of.items() if stage != self._index]
        away = tuple(f"{path}." for path in self.passed)
        return [planned for planned in tensors if not all(name.startswith(away) for name in planned.tensor.names)]


def _require_modules(unit: Unit, view: ModelView) -> None:
    alone = [path for path in unit.paths if path not in view.modules]
    if alone:
        raise PlacementError(
            f"{listed(alone)}: parameters outside modules, which stages cannot be made of: use device_map='balanced' "
            "in one process"
        )


def divided(sizes: Sequence[int], parts: int, before: int = 0, after: int = 0) -> list[int]:
    """Divide blocks among stages in their order, so that the largest stage is as small as it can be.

    Args:
        sizes: bytes of each block.
        parts: how many stages there are; no more than blocks.
        before, after: bytes of what the first and the last stage hold beside their blocks.

    Returns:
        The stage of each block; each has one at least.

    Examples:
        >>> divided([1, 1, 1, 1], 2, before=2)
        [0, 1, 1, 1]
        >>> divided([4, 1, 1, 1], 3)
        [0, 1, 1, 2]
    """
    low, high = max(sizes), sum(sizes) + before + after
    while low < high:
        limit = (low + high) // 2
        if _within(sizes, parts, before, after, limit) is None:
            low = limit + 1
        else:
            high = limit
    found = _within(sizes, parts, before, after, low)
    assert found is not None
    return found


def _within(sizes: Sequence[int], parts: int, before: int, after: int, limit: int) -> list[int] | None:
    stages, stage, held = list[int](), 0, before
    for number, size in enumerate(sizes):
        is_full = held + size > limit and number > 0
        must_go_on = len(sizes) - number <= parts - 1 - stage and number > 0 and stages[-1] == stage
        if (is_full or must_go_on) and stages and stages[-1] == stage and stage < parts - 1:
            stage, held = stage + 1, 0
        held += size
        if held + (after if stage == parts - 1 and number == len(sizes) - 1 else 0) > limit:
            return None
        stages.append(stage)
    return stages if stages[-1] == parts - 1 else None


@deferred_interrupts()
@on_cpu_unless_named()
def load_pipeline_stage(
    model: nn.Module,
    bnb_quantization_config: Any,
    weights_location: WeightsLocation,
    mesh: Any,
    no_split_module_classes: Sequence[str] | None = None,
    max_memory: Mapping[Device, int | str] | None = None,
    *,
    key_mapping: KeyMapping | None = None,
    tied_parameters: Sequence[tuple[str, str]] | None = None,
    quantizable: Sequence[type[nn.Linear]] = (),
    progress: bool | None = None,
) -> StageModule:
    """Load one stage of a model in each process of a mesh, for inference over several GPUs or hosts.

    The model's blocks are divided among the processes in their order, by their bytes; embeddings are with the first,
    the norm and the head with the last. Each process reads and quantizes the weights of its stage alone.

    Args:
        model: on meta.
        bnb_quantization_config: as for `load_and_quantize_model`.
        weights_location: as for `load_and_quantize_model`.
        mesh: a `DeviceMesh` of one dimension.
        no_split_module_classes: as for `load_and_quantize_model`.
        max_memory: as for `load_and_quantize_model`.
        key_mapping: as for `load_and_quantize_model`.
        tied_parameters: as for `load_and_quantize_model`.
        quantizable: as for `load_and_quantize_model`.
        progress: as for `load_and_quantize_model`.

    Returns:
        The stage. `stage.pipeline_stage(input_ids=...)` is what torch's schedules take.

    Raises:
        ConfigError: an argument is invalid.
        CheckpointError: the checkpoint is damaged, or does not fit the model.
        PlacementError: the model cannot be divided, or a stage does not fit.
        DistributedError: another process failed, did not answer in time, or loads other files.

    Examples:
        In each process of `torchrun --nproc_per_node 2`::

            mesh = init_device_mesh("cuda", (2,))
            with bigload.init_empty_weights():
                model = AutoModelForCausalLM.from_config(config)
            stage = load_pipeline_stage(model, "nf4", "checkpoint/", mesh)

        >>> from bigload.distributed.stages import load_pipeline_stage
        >>> load_pipeline_stage(None, "nf4", "checkpoint/", mesh=None)
        Traceback (most recent call last):
        bigload.errors.ConfigError: ...
    """
    ranks = Ranks(mesh, "load_pipeline_stage", "plan")
    if mesh.ndim != 1:
        raise ConfigError("a pipeline needs a mesh of one dimension: pass one of its dimensions, mesh['name']")
    division = _Division(ranks.rank, ranks.ranks, no_split_module_classes)
    with torch.inference_mode(False), torch.no_grad():
        facts: dict[str, str] = {}
        timeline = Timeline()
        with ranks.agreed("plan", facts):
            request = load_request(
                bnb_quantization_config,
                weights_location,
                ranks.device,
                no_split_module_classes,
                max_memory,
                key_mapping=key_mapping,
                tied_parameters=tied_parameters,
                quantizable=quantizable,
            )
            request = replace(request, placement=replace(request.placement, select=division.select))
            view = ModelView(model)
            plan = plan_load(view, request)
            facts |= facts_of_files(request)
        with ranks.agreed("load"):
            assembly, bar = Assembly(view, plan), progress_bar(plan.source_bytes, "loading", progress)
            with bar:
                execute(plan, on_bytes=bar.update, on_loaded=assembly.add, timeline=timeline)
        with ranks.told("commit"):
            made = _committed(assembly, plan, division, ranks)
    made.load_report = _report(request, plan, timeline)
    return made


def _report(request: LoadRequest, plan: Plan, timeline: Timeline) -> LoadReport:
    return LoadReport(
        request.config.mode, plan.read_bytes, timeline.elapsed_s, plan.device_bytes, source=request.source
    )


def _committed(assembly: Assembly, plan: Plan, division: _Division, ranks: Ranks) -> StageModule:
    made: list[StageModule] = []

    def finish(root: nn.Module) -> None:
        with unsharded_on_failure(root), ranks.agreed("commit"):
            for path in division.passed:
                parent, _, name = path.rpartition(".")
                passed = _Passed(root.get_submodule(path), plan.config.load_dtype)
                root.get_submodule(parent)._modules[name] = passed
            made.append(StageModule(root, division._index, ranks, division.blocks))

    assembly.commit(finish)
    return made[0]
