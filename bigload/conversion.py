"""`quantize_checkpoint`: quantizes a checkpoint from files to files; the model is never whole in memory."""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint.card import CARD_NAME
from .checkpoint.checkpoint import Checkpoint, WeightsLocation, open_checkpoint
from .checkpoint.folders import checked_target, copy_the_rest, put_in_place, remove_folder
from .checkpoint.record import FORMAT_VERSION, RECORD_NAME, Record
from .checkpoint.scaled.stated import OF_OTHER_METHODS, write_without_quantization
from .checkpoint.scaled.tensor import ScaledTensor
from .checkpoint.writer import Entry, ShardWriter, write_json
from .config import BnbQuantizationConfig, as_config
from .errors import CheckpointError, ConfigError, PlacementError, listed, reason
from .hardware.devices import Device, is_strategy, on_cpu_unless_named
from .hardware.interrupts import check_interrupt, deferred_interrupts, interruptible
from .inspection.own_loading import EXTRA_STATE, changed_when_loaded_again
from .io.program import ReadTask
from .io.tensors import StoredTensor, read_whole
from .io.transfer import default_stream
from .model.described import empty_model
from .model.quantizable import plain_linears
from .model.view import ModelView
from .offload.weight_cache import SourceFingerprints, content_hash
from .pipeline.execute import read_and_load, read_tasks_for
from .pipeline.file_output import Output, file_sink
from .pipeline.progress import progress_bar
from .planning.plan import Plan
from .planning.planned_tensors import PlannedTensor
from .planning.planner import plan_load
from .planning.request import LoadRequest, PlacementRequest, require_names
from .planning.sources import KeyMapping
from .quantization import bnb
from .saving import card_of, json_attributes, shard_bytes, weights_stem, write_configs

# Identifies an unfinished conversion, in its folder.
_PROGRESS_NAME = "progress.json"


@deferred_interrupts()
@on_cpu_unless_named()
def quantize_checkpoint(
    src: WeightsLocation,
    dst: str | os.PathLike[str],
    bnb_quantization_config: Any,
    *,
    model: nn.Module | None = None,
    max_shard_size: int | str = "5GB",
    device: Device | None = None,
    key_mapping: KeyMapping | None = None,
    tied_parameters: Sequence[tuple[str, str]] | None = None,
    quantizable: Sequence[type[nn.Linear]] = (),
    initialize_missing: Sequence[str] = (),
    overwrite: bool = False,
    progress: bool | None = None,
) -> None:
    """Quantize a checkpoint into a new one, without loading the model.

    The new checkpoint loads without quantizing, with the same bits as a load of the original. Of one in fp8 or mxfp4
    the mode "none" makes a copy in 16 bit. Weights pass through
    memory in pieces: it holds the read buffer (at most 128 MiB), the scales of one weight and, where tensors are
    transposed or merged from several, one whole tensor at a time. The new folder appears when it is complete. A run
    that was killed or interrupted leaves its finished files beside it, and the next run continues from them.

    Args:
        src: a checkpoint, as in `load_and_quantize_model`; never changed.
        dst: the folder to create. Other files in the folder of `src`, such as a tokenizer, are copied, except
            README.md, whose place a model card takes.
        bnb_quantization_config: as in `load_and_quantize_model`.
        model: the empty model that the checkpoint is for; None builds it with transformers or diffusers from a
            config.json in the folder of `src`.
        max_shard_size: the largest size of the tensors in one file, in bytes or as "5GB".
        device: the device that quantizes; by default the current GPU, or the CPU if there is none.
        key_mapping: as in `load_and_quantize_model`.
        tied_parameters: as in `load_and_quantize_model`.
        quantizable: as in `load_and_quantize_model`.
        initialize_missing: as in `load_and_quantize_model`.
        overwrite: replace a folder that is not empty.
        progress: show a progress bar; by default on a terminal and in a notebook.

    Raises:
        CheckpointError: `src` cannot be read, is quantized already or does not fit the model; `dst` is not empty,
            lies inside `src`, or cannot be written.
        ConfigError: an argument has an invalid value.
        PlacementError: `device` is no device of this machine.
        QuantizationError: a weight has values that the format cannot hold.

    Examples:
        >>> import bigload, torch
        >>> from safetensors.torch import save_file
        >>> def build():
        ...     return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> save_file(build().state_dict(), "net.safetensors")
        >>> with bigload.init_empty_weights():
        ...     empty = build()
        >>> bigload.quantize_checkpoint("net.safetensors", "net-nf4", "nf4", model=empty, device="cpu")
        >>> model = bigload.load_and_quantize_model(empty, None, "net-nf4", device_map="cpu")
        >>> type(model[0]).__name__
        'Linear4bit'
    """
    _require_one_device(device)
    config = as_config(bnb_quantization_config)
    _require_quantized_form(config)
    max_shard_bytes = shard_bytes(max_shard_size)
    checkpoint = open_checkpoint(src)
    target = _target_folder(dst, checkpoint, overwrite=overwrite)
    model = _empty_model(checkpoint.location.parent) if model is None else model
    bnb.library()
    view = ModelView(model)
    request = LoadRequest(
        config,
        checkpoint,
        PlacementRequest(device),
        key_mapping=key_mapping,
        tied_parameters=tied_parameters,
        quantizable=quantizable,
        initialize_missing=require_names("initialize_missing", initialize_missing),
    )
    with torch.inference_mode(False), torch.no_grad():
        plan = plan_load(view, request)
        is_quantized = bool(plan.layers or plan.experts)
        if not is_quantized and not _has_scales(plan):
            raise ConfigError(f"nothing in this {type(model).__name__} would be quantized: there is nothing to do")
        objects = [path for path, state in plan.after.extra_states.items() if not isinstance(state, StoredTensor)]
        if objects:
            raise CheckpointError(
                f"{listed(objects)}: extra state that is no tensor, which safetensors cannot hold: load the model "
                "with load_and_quantize_model instead"
            )
        saved = {p.tensor.name: (p.tensor.value.dtype, p.tensor.shape) for p in plan.tensors if p.tensor.persistent}
        changed = changed_when_loaded_again(view.modules, saved, as_held=True)
        attributes = json_attributes(plan.after.attributes, view.modules, saved, changed)
        with _exclusive(target), _resumable_folder(target, _fingerprint(plan, checkpoint, max_shard_bytes)) as made:
            skipped = [path for path in plain_linears(view) if path not in plan.layers]
            if is_quantized:  # first what may fail, then what takes long
                _write_configs(plan, model, made, target, skipped, checkpoint.folder)
            layout = _convert(plan, made, max_shard_bytes, weights_stem(model), progress)
            checkpoint.require_unchanged()
            if is_quantized:
                _describe(plan, made, layout, skipped, changed, attributes)
            if checkpoint.folder is not None:
                write_without_quantization(checkpoint.folder, made)
                copy_the_rest(checkpoint.folder, made, but=(RECORD_NAME, CARD_NAME, *OF_OTHER_METHODS))
            checked_target(target, overwrite=overwrite)  # others may have written there meanwhile


def _has_scales(plan: Plan) -> bool:
    """Whether weights are stored as small numbers with scales, of which a copy in 16 bit may be made."""
    return any(isinstance(source.tensor, ScaledTensor) for planned in plan.tensors for source in planned.sources)


def _require_one_device(device: Device | None) -> None:
    if device == "disk" or is_strategy(device):
        raise PlacementError(
            f"device is {device!r}; expected the one that quantizes: 'cpu', a GPU's number, or 'cuda:N'"
        )


def _require_quantized_form(config: BnbQuantizationConfig) -> None:
    if config.llm_int8_has_fp16_weight:
        raise ConfigError("int8-training keeps its weights in 16 bit: there is nothing to quantize beforehand")


def _empty_model(folder: Path) -> nn.Module:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"'{folder}' has no config.json to build the model from: pass an empty one as model=")
    return empty_model(folder)


@contextmanager
def _exclusive(target: Path) -> Iterator[None]:
    """Lock a target while the `with` block runs.

    Raises:
        CheckpointError: another run has locked it.
    """
    path, is_locked = target.with_name(f".{target.name}.lock"), False
    while not is_locked:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise CheckpointError(f"'{target}' cannot be written: {reason(error)}") from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released with the process, however it ends
            except OSError as error:
                raise CheckpointError(f"another run is making '{target}': wait for it, or end it") from error
            is_locked = _is_open_at(descriptor, path)  # else a run that has ended meanwhile has deleted this file
            if is_locked:
                try:
                    yield
                finally:
                    with suppress(OSError):
                        path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _is_open_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {reason(error)}") from error


def _target_folder(given: str | os.PathLike[str], checkpoint: Checkpoint, *, overwrite: bool) -> Path:
    if checkpoint.is_quantized:
        raise CheckpointError(f"'{checkpoint.location}' is quantized already; give the original checkpoint")
    target = checked_target(given, overwrite=overwrite)
    source = Path(os.path.realpath(checkpoint.location.parent))
    if target == source or target in source.parents or (checkpoint.folder is not None and source in target.parents):
        raise CheckpointError(f"'{target}' overlaps the checkpoint's folder '{source}': name another folder")
    return target


@contextmanager
def _resumable_folder(target: Path, fingerprint: str) -> Iterator[Path]:
    """Make a folder beside the target, with the files of an unfinished run of the same fingerprint; at the end move it.

    After Ctrl-C it stays for the next run; after an error it is deleted.
    """
    made = target.with_name(f".{target.name}.partial")
    progress = made / _PROGRESS_NAME
    try:
        if not progress.is_file() or progress.read_text() != fingerprint:
            remove_folder(made)
            made.mkdir(parents=True)
            progress.write_text(fingerprint)
        yield made
        progress.unlink()
        put_in_place(made, target)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        remove_folder(made)
        if isinstance(error, OSError):
            raise CheckpointError(
                f"'{target}' cannot be written: {reason(error)}; nothing there has been changed"
            ) from error
        raise


def _fingerprint(plan: Plan, checkpoint: Checkpoint, max_shard_bytes: int) -> str:
    """Hash all that the written bytes depend on: files, config, layers, layout and versions."""
    fingerprints = SourceFingerprints(with_samples=False)

    def origin(planned: PlannedTensor) -> object:
        return [fingerprints.of(source) for source in planned.sources] or content_hash(planned.tensor.value)

    key = {
        "bigload": FORMAT_VERSION,
        "bitsandbytes": bnb.library().__version__,
        "files": sorted({str(tensor.file) for tensor in checkpoint.tensors.values()}),
        "config": plan.config.to_dict(),
        "tensors": [
            (p.tensor.names, p.shape, str(p.format), p.device.type, origin(p)) for p in interruptible(plan.tensors)
        ],
        "extra_states": [(path, state.name, state.offset) for path, state in plan.after.extra_states.items()],
        "max_shard_bytes": max_shard_bytes,
    }
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _convert(plan: Plan, folder: Path, max_shard_bytes: int, stem: str, progress: bool | None) -> str:
    """Write the weights and return the hash of their layout, for the record."""
    tensors = sorted(plan.tensors, key=_in_file_order)
    outputs = [Output(planned, plan.config) for planned in interruptible(tensors) if planned.tensor.persistent]
    extra = {f"{path}.{EXTRA_STATE}".lstrip("."): state for path, state in plan.after.extra_states.items()}
    entries = [entry for output in outputs for entry in output.entries.values()]
    entries += [Entry(name, state.dtype, tuple(state.shape)) for name, state in extra.items()]
    writer = ShardWriter(folder, entries, max_shard_bytes, stem)
    with progress_bar(plan.source_bytes, "quantizing", progress) as bar, default_stream(plan.tensors[0].device):
        try:
            tasks: list[ReadTask] = []
            for output in outputs:
                check_interrupt()
                if all(map(writer.is_written, output.names)):
                    bar.update(sum(source.tensor.nbytes for source in output.planned.sources))
                elif output.planned.sources:
                    make_sink = functools.partial(file_sink, output, writer)
                    tasks += read_tasks_for(output.planned, make_sink, lambda done: None)
                else:
                    writer.write(output.planned.tensor.name, output.planned.tensor.value)
            read_and_load(tasks, plan, on_bytes=bar.update)
            for name, state in extra.items():
                if not writer.is_written(name):
                    writer.write(name, read_whole(state))
            writer.finish()
            return writer.layout
        finally:
            writer.close()


def _in_file_order(planned: PlannedTensor) -> tuple[str, int]:
    first = planned.sources[0].tensor if planned.sources else None
    return ("", 0) if first is None or isinstance(first, torch.Tensor) else (str(first.file), first.offset)


def _write_configs(
    plan: Plan, model: nn.Module, made: Path, target: Path, skipped: Sequence[str], source: Path | None
) -> None:
    """Write the configs and the model card of a quantized model into the folder that will be put at `target`."""
    config = plan.config
    is_read = write_configs(model, made, config, skipped, plan.layers, config.load_dtype, plan.experts)
    card_of(model, config, [*plan.layers, *plan.experts], skipped, source, is_read).write(made, target)


def _describe(
    plan: Plan,
    folder: Path,
    layout: str,
    skipped: Sequence[str],
    changed: Sequence[str],
    attributes: Mapping[str, Mapping[str, Any]],
) -> None:
    ties = [planned.tensor.names for planned in plan.tensors if len(planned.tensor.names) > 1]
    config = dataclasses.replace(plan.config, skip_modules=None, keep_in_fp32_modules=None)
    record = Record(
        layout,
        config,
        tuple(plan.layers),
        tuple(skipped),
        tuple(ties),
        tuple(changed),
        attributes,
        tuple(plan.experts),
    )
    write_json(folder / RECORD_NAME, record.to_dict())
