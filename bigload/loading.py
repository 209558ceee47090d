"""`load_and_quantize_model`: loads a checkpoint into a model, quantizes it, and prepares it to run."""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from .checkpoint.bitsandbytes import QuantizedTensor
from .checkpoint.checkpoint import WeightsLocation
from .checkpoint.scaled.tensor import ScaledTensor
from .checkpoint.scaled.values import runs_kernel
from .distributed.joint_load import JointLoad, joint_load
from .distributed.sharding import require_not_sharded
from .errors import BigloadError, PlacementError
from .hardware.allocation import is_shortage
from .hardware.collector import without_collections
from .hardware.devices import CPU, Device, DeviceMap, named_devices, on_cpu_unless_named
from .hardware.interrupts import deferred_interrupts
from .io.ring import pin_ahead, release_ring
from .io.timeline import Timeline
from .model.view import ModelView
from .notation import show
from .offload.device_hooks import attach, detach
from .offload.handle import Offload, require_not_offloaded
from .offload.model_device import entries
from .offload.targets import OffloadTargets
from .pipeline.assembly import Assembly
from .pipeline.execute import execute
from .pipeline.progress import progress_bar
from .pipeline.report import LoadReport, PeakMemory
from .planning.offload_config import OffloadConfig
from .planning.plan import Plan
from .planning.planned_tensors import quantized_format
from .planning.planner import plan_load
from .planning.request import LoadRequest, PlacementRequest, load_request
from .planning.sources import KeyMapping
from .quantization import bnb
from .quantization.formats import Plain
from .quantization.quantizer import code_table, load_kernels

logger = logging.getLogger(__name__)


@deferred_interrupts()
@on_cpu_unless_named()
@without_collections()  # a load makes many objects and no garbage; for 10,000 tensors they took half of the time
def load_and_quantize_model(
    model: nn.Module,
    bnb_quantization_config: Any,
    weights_location: WeightsLocation | None = None,
    device_map: DeviceMap = None,
    no_split_module_classes: Sequence[str] | None = None,
    max_memory: Mapping[Device, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    offload_state_dict: bool = False,
    *,
    offload: OffloadConfig | None = None,
    key_mapping: KeyMapping | None = None,
    tied_parameters: Sequence[tuple[str, str]] | None = None,
    quantizable: Sequence[type[nn.Linear]] = (),
    initialize_missing: Sequence[str] = (),
    strict: bool = False,
    progress: bool | None = None,
    mesh: Any = None,
    replicate: bool = False,
    fsdp_options: Mapping[str, Any] | None = None,
    adapters: Callable[[nn.Module], nn.Module] | None = None,
) -> nn.Module:
    """Load a checkpoint into a model, and quantize each Linear with bitsandbytes while the weights are read.

    The first eight parameters are accelerate's. If the load fails, the model is unchanged and can be loaded again.

    Args:
        model: on meta or real. A real one without `weights_location` is quantized from its own weights.
        bnb_quantization_config: a `BnbQuantizationConfig` (ours or accelerate's), transformers'
            `BitsAndBytesConfig`, a dict of any of them, or a mode such as "nf4-dq"; not changed. For a checkpoint that
            is quantized already pass None, or a config that changes only how the layers compute.
        weights_location: a .safetensors, .bin, .pt or .pth file, an .index.json, a folder with one of them, or a
            repository of the Hugging Face hub, "org/name" or "org/name@revision".
        device_map: None (the current GPU, or the CPU if there is none), a device, {block path: device, "cpu" or
            "disk"}, or a strategy: "auto" or "balanced" spread the model evenly over all GPUs, "balanced_low_0" puts as
            little as possible on the first, "sequential" fills one after the other.
        no_split_module_classes: names of the classes of blocks that must stay whole on one device; by default the
            model's own `_no_split_modules`, else the classes in its largest list of modules.
        max_memory: {device, "cpu" or "disk": bytes or "10GiB"}, by default what is free. A model that needs more is
            refused before any weight is read. If it names GPUs, only those are used.
        offload_folder: a folder for the weights of blocks on "disk" that the checkpoint does not store in the form
            needed. Each weight is quantized once; the next load reuses the file.
        offload_state_dict: accepted for compatibility; has no effect.
        offload: an `OffloadConfig`: how much of a GPU to keep free for activations, and how to store offloaded blocks.
        key_mapping: renames checkpoint keys: {regex: replacement} applied in turn, or a function.
        tied_parameters: pairs of names of parameters that are one weight, if the model neither shares them nor has a
            transformers class that ties them.
        quantizable: further subclasses of nn.Linear to quantize; those that compute exactly the same are quantized
            anyway.
        initialize_missing: names of modules or parameters that the checkpoint may lack, such as a new head
            ("score",): their classes initialise them. Parameters that it lacks and that are real keep their values,
            with a warning. Neither is quantized.
        strict: raise instead of warning, for checkpoint tensors without a place in the model, and for real parameters
            that the checkpoint lacks.
        progress: show a progress bar in bytes; by default on a terminal and in a notebook.
        mesh: a `DeviceMesh`, in each process of it, as torchrun starts them: each reads, quantizes and holds its share
            of every weight, on its current device, and the model ends with torch's `fully_shard` applied to each block
            and to itself. Two dimensions are (replicate, shard), as there.
        replicate: with a mesh, each process ends with the whole model, as for DDP; it still reads only its share, and
            gets the others' from them.
        fsdp_options: further arguments of `fully_shard`, such as `reshard_after_forward`.
        adapters: with a mesh, adds adapters before the model is sharded, as `lambda model: get_peft_model(model,
            config)` does: they are then sharded with the blocks that they are in. All processes get the values that the
            first gives them.

    Returns:
        The same model, with `load_report`, `hf_device_map`, `is_loaded_in_4bit` and `is_loaded_in_8bit` set, and for a
        transformers model also the attributes that its own loader sets. (A model that is itself one Linear is replaced,
        so use the returned model.)

    Raises:
        ConfigError: the config or an argument is invalid.
        CheckpointError: the checkpoint is damaged, or does not fit the model.
        PlacementError: the device map or the budgets cannot be met.
        QuantizationError: a weight has values that the format cannot represent.
        OffloadError: a weight cannot be streamed, or `offload_folder` cannot be written.
        DistributedError: with a mesh, another process failed, did not answer in time, or loads something else.

    Examples:
        >>> import tempfile, bigload
        >>> from safetensors.torch import save_model
        >>> from torch import nn
        >>> def build():
        ...     return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> folder = tempfile.TemporaryDirectory()
        >>> save_model(build(), f"{folder.name}/model.safetensors")
        >>> with bigload.init_empty_weights():
        ...     model = build()
        >>> model = bigload.load_and_quantize_model(model, "nf4", folder.name)
        >>> type(model[0]).__name__, type(model[2]).__name__  # the output head is not quantized by default
        ('Linear4bit', 'Linear')
        >>> folder.cleanup()
    """
    context = _described(weights_location, device_map)
    with _with_context(context):
        joint = joint_load(mesh, replicate, fsdp_options, adapters, device_map, offload, offload_folder)
        begun = time.perf_counter()
        requested = functools.partial(
            load_request,
            bnb_quantization_config,
            weights_location,
            device_map if joint is None else joint.ranks.device,
            no_split_module_classes,
            max_memory,
            offload_folder,
            offload,
            key_mapping=key_mapping,
            tied_parameters=tied_parameters,
            quantizable=quantizable,
            initialize_missing=initialize_missing,
            strict=strict,
        )
        request = requested() if joint is None else joint.requested(requested)
        spent_s = time.perf_counter() - begun
        bnb.library()  # its import takes seconds, which the load's time leaves out
        begun = time.perf_counter() - spent_s
    # Tensors created under inference_mode could not be used in training later.
    with _with_context(context + _as_mode(request)), _begun_ahead(request), torch.inference_mode(False):
        return _load(model, request, joint, begun, progress)


def _as_mode(request: LoadRequest) -> str:
    return "" if "*" in (request.config.skip_modules or ()) else f" as {request.config.mode}"


@torch.no_grad()
def _load(
    model: nn.Module, request: LoadRequest, joint: JointLoad | None, begun: float, progress: bool | None
) -> nn.Module:
    """Plan and carry out a load, by this process alone or as one of several; `begun` is when the call began."""
    if isinstance(model, nn.Module):
        require_not_sharded(model)
    view, plan = _planned(model, request) if joint is None else joint.planned(model, request)
    timeline = Timeline(begun)
    timeline.add("plan", CPU, begun)
    for device, nbytes in plan.device_bytes.items():
        logger.info("plan: %s on %s, %d layers as %s", show(nbytes), device, len(plan.layers), request.config.mode)
    peaks = PeakMemory(plan.device_bytes, plan.held_bytes)
    reads = plan if joint is None else joint.own
    bar = progress_bar(reads.source_bytes, "loading", progress)
    with bar, _offload_targets(plan, request.placement) as targets:
        report = functools.partial(_report, request, plan, reads, timeline, peaks, targets)

        def set_to_run(made: nn.Module) -> None:
            _set_to_run(made, plan, request.placement.offload, targets, report)

        if joint is not None:
            model = joint.carry_out(view, request, plan, bar.update, timeline, set_to_run)
            model.load_report = report()  # type: ignore[assignment]
        else:
            assembly = Assembly(view, plan)
            steps: Any = {"on_bytes": bar.update, "on_loaded": assembly.add, "meanwhile": assembly.prepare}
            execute(plan, **steps, targets=targets, timeline=timeline)
            if request.checkpoint is not None:
                request.checkpoint.require_unchanged()
            model = assembly.commit(set_to_run)
    logger.info("%s", model.load_report)
    return model


def _planned(model: nn.Module, request: LoadRequest) -> tuple[ModelView, Plan]:
    view = ModelView(model)
    if "offload" in vars(model):
        require_not_offloaded(model)
    return view, plan_load(view, request)


def _report(
    request: LoadRequest, plan: Plan, reads: Plan, timeline: Timeline, peaks: PeakMemory, targets: OffloadTargets
) -> LoadReport:
    elapsed_s, bytes_read = timeline.elapsed_s, reads.read_bytes - targets.spared_bytes
    mode, held = request.config.mode, plan.device_bytes
    spans: Any = timeline.spans  # are computed when the report is asked for them
    return LoadReport(mode, bytes_read, elapsed_s, held, peaks.since(), request.source, spans)


def _described(weights_location: WeightsLocation | None, device_map: DeviceMap) -> str:
    origin = "the model's own weights" if weights_location is None else f"'{weights_location}'"
    return f"loading {origin} with device_map={device_map!r}"


def _offload_targets(plan: Plan, request: PlacementRequest) -> OffloadTargets:
    return OffloadTargets(plan, pin=request.offload.pin, folder=request.offload_folder)


def _set_to_run(
    model: nn.Module, plan: Plan, offload: OffloadConfig, targets: OffloadTargets, report: Callable[[], LoadReport]
) -> None:
    """Attach the hooks that move inputs between devices and stream offloaded weights, and the report, or nothing."""
    execution, load_dtype = plan.execution_map, plan.config.load_dtype
    hooks = attach(model, execution, plan.in_fp32, load_dtype, entries=entries(model, plan))
    hooks.dtypes_on_gpu = plan.dtypes_on_gpu
    try:
        if plan.offloaded:
            model.offload = Offload(model, plan, offload, targets)  # type: ignore[assignment]
        model.load_report = report()  # type: ignore[assignment]
    except BaseException as error:
        begun = vars(model).pop("offload", None)
        if begun is not None:
            begun.remove()
        detach(model)
        if not isinstance(error, RuntimeError) or not is_shortage(error):
            raise
        raise PlacementError(
            f"no room on the GPU for the slots and caches of offloaded weights: {error}; free memory there, or pass "
            "fewer slots or a smaller expert_cache"
        ) from error


@contextmanager
def _begun_ahead(request: LoadRequest) -> Iterator[None]:
    """Begin what the first weights would else wait for, in threads: pinned memory, and the kernels that quantize."""
    gpus: list[torch.device] = []
    if request.checkpoint is not None:
        with suppress(PlacementError):  # raised later, when the map is resolved
            gpus = [device for device in named_devices(request.placement.device_map) if device.type == "cuda"]
    thread = threading.Thread(target=_load_kernels, args=(request, gpus), name="bigload kernels")
    if gpus:
        pin_ahead(gpus[0])
        with suppress(RuntimeError):  # the system has no more threads: the first weight waits
            thread.start()
    try:
        yield
    finally:
        if thread.ident is not None:
            thread.join()


def _load_kernels(request: LoadRequest, gpus: Sequence[torch.device]) -> None:
    config = request.config.resolved(torch.bfloat16)  # or float16, whose kernels are loaded with its
    fmt = quantized_format(config)
    tensors = request.checkpoint.tensors.values() if request.checkpoint is not None else ()
    if any(isinstance(each, ScaledTensor) and each.is_packed for each in tensors):
        for device in gpus:
            runs_kernel(device)
    if config.mode == "none" or isinstance(fmt, Plain) or any(isinstance(each, QuantizedTensor) for each in tensors):
        return
    try:
        for device in gpus:
            load_kernels(fmt, config.load_dtype, device)
    except Exception as error:  # the load meets it again, and reports it
        logger.debug("loading kernels ahead failed: %s", error)


@contextmanager
def _with_context(context: str) -> Iterator[None]:
    """Add the source, mode and device map of the load to every error."""
    try:
        yield
    except BigloadError as error:
        error.context = context
        raise


def release_buffers() -> None:
    """Free the buffers kept between loads: 128 MiB of pinned host memory, and small tables on the GPUs.

    Examples:
        >>> import bigload
        >>> bigload.release_buffers()
    """
    release_ring()
    code_table.cache_clear()
