"""`save_quantized_model`: saves a quantized model so that bigload, or transformers, loads the same bits again."""

from __future__ import annotations

import logging
import os
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint.card import Card
from .checkpoint.folders import TOKENIZERS, checked_target, copy_the_rest
from .checkpoint.record import RECORD_NAME, Record
from .checkpoint.writer import STEM, Entry, ShardWriter, write_json
from .config import BnbQuantizationConfig
from .distributed.joint_save import JointSave
from .errors import ConfigError, QuantizationError, listed
from .hardware.devices import on_cpu_unless_named
from .hardware.interrupts import deferred_interrupts, interruptible
from .inspection.own_loading import changed_when_loaded_again
from .inspection.own_saving import (
    attributes_set_by_loading,
    kept_attributes,
    saving_rules,
    weights_changed_by_saving,
)
from .model import diffusers_facts, transformers_facts
from .model.quantizable import plain_linears
from .model.tree import leaves, modules_by_path
from .model.view import require_module
from .notation import parse_size
from .offload.device_hooks import dtypes_on_gpu
from .pipeline.attributes import skip_list
from .quantization.layers import (
    config_of_layer,
    dtype_loaded_in,
    quantized_layers,
    require_whole_layers,
    source_class,
)
from .quantization.saved_experts import (
    configs_of_experts,
    quantized_experts,
    require_experts_as_held,
    require_whole_experts,
)

logger = logging.getLogger(__name__)

# Libraries with a `from_pretrained` that reads quantized folders.
_LIBRARIES = ("transformers", "diffusers")


@deferred_interrupts()
@on_cpu_unless_named()
def save_quantized_model(
    model: nn.Module,
    folder: str | os.PathLike[str],
    max_shard_size: int | str = "5GB",
    *,
    overwrite: bool = False,
) -> None:
    """Save a quantized model as safetensors, which load without quantizing again.

    `load_and_quantize_model(empty, None, folder)` loads it with the same bits, layers and dtypes. For a model of
    transformers or diffusers a config.json is written too, with which `from_pretrained(folder)` loads it. Tied weights
    are stored once. A model card (README.md) says how the model was quantized and is loaded; files of the tokenizer and
    the processor are copied from the folder that the model was loaded from. The folder appears when it is complete.

    Of a model that several processes hold (`load_and_quantize_model` with a mesh) each writes its part: call it in all
    of them, with a folder that they share.

    Args:
        model: a model loaded by bigload, or any other with layers of bitsandbytes.
        folder: the folder to create.
        max_shard_size: the largest size of the tensors in one file, in bytes or as "5GB"; a larger weight gets a file
            of its own.
        overwrite: replace a folder that is not empty.

    Raises:
        CheckpointError: the folder is not empty, or cannot be written; its contents are unchanged.
        DistributedError: another process could not write its part.
        ConfigError: an argument has an invalid value, or the model has no quantized layer.
        QuantizationError: the model could not be loaded again as it is: it has weights on meta, layers of several
            formats, weights that bitsandbytes has packed for the CPU, hooks that change the names of quantized ones, or
            attributes that a module's own loading has set and that no JSON can hold.

    Examples:
        >>> import bigload, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> model = bigload.load_and_quantize_model(net, "nf4", device_map="cpu")
        >>> bigload.save_quantized_model(model, "net-nf4")
        >>> with bigload.init_empty_weights():
        ...     empty = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> again = bigload.load_and_quantize_model(empty, None, "net-nf4", device_map="cpu")
        >>> x = torch.ones(1, 64)
        >>> torch.equal(again(x), model(x))
        True
    """
    require_module(model)
    model = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    joint = JointSave(model)
    with joint.stand_ins():
        # Here, so that other processes do not wait for one whose argument is wrong.
        _save(model, folder, shard_bytes(max_shard_size), joint, overwrite=overwrite)


def _save(
    model: nn.Module, folder: str | os.PathLike[str], max_shard_bytes: int, joint: JointSave, *, overwrite: bool
) -> None:
    layers, experts = quantized_layers(model), quantized_experts(model)
    config = _config(model, layers, experts)
    state, ties = _stored_once(model, layers)
    require_experts_as_held(experts, state)
    skipped = [path for path in plain_linears(model) if path not in layers]
    modules = modules_by_path(model)
    saved = {name: (tensor.dtype, tensor.shape) for name, tensor in state.items()}
    changed = changed_when_loaded_again(modules, saved, as_held=False)
    attributes = json_attributes(attributes_set_by_loading(modules, saved), modules, saved, changed)
    target, source = checked_target(folder, overwrite=overwrite), source_of(model)
    with joint.folder(folder, overwrite=overwrite) as made:
        if joint.is_first:
            is_read = write_configs(model, made, config, skipped, layers, getattr(model, "dtype", None), experts)
            card_of(model, config, [*layers, *experts], skipped, source, is_read).write(made, target)
            if source is not None:
                copy_the_rest(source, made, TOKENIZERS, but=_names_in(target))
        entries = [Entry(n, t.dtype, tuple(t.shape)) for n, t in state.items()]
        writer = ShardWriter(made, entries, max_shard_bytes, weights_stem(model), joins=not joint.is_first)
        try:
            joint.write(writer, state)
        finally:
            writer.close()
        if not joint.is_first:
            return
        record = Record(
            writer.layout,
            config,
            tuple(layers),
            tuple(skipped),
            tuple(ties),
            tuple(changed),
            attributes,
            tuple(experts),
        )
        write_json(made / RECORD_NAME, record.to_dict())


def json_attributes(
    attributes: Mapping[str, Mapping[str, Any]],
    modules: Mapping[str, nn.Module],
    saved: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    skipped: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Return what modules' own loading has set on them, for the record.

    Args:
        attributes: path -> name -> value.
        modules, saved, skipped: as for `kept_attributes`.

    Raises:
        QuantizationError: an attribute would be lost.
    """
    kept, lost = kept_attributes(attributes, modules, saved, skipped)
    if lost:
        raise QuantizationError(
            f"{listed(lost)}: set by the module's own loading, and would be lost, since JSON cannot hold such a value: "
            "let the module's get_extra_state return it as a tensor, and its set_extra_state set it"
        )
    return kept


def shard_bytes(size: int | str) -> int:
    """Return a `max_shard_size` in bytes.

    Raises:
        ConfigError: it is no size, or 0.
    """
    try:
        nbytes = parse_size(size)
    except ValueError as error:
        raise ConfigError(f"max_shard_size is {size!r}; expected bytes, or a size such as '5GB'") from error
    if not nbytes:
        raise ConfigError("max_shard_size is 0; expected bytes, or a size such as '5GB'")
    return nbytes


def weights_stem(model: nn.Module) -> str:
    """Return what the names of a model's files of weights begin with, for the library that its class comes from."""
    return diffusers_facts.WEIGHTS_STEM if diffusers_facts.is_diffusers(model) else STEM


def write_configs(
    model: Any,
    folder: Path,
    config: BnbQuantizationConfig,
    skipped: Iterable[str],
    layers: Mapping[str, nn.Module],
    dtype: Any,
    experts: Collection[str] = (),
) -> bool:
    """Write the configs of a model of transformers or diffusers, for `from_pretrained`.

    A warning says where it will not make the same layers.

    Returns:
        Whether `from_pretrained` reads the folder.
    """
    if transformers_facts.is_pretrained(model):
        unknown = _write_transformers_configs(model, folder, config, skipped, layers, dtype)
        _warn_of_experts(model, experts)
        return not unknown and not experts
    return diffusers_facts.is_diffusers(model) and not _write_diffusers_config(model, folder, config, layers)


def card_of(
    model: nn.Module,
    config: BnbQuantizationConfig,
    quantized: Sequence[str],
    skipped: Sequence[str],
    source: Path | None,
    is_read: bool,
) -> Card:
    """Return the model card of a model.

    Args:
        model: the model.
        config: how it was quantized.
        quantized: paths of its quantized layers and experts.
        skipped: paths of the layers that were left plain.
        source: the folder of the original.
        is_read: what `write_configs` returned.
    """
    name, root = type(model).__name__, type(model).__module__.partition(".")[0]
    auto_map = getattr(getattr(model, "config", None), "auto_map", None) or {}
    auto_class = next((auto for auto in auto_map if auto.startswith("AutoModel")), None)
    library = "transformers" if auto_class else None
    if root in _LIBRARIES and hasattr(sys.modules[root], name):
        library, auto_class = root, None
    return Card(config, name, library, is_read, auto_class, len(quantized), tuple(skipped), source)


def source_of(model: Any) -> Path | None:
    """Return the folder that a model was loaded from, by bigload or by its own library, where it is known."""
    report = vars(model).get("load_report")
    source = getattr(report, "source", None) or getattr(model, "name_or_path", None)  # as transformers calls it
    return Path(source) if source and isinstance(source, (str, Path)) and Path(source).is_dir() else None


def _names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _write_transformers_configs(
    model: Any,
    folder: Path,
    config: BnbQuantizationConfig,
    skipped: Iterable[str],
    layers: Mapping[str, nn.Module],
    dtype: Any,
) -> list[str]:
    """Return the classes of layers that transformers does not quantize."""
    quantization = config.to_transformers()
    quantization.llm_int8_skip_modules = skip_list(skipped, layers)
    transformers_facts.save_configs(model, folder, quantization, dtype)
    classes = dict.fromkeys(map(source_class, layers.values()))
    unknown = [
        cls.__name__ for cls in classes if not transformers_facts.is_quantized_by_transformers(cls, quantization)
    ]
    if unknown:
        logger.warning(
            "from_pretrained cannot load this saved %s: transformers %s quantizes no subclasses of nn.Linear, such as "
            "%s; load it with load_and_quantize_model(model, None, folder)",
            type(model).__name__,
            transformers_facts.import_transformers().__version__,
            listed(unknown),
        )
    return unknown


def _warn_of_experts(model: nn.Module, experts: Iterable[str]) -> None:
    names = list(experts)
    if names:
        logger.warning(
            "from_pretrained cannot load this saved %s: transformers reads no fused experts in 4 bit, such as those of "
            "%s; load it with load_and_quantize_model(model, None, folder)",
            type(model).__name__,
            listed(names, 1),
        )


def _write_diffusers_config(
    model: Any, folder: Path, config: BnbQuantizationConfig, layers: Mapping[str, nn.Module]
) -> list[str]:
    """Return the layers that diffusers would not make as they are."""
    quantization, modules = config.to_diffusers(), modules_by_path(model)
    quantization.llm_int8_skip_modules = diffusers_facts.skip_list(modules, layers.values())
    diffusers_facts.save_config(model, folder, quantization)
    otherwise = diffusers_facts.made_otherwise(modules, layers.values(), quantization)
    if otherwise:
        logger.warning(
            "from_pretrained cannot load this saved %s: diffusers takes a name without dots in its list of skipped "
            "layers for all layers of that name, and so cannot tell %s from the others; load it with "
            "load_and_quantize_model(model, None, folder)",
            type(model).__name__,
            listed(otherwise),
        )
    return otherwise


def _config(model: nn.Module, layers: Mapping[str, Any], experts: Mapping[str, Any]) -> BnbQuantizationConfig:
    """Return the config that the layers and experts were quantized with.

    Its `torch_dtype` is the one that the model was loaded in.
    """
    if not layers and not experts:
        raise ConfigError(
            f"this {type(model).__name__} has no layer that bitsandbytes quantized; save it as any other model"
        )
    require_whole_layers(model, layers)
    require_whole_experts(experts)
    modules = modules_by_path(model)
    tensors = {**leaves(modules, "_parameters"), **leaves(modules, "_buffers")}
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise QuantizationError(f"{listed(empty)}: on meta, so there is nothing to save; load the weights first")
    configs: dict[tuple[Any, ...], str] = {}
    for path, layer in layers.items():
        configs.setdefault(tuple(config_of_layer(layer).items()), path)
    for path, module in experts.items():
        for each in configs_of_experts(module):
            # Joined of weights with double quantization, their scales are in float32: see `checkpoint/merged.py`.
            doubled = tuple((each | {"bnb_4bit_use_double_quant": True}).items())
            configs.setdefault(doubled if doubled in configs else tuple(each.items()), path)
    if len(configs) > 1:
        raise QuantizationError(
            f"{listed(configs.values())} have different quantization configs: a checkpoint can have only one"
        )
    torch_dtype = dtype_loaded_in(model, layers.values()) or "auto"
    return BnbQuantizationConfig(**dict(next(iter(configs))), torch_dtype=torch_dtype)


def _stored_once(model: nn.Module, layers: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], list[tuple[str, ...]]]:
    """Return the model's state_dict with each tied parameter under its first name, and the tied names."""
    state: dict[str, torch.Tensor] = model.state_dict()
    # What the CPU computes in float32 is saved as a GPU would have it: loaded onto one, the dtypes have to fit.
    state |= {name: state[name].to(dtype) for name, dtype in dtypes_on_gpu(model).items() if name in state}
    extra = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if extra:
        raise QuantizationError(
            f"{listed(extra)}: extra state that is no tensor, which safetensors cannot hold: let "
            "get_extra_state return a tensor"
        )
    modules = modules_by_path(model)
    _require_weights_as_held(modules, layers, state)
    groups: defaultdict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, parameter in interruptible(leaves(modules, "_parameters").items()):
        if name in state and parameter.numel():
            groups[parameter.data_ptr(), parameter.dtype, parameter.shape, parameter.stride()].append(name)
    ties = [tuple(names) for names in groups.values() if len(names) > 1]
    untied = [
        (one, other)
        for one, other in transformers_facts.tied_pairs(model)
        if one in state and other in state and not any({one, other} <= set(names) for names in ties)
    ]
    if untied:
        raise QuantizationError(
            f"{listed(untied[0])} are tied in models of this class, but not in this model: set "
            "config.tie_word_embeddings to False, so that loading does not tie them again"
        )
    quantized = set(layers.values())
    shared = {f"{path}.weight".lstrip(".") for path, module in modules.items() if module in quantized}
    gone = {name for _, *others in ties for name in others}
    for name in gone & shared:  # and all other parts of a quantized weight
        around = {f"{name.removesuffix('weight')}{part}" for part in ("SCB", "weight_format")}
        gone |= {key for key in state if key in around or key.startswith(f"{name}.")}
    return {name: tensor for name, tensor in state.items() if name not in gone}, ties


def _require_weights_as_held(
    modules: Mapping[str, nn.Module], layers: Mapping[str, Any], state: Mapping[str, torch.Tensor]
) -> None:
    changed = weights_changed_by_saving(modules, layers, state)
    if not changed:
        return
    rules = {
        f"{listed(saving_rules(modules[path]))} of {repr(path) if path else 'the model'}": None
        for above in changed.values()
        for path in above
    }
    raise QuantizationError(
        f"{listed(changed)}: quantized, but hooks change their weights or names in the state_dict, and loading does "
        f"not undo that: {'; '.join(rules)}. Remove such hooks for the save, or let them leave these weights alone"
    )
