"""A checkpoint quantized from files to files, in a stream: the model is never whole in memory."""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint.checkpoint import Checkpoint, WeightsLocation, open_checkpoint
from .checkpoint.folders import checked_target, copy_the_rest, put_in_place
from .checkpoint.record import FORMAT_VERSION, RECORD_NAME, Record
from .checkpoint.writer import ShardWriter, write_json
from .config import as_config
from .errors import CheckpointError, ConfigError
from .hardware.devices import Device
from .io.extents import ReadTask
from .io.transfer import default_stream
from .model import transformers_facts
from .model.quantizable import plain_linears
from .model.view import ModelView
from .offload.weight_cache import SourceFingerprints, content_hash
from .pipeline.execute import read_and_load, read_tasks_for
from .pipeline.file_output import Output, file_sink
from .pipeline.progress import progress_bar
from .planning.plan import Plan
from .planning.planned_tensors import PlannedTensor
from .planning.planner import plan_load
from .planning.request import LoadRequest, PlacementRequest
from .planning.sources import KeyMapping
from .quantization import bnb
from .saving import shard_bytes, write_configs

# What is known of a conversion that is under way, in its folder.
_PROGRESS_NAME = "progress.json"


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
    overwrite: bool = False,
    progress: bool | None = None,
) -> None:
    """Quantize a checkpoint into another, which loads without quantizing: the same bits as a load would have given.

    It goes through memory in pieces, whatever its size: beside the ring no more than the scales of a weight, and one
    tensor at a time of those that are transposed or merged from others. The new folder is there when all of it is. A
    run that was killed, or interrupted, leaves its finished files beside that, and the next one goes on from them.

    Args:
        src: a checkpoint, as `load_and_quantize_model` takes it; never changed.
        dst: the folder to make. What else lies in the folder of `src`, a tokenizer for instance, is copied.
        bnb_quantization_config: as `load_and_quantize_model` takes it.
        model: empty, what the checkpoint is for; None builds it from a config.json in the folder of `src`, with
            transformers.
        max_shard_size: of the tensors in one file, in bytes or as "5GB".
        device: that quantizes; by default the current GPU, or the CPU where there is none.
        key_mapping, tied_parameters, quantizable: as `load_and_quantize_model` takes them.
        overwrite: replace a folder that is not empty.
        progress: show a bar in bytes; by default where standard error is a terminal.

    Raises:
        CheckpointError: `src` cannot be read, is quantized already or does not fit the model; `dst` is not empty,
            lies inside `src`, or cannot be written.
        ConfigError: an argument cannot mean anything.
        QuantizationError: a weight has values that the format cannot hold.
    """
    config = as_config(bnb_quantization_config)
    if config.llm_int8_has_fp16_weight:
        raise ConfigError("int8-training keeps its weights in 16 bit: there is nothing to quantize beforehand")
    max_shard_bytes = shard_bytes(max_shard_size)
    checkpoint = open_checkpoint(src)
    # Of a file, or an index, that was named, nothing beside it is meant.
    is_folder = not Path(src).expanduser().is_file()
    target = _target_folder(dst, checkpoint, is_folder=is_folder, overwrite=overwrite)
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
    )
    with torch.inference_mode(False), torch.no_grad():
        plan = plan_load(view, request)
        if not plan.layers:
            raise ConfigError(f"nothing in this {type(model).__name__} would be quantized: there is nothing to do")
        with _exclusive(target), _resumable_folder(target, _fingerprint(plan, checkpoint, max_shard_bytes)) as made:
            kept = [path for path in plain_linears(view) if path not in plan.layers]
            # What can fail goes before what takes long.
            write_configs(model, made, plan.config, kept, plan.layers, plan.config.load_dtype)
            layout = _convert(plan, made, max_shard_bytes, progress)
            _describe(plan, made, layout, kept)
            if is_folder:
                copy_the_rest(checkpoint.location.parent, made)
            checked_target(target, overwrite=overwrite)  # something may have come there meanwhile


def _empty_model(folder: Path) -> nn.Module:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"'{folder}' has no config.json to build the model from: pass an empty one as model=")
    return transformers_facts.empty_model(folder)


@contextmanager
def _exclusive(target: Path) -> Iterator[None]:
    """Keep other runs for the same target out for as long as the block runs.

    Raises:
        CheckpointError: there is one.
    """
    path = target.with_name(f".{target.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CheckpointError(f"'{target}' cannot be written: {error}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of when the process ends, however it does
        except OSError as error:
            raise CheckpointError(f"another run is making '{target}': wait for it, or end it") from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _target_folder(given: str | os.PathLike[str], checkpoint: Checkpoint, *, is_folder: bool, overwrite: bool) -> Path:
    if checkpoint.is_quantized:
        raise CheckpointError(f"'{checkpoint.location}' is quantized already; give the original checkpoint")
    target = checked_target(given, overwrite=overwrite)
    source = Path(os.path.realpath(checkpoint.location.parent))
    if target == source or target in source.parents or (is_folder and source in target.parents):
        raise CheckpointError(f"'{target}' lies where the checkpoint is, '{source}': name another folder")
    return target


@contextmanager
def _resumable_folder(target: Path, fingerprint: str) -> Iterator[Path]:
    """Return a folder beside the target, with what an earlier run for the same has finished, and put it in place."""
    made = target.with_name(f".{target.name}.partial")
    progress = made / _PROGRESS_NAME
    try:
        if not progress.is_file() or progress.read_text() != fingerprint:
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir(parents=True)
            progress.write_text(fingerprint)
        yield made
        progress.unlink()
        put_in_place(made, target)
    except KeyboardInterrupt:
        raise  # the next run goes on
    except BaseException as error:
        shutil.rmtree(made, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"'{target}' cannot be written: {error}; nothing there has been changed") from error
        raise


def _fingerprint(plan: Plan, checkpoint: Checkpoint, max_shard_bytes: int) -> str:
    """Tell runs apart that would not write the same bytes: by files, config, layers, layout and versions."""
    fingerprints = SourceFingerprints(with_samples=False)

    def origin(planned: PlannedTensor) -> object:
        return [fingerprints.of(source) for source in planned.sources] or content_hash(planned.tensor.value)

    key = {
        "bigload": FORMAT_VERSION,
        "bitsandbytes": bnb.library().__version__,
        "files": sorted({str(tensor.file) for tensor in checkpoint.tensors.values()}),
        "config": plan.config.to_dict(),
        "tensors": [(p.tensor.names, p.shape, str(p.format), p.device.type, origin(p)) for p in plan.tensors],
        "max_shard_bytes": max_shard_bytes,
    }
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _convert(plan: Plan, folder: Path, max_shard_bytes: int, progress: bool | None) -> str:
    """Write the weights. Returns their layout."""
    tensors = sorted(plan.tensors, key=_in_file_order)
    outputs = [Output(planned, plan.config) for planned in tensors if planned.tensor.persistent]
    writer = ShardWriter(folder, [entry for output in outputs for entry in output.entries.values()], max_shard_bytes)
    with progress_bar(plan.source_bytes, "quantizing", progress) as bar, default_stream(plan.tensors[0].device):
        try:
            tasks: list[ReadTask] = []
            for output in outputs:
                if all(map(writer.is_written, output.names)):
                    bar.update(sum(source.tensor.nbytes for source in output.planned.sources))
                elif output.planned.sources:
                    make_sink = functools.partial(file_sink, output, writer)
                    tasks += read_tasks_for(output.planned, make_sink, lambda done: None)
                else:
                    writer.write(output.planned.tensor.name, output.planned.tensor.value)
            read_and_load(tasks, plan, on_bytes=bar.update)
            writer.finish()
            return writer.layout
        finally:
            writer.close()


def _in_file_order(planned: PlannedTensor) -> tuple[str, int]:
    first = planned.sources[0].tensor if planned.sources else None
    return ("", 0) if first is None or isinstance(first, torch.Tensor) else (str(first.file), first.offset)


def _describe(plan: Plan, folder: Path, layout: str, kept: Sequence[str]) -> None:
    ties = [planned.tensor.names for planned in plan.tensors if len(planned.tensor.names) > 1]
    config = dataclasses.replace(plan.config, skip_modules=None, keep_in_fp32_modules=None)
    record = Record(layout, config, tuple(plan.layers), tuple(kept), tuple(ties))
    write_json(folder / RECORD_NAME, record.to_dict())
