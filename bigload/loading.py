"""`load_and_quantize_model`: the way from a checkpoint to a model that is ready to run."""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from . import bnb, hf
from .checkpoint import Checkpoint, WeightsLocation, open_checkpoint
from .commit import Assembly
from .config import BnbQuantizationConfig, as_config
from .errors import BigloadError, CheckpointError, OffloadError, listed
from .formats import dominant_dtype
from .keys import KeyMapping, Source, sources_in_checkpoint
from .memory import check_budgets, show
from .modules import ModelTensor, layers_recorded, layers_stored_quantized, layers_to_quantize, tensors_of
from .pipeline import execute
from .placement import Device, DeviceMap, Plan, make_plan, resolve_budgets, resolve_device_map
from .prequantized import QuantizedTensor, config_of
from .record import Record
from .report import LoadReport, PeakMemory
from .ring import pin_ahead
from .tree import leaves, modules_by_path, walked_once

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
    offload: Any = None,
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
        device_map: None (the current GPU, or the CPU where there is none), a device, "auto", or
            {block path: device}. This version computes the whole model on one device.
        no_split_module_classes: blocks that one device must hold whole; one device always does.
        max_memory: {device: bytes or "10GiB"}; a model that needs more is refused before anything is read.
        offload_folder: where "disk" blocks would lie; this version has none.
        offload_state_dict: accepted and without effect: nothing needs it.
        offload: must be None in this version.
        key_mapping: renames checkpoint keys: {regex: replacement} applied in turn, or a function.
        tied_parameters: pairs of parameters that are one weight, where neither the model's own sharing nor its
            transformers class says so.
        quantizable: subclasses of nn.Linear to quantize too, whose forward must be its own.
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
        OffloadError: `offload` was given.
    """
    origin = "the model's own weights" if weights_location is None else f"{weights_location!r}"
    context = f"loading {origin} with device_map={device_map!r}"
    with _named(context):
        given = None if bnb_quantization_config is None else as_config(bnb_quantization_config)
        if offload is not None:
            raise OffloadError("offload is given, but this version does not offload: leave it out")
        bnb.library()  # its import takes seconds, which are not the load's
        started = time.perf_counter()
        checkpoint = None if weights_location is None else open_checkpoint(weights_location)
        config = _config(given, checkpoint)
        record = None if checkpoint is None else checkpoint.record
    # Tensors made under inference_mode could never be trained through.
    with _named(f"{context} as {config.mode}"), torch.inference_mode(False), torch.no_grad(), walked_once(model):
        tensors = tensors_of(model, _ties(model, record) if tied_parameters is None else tied_parameters)
        devices = resolve_device_map(device_map, tensors, modules_by_path(model))
        budgets = resolve_budgets(max_memory)
        if checkpoint is None:
            sources, dtype = _own_weights(tensors)
            config, class_dtypes = config.resolved(dtype), None  # a real model has the dtypes it was given
        else:
            _begin_to_pin(devices)
            config = config.resolved(checkpoint.dominant_dtype)
            class_dtypes = hf.class_dtypes(model, config.landing_dtype)
            sources = sources_in_checkpoint(
                tensors,
                checkpoint,
                key_mapping=key_mapping,
                conversion=hf.key_conversion(model),
                ignores_key=lambda key: hf.ignores_key(model, key),
                class_dtypes=class_dtypes,
                rebuilt_buffers=lambda: hf.rebuilt_buffers(model, config.landing_dtype),
                strict=strict,
            )
        if record is not None:  # what was saved comes back as it was
            class_dtypes = _stored_dtypes(sources)
            quantizable = quantizable or _classes(model, record)
        if checkpoint is not None and checkpoint.is_quantized:
            layers = layers_stored_quantized(model, config, tensors, _stored_quantized(sources), quantizable)
        elif record is not None and given is None:
            layers = layers_recorded(model, record.layers, quantizable)
        else:
            layers = layers_to_quantize(model, config, tensors, quantizable)
        plan = make_plan(model, config, tensors, layers, sources, devices, class_dtypes)
        check_budgets(plan.device_bytes, budgets)
        for device, nbytes in plan.device_bytes.items():
            logger.info("plan: %s on %s, %d layers as %s", show(nbytes), device, len(layers), config.mode)
        peaks = PeakMemory(plan.device_bytes)
        with _progress_bar(plan, progress) as bar:
            assembly = Assembly(model, plan)
            execute(plan, on_bytes=bar.update, on_landed=assembly.add)
        model = assembly.commit()
    elapsed_s = time.perf_counter() - started
    report = LoadReport(config.mode, plan.source_bytes, elapsed_s, plan.device_bytes, peaks.since())
    model.load_report = report  # type: ignore[assignment]
    logger.info("%s", report)
    return model


def _config(given: BnbQuantizationConfig | None, checkpoint: Checkpoint | None) -> BnbQuantizationConfig:
    """Give the caller's config or, where None is given, that of a checkpoint which is quantized already."""
    if checkpoint is not None and checkpoint.is_quantized:
        return config_of(checkpoint, given)
    if checkpoint is not None and checkpoint.record is not None and given is None:
        return checkpoint.record.config
    return as_config(given)


def _ties(model: nn.Module, record: Record | None) -> list[tuple[str, str]]:
    """Give the ties that a saved model had, as far as this one has both ends: made on meta it may have lost them."""
    if record is None or not isinstance(model, nn.Module):
        return []
    names = leaves(modules_by_path(model), "_parameters")
    pairs = [(first, other) for first, *others in record.ties for other in others]
    return [(a, b) for a, b in pairs if a in names and b in names and names[a].shape == names[b].shape]


def _classes(model: nn.Module, record: Record) -> list[type[nn.Linear]]:
    """Give the subclasses of Linear whose layers were quantized when the model was saved."""
    modules = modules_by_path(model)
    classes = {type(modules[path]) for path in record.layers if path in modules}
    return [cls for cls in classes if issubclass(cls, nn.Linear) and cls is not nn.Linear]


def _stored_dtypes(sources: Mapping[str, tuple[Source, ...]]) -> dict[str, torch.dtype]:
    return {name: pieces[0].tensor.dtype for name, pieces in sources.items() if pieces}


def _stored_quantized(sources: Mapping[str, tuple[Source, ...]]) -> list[str]:
    return [name for name, pieces in sources.items() if isinstance(pieces[0].tensor, QuantizedTensor)]


def _begin_to_pin(devices: Mapping[str, torch.device]) -> None:
    gpus = [device for device in devices.values() if device.type == "cuda"]
    if gpus:
        pin_ahead(gpus[0])  # while the plan is made


def _own_weights(tensors: Sequence[ModelTensor]) -> tuple[dict[str, tuple[Source, ...]], torch.dtype]:
    empty = [tensor.name for tensor in tensors if tensor.value.is_meta]
    if empty:
        raise CheckpointError(
            f"weights_location is None, but {len(empty)} tensors of the model are on meta: {listed(empty)}; say where "
            "the weights are",
            missing_keys=empty,
        )
    # Persistent floating buffers are cast with the weights, as those of a checkpoint are.
    own = [t for t in tensors if t.is_parameter or (t.persistent and t.value.is_floating_point())]
    dtype = dominant_dtype((t.value.dtype, t.value.nbytes) for t in own if t.is_parameter)
    return {tensor.name: (Source(tensor.value),) for tensor in own}, dtype


def _progress_bar(plan: Plan, progress: bool | None) -> tqdm[Any]:
    shown = sys.stderr.isatty() if progress is None else progress
    return tqdm(total=plan.source_bytes, unit="B", unit_scale=True, desc="loading", disable=not shown, leave=False)


@contextmanager
def _named(context: str) -> Iterator[None]:
    """Say in every error what was being loaded, how and where to."""
    try:
        yield
    except BigloadError as error:
        error.context = context
        raise
