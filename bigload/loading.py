"""`load_and_quantize_model`: the way from a checkpoint to a model that is ready to run."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from .checkpoint.checkpoint import WeightsLocation
from .config import OffloadConfig
from .errors import BigloadError, PlacementError
from .hardware.devices import Device, DeviceMap, named_devices
from .io.ring import pin_ahead, release_ring
from .model.view import ModelView
from .offload.device_hooks import attach, detach
from .offload.handle import Offload, require_not_offloaded
from .offload.model_device import entries
from .offload.targets import OffloadTargets
from .pipeline.assembly import Assembly
from .pipeline.execute import execute
from .pipeline.progress import progress_bar
from .pipeline.report import LoadReport, PeakMemory
from .planning.plan import Plan
from .planning.planner import plan_load
from .planning.request import PlacementRequest, load_request
from .planning.sources import KeyMapping
from .quantization import bnb
from .quantization.quantizer import code_table
from .sizes import show

logger = logging.getLogger(__name__)


@contextmanager
def _without_collections() -> Iterator[None]:
    """Pause Python's collector of cycles: of a load's many new objects none is garbage, and it would go over all.

    With 10,000 tensors that is half of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_without_collections()
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
    strict: bool = False,
    progress: bool | None = None,
) -> nn.Module:
    """Load a checkpoint into a model, quantizing each Linear with bitsandbytes as it lands on its device.

    The first eight parameters are accelerate's. If anything fails, the model is as it was and a second try works.

    Args:
        model: on meta, or real: a real one without `weights_location` is quantized from its own weights.
        bnb_quantization_config: a `BnbQuantizationConfig` (ours or accelerate's), transformers'
            `BitsAndBytesConfig`, a dict of any of them, or a mode such as "nf4-dq". Never changed. None means that of
            a checkpoint which is quantized already; with one, a config may only choose how it computes.
        weights_location: a .safetensors, .bin, .pt or .pth file, an .index.json, a folder with one of them, or a
            repository of the Hugging Face hub, "org/name" or "org/name@revision".
        device_map: None (the current GPU, or the CPU where there is none), a device, {block path: device, "cpu" or
            "disk"}, or how to spread the model: "auto" or "balanced" over all GPUs evenly, "balanced_low_0" with as
            little as possible on the first, "sequential" one after the other.
        no_split_module_classes: names of classes of blocks that one device must hold whole; by default what the model
            says of itself, else the class that its largest list of modules repeats.
        max_memory: {device, "cpu" or "disk": bytes or "10GiB"}, taken as it is; a model that needs more is refused
            before anything is read. By default what is free; if it names GPUs, those alone are used.
        offload_folder: where blocks on the "disk" lie, as far as the checkpoint does not have them just as they are to
            be: each weight is quantized once, and found there by the next load.
        offload_state_dict: accepted and without effect: nothing needs it.
        offload: an `OffloadConfig`: how much of a GPU is left for activations, and how offloaded blocks are kept.
        key_mapping: renames checkpoint keys: {regex: replacement} applied in turn, or a function.
        tied_parameters: pairs of parameters that are one weight, where neither the model's own sharing nor its
            transformers class says so.
        quantizable: subclasses of nn.Linear to quantize beside those that do what it does and no more.
        strict: make checkpoint tensors without a place in the model an error instead of a warning.
        progress: show a bar in bytes; by default where standard error is a terminal.

    Returns:
        The same model, with `load_report`, `hf_device_map`, `is_loaded_in_4bit` and `is_loaded_in_8bit` set, and for a
        model of transformers what its own loader sets.
        (A model that is itself one Linear is replaced, so use what is returned.)

    Raises:
        ConfigError: the config or an argument cannot mean anything.
        CheckpointError: the checkpoint is damaged, or does not fit the model.
        PlacementError: the device map or the budgets cannot be met.
        QuantizationError: a weight has values that the format cannot hold.
        OffloadError: a weight cannot be streamed, or `offload_folder` not be written.
    """
    origin = "the model's own weights" if weights_location is None else f"{weights_location!r}"
    context = f"loading {origin} with device_map={device_map!r}"
    with _with_context(context):
        begun = time.perf_counter()
        request = load_request(
            bnb_quantization_config,
            weights_location,
            device_map,
            no_split_module_classes,
            max_memory,
            offload_folder,
            offload,
            key_mapping=key_mapping,
            tied_parameters=tied_parameters,
            quantizable=quantizable,
            strict=strict,
        )
        spent_s = time.perf_counter() - begun
        bnb.library()  # its import takes seconds, which are not the load's
        begun = time.perf_counter() - spent_s
    mode = request.config.mode
    # Tensors made under inference_mode could never be trained through.
    with _with_context(f"{context} as {mode}"), torch.inference_mode(False), torch.no_grad():
        view = ModelView(model)
        if "offload" in vars(model):
            require_not_offloaded(model)
        if request.checkpoint is not None:
            _begin_to_pin(device_map)  # while the plan is made
        plan = plan_load(view, request)
        for device, nbytes in plan.device_bytes.items():
            logger.info("plan: %s on %s, %d layers as %s", show(nbytes), device, len(plan.layers), mode)
        peaks = PeakMemory(plan.device_bytes)
        bar = progress_bar(plan.source_bytes, "loading", progress)
        with bar, _offload_targets(plan, request.placement) as targets:
            assembly = Assembly(view, plan)
            execute(plan, on_bytes=bar.update, on_loaded=assembly.add, targets=targets)
            model = assembly.commit(lambda made: _set_to_run(made, plan, request.placement.offload, targets))
    elapsed_s = time.perf_counter() - begun
    bytes_read = plan.source_bytes - targets.spared_bytes
    report = LoadReport(mode, bytes_read, elapsed_s, plan.device_bytes, peaks.since())
    model.load_report = report  # type: ignore[assignment]
    logger.info("%s", report)
    return model


def _offload_targets(plan: Plan, request: PlacementRequest) -> OffloadTargets:
    return OffloadTargets(plan, pin=request.offload.pin, folder=request.offload_folder)


def _set_to_run(model: nn.Module, plan: Plan, offload: OffloadConfig, targets: OffloadTargets) -> None:
    """Hook what must be hooked where weights do not all lie on the one device that computes."""
    execution, load_dtype = plan.execution_map, plan.config.load_dtype
    attach(model, execution, plan.in_fp32, load_dtype, entries=entries(model, plan))
    try:
        if plan.offloaded:
            model.offload = Offload(model, plan, offload, targets)  # type: ignore[assignment]
    except torch.OutOfMemoryError as error:
        detach(model)
        raise PlacementError(f"no room on the GPU for what is streamed through it: {error}") from error
    except BaseException:
        detach(model)
        raise


def _begin_to_pin(device_map: DeviceMap) -> None:
    with suppress(PlacementError):  # raised where the map is resolved
        gpus = [device for device in named_devices(device_map) if device.type == "cuda"]
        if gpus:
            pin_ahead(gpus[0])


@contextmanager
def _with_context(context: str) -> Iterator[None]:
    """Say in every error what was being loaded, how and where to."""
    try:
        yield
    except BigloadError as error:
        error.context = context
        raise


def release_buffers() -> None:
    """Free what is kept from one load for the next: 128 MiB of pinned host memory, and small tables on the GPUs.

    Example:
        >>> import bigload
        >>> bigload.release_buffers()
    """
    release_ring()
    code_table.cache_clear()
