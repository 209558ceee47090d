"""What the model is: its tensors under all their names, its ties, and which of its layers are quantized."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import BnbQuantizationConfig
from ..errors import CheckpointError, ConfigError, listed
from . import transformers_facts
from .linears import acts_as_linear, class_acts_as_linear
from .tree import first_paths, leaves, modules_by_path
from .weight_readers import weights_read

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ModelTensor:
    """A parameter or buffer of the model.

    Attributes:
        names: every path that leads to it, in the order of the modules; more than one where it is tied.
        value: the model's own tensor, on meta or not.
        is_parameter: a parameter, not a buffer.
        persistent: part of the state_dict.
    """

    names: tuple[str, ...]
    value: torch.Tensor
    is_parameter: bool
    persistent: bool

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the model."""
        return tuple(self.value.shape)


def tensors_of(model: nn.Module, tied_parameters: Sequence[tuple[str, str]] = ()) -> list[ModelTensor]:
    """List the parameters and buffers of a model, tied ones once.

    Ties are objects under several names, pairs that the transformers class declares, and `tied_parameters`.

    Raises:
        ConfigError: the model is no module or is quantized already, or `tied_parameters` names no parameter or ties two
            of different shapes.
    """
    _require_module(model)
    modules = modules_by_path(model)
    parameters, buffers = leaves(modules, "_parameters"), leaves(modules, "_buffers")
    _require_plain(parameters, buffers)
    declared = [
        (first, second)
        for first, second in transformers_facts.tied_pairs(model)
        if first in parameters and second in parameters and parameters[first].shape == parameters[second].shape
    ]
    _check_ties(tied_parameters, parameters)
    groups = _group_names(parameters, [*declared, *tied_parameters])
    tensors = [ModelTensor(names, parameters[names[0]], True, True) for names in groups]
    for names in _group_names(buffers, ()):
        owners = [_owner(modules, name) for name in names]
        persistent = any(leaf not in owner._non_persistent_buffers_set for owner, leaf in owners)
        tensors.append(ModelTensor(names, buffers[names[0]], False, persistent))
    return tensors


def _require_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        found = f"the class {model.__name__}: call it" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ConfigError(f"model must be an nn.Module, but it is {found}")


def _require_plain(parameters: Mapping[str, nn.Parameter], buffers: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        if type(parameter).__name__ in ("Params4bit", "Int8Params"):
            raise ConfigError(
                f"'{name}' is quantized by bitsandbytes already (a {type(parameter).__name__}); build the model anew "
                "to load or quantize it again"
            )
    for name, tensor in [*parameters.items(), *buffers.items()]:
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise ConfigError(f"'{name}' has no shape yet: run the lazy modules once before the model is loaded")


def _check_ties(pairs: Sequence[tuple[str, str]], parameters: dict[str, nn.Parameter]) -> None:
    if not isinstance(pairs, (tuple, list)):
        raise ConfigError(f"tied_parameters must be a list of pairs of parameter names, but it is {pairs!r}")
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(name, str) for name in pair):
            raise ConfigError(f"tied_parameters must hold pairs of parameter names, but it holds {pair!r}")
        absent = [name for name in pair if name not in parameters]
        if absent:
            raise ConfigError(f"tied_parameters names {listed(absent)}, which the model does not have")
        first, second = (tuple(parameters[name].shape) for name in pair)
        if first != second:
            raise ConfigError(f"tied_parameters ties '{pair[0]}' {first} to '{pair[1]}' {second}: shapes differ")


def _group_names(tensors: dict[str, Any], pairs: Iterable[tuple[str, str]]) -> list[tuple[str, ...]]:
    """Group names whose tensors are one object or are declared tied; groups and names keep their order."""
    group_of: dict[str, list[str]] = {}
    by_object: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        group = by_object.setdefault(id(tensor), [])
        group.append(name)
        group_of[name] = group
    for first, second in pairs:
        kept, merged = group_of[first], group_of[second]
        if kept is not merged:
            kept.extend(merged)
            group_of.update(dict.fromkeys(merged, kept))
    rank = {name: position for position, name in enumerate(tensors)}
    groups = {id(group): tuple(sorted(group, key=rank.__getitem__)) for group in group_of.values()}
    return sorted(groups.values(), key=lambda names: rank[names[0]])


def _owner(modules: Mapping[str, nn.Module], name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return modules[path], leaf


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a run of whole components of a dotted name is one of the patterns; a star is any characters."""
    return any(_compiled(pattern).search(name) for pattern in patterns)


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    body = ".*".join(re.escape(piece) for piece in pattern.split("*"))
    return re.compile(rf"(?:^|\.){body}(?:\.|$)")


def layers_to_quantize(
    model: nn.Module,
    config: BnbQuantizationConfig,
    tensors: Sequence[ModelTensor],
    quantizable: Sequence[type[nn.Linear]] = (),
) -> dict[str, nn.Module]:
    """Choose the layers to quantize, by path: nn.Linear, what acts as it does, GPT-2's Conv1D, less what is skipped.

    Skipped are tied weights, layers whose owner reads their weight past their forward, modules kept in fp32 by the
    config or the transformers class, and `skip_modules` or, where that is None, the output head.

    Args:
        model: read only.
        config: what it skips.
        tensors: of the model, from `tensors_of`.
        quantizable: further subclasses of nn.Linear to quantize.

    Raises:
        ConfigError: a class in `quantizable` does not do what nn.Linear does.
    """
    _check_quantizable(quantizable)
    modules = modules_by_path(model)
    tied = {name for tensor in tensors if _has_several_owners(modules, tensor) for name in tensor.names}
    # What the class keeps in fp32 in any 16-bit dtype must not be quantized in any: it ruins T5's `wo`.
    always = [*(config.keep_in_fp32_modules or ()), *transformers_facts.fp32_patterns(model, torch.float16)]
    head = default_head(model) if config.skip_modules is None else None
    skip = config.skip_modules or []
    paths: dict[nn.Module, list[str]] = {}
    for path, module in modules.items():
        paths.setdefault(module, []).append(f"{path}.weight".lstrip("."))
    read = modules_read(model)
    layers = {}
    for path, module in plain_linears(model, quantizable).items():
        if module is head or module in read or not _weight(module).numel():
            continue
        if not any(weight in tied or matches(weight, [*always, *skip]) for weight in paths[module]):
            layers[path] = module
    everything = [name for tensor in tensors for name in tensor.names]
    for field, patterns in (("skip_modules", skip), ("keep_in_fp32_modules", config.keep_in_fp32_modules or [])):
        unused = [pattern for pattern in patterns if not any(matches(name, [pattern]) for name in everything)]
        if unused:
            logger.warning("%s names %s, which nothing in the model matches", field, listed(unused))
    return layers


def layers_stored_quantized(
    model: nn.Module,
    config: BnbQuantizationConfig,
    tensors: Sequence[ModelTensor],
    stored: Iterable[str],
    quantizable: Sequence[type[nn.Linear]] = (),
) -> dict[str, nn.Module]:
    """Find the layers whose weights a checkpoint holds quantized already, by path.

    Args:
        model: read only.
        config: the caller's, or that of the checkpoint.
        tensors: of the model, from `tensors_of`.
        stored: the names of those weights in the model.
        quantizable: subclasses of nn.Linear that may be quantized too.

    Raises:
        CheckpointError: one is no weight of a layer that can be quantized, or tied to another module's.
        ConfigError: one is to be kept plain, or a class in `quantizable` does not do what nn.Linear does.
    """
    _check_quantizable(quantizable)
    could_be = {f"{path}.weight".lstrip("."): path for path in plain_linears(model, quantizable)}
    names = list(stored)
    modules, among = modules_by_path(model), set(names)
    shared = [t.name for t in tensors if t.name in among and _has_several_owners(modules, t)]
    if shared:
        raise CheckpointError(
            f"{listed(shared)}: stored quantized, but in the model tied to other modules' weights: build the model "
            "without the tie, or give the original checkpoint"
        )
    strange = [name for name in names if name not in could_be]
    if strange:
        raise CheckpointError(
            f"{listed(strange)}: stored quantized, but in the model no weight of an nn.Linear: build the model from "
            "this checkpoint's config, or name its class in quantizable"
        )
    for field in ("skip_modules", "keep_in_fp32_modules"):
        plain = [could_be[name] for name in names if matches(name, getattr(config, field) or ())]
        if plain:
            raise ConfigError(
                f"the checkpoint is quantized already, and so are {listed(plain)}, which {field} keeps plain: leave "
                "them out, or give the original checkpoint"
            )
    return {could_be[name]: modules[could_be[name]] for name in names}


def layers_recorded(
    model: nn.Module, paths: Iterable[str], quantizable: Sequence[type[nn.Linear]] = ()
) -> dict[str, nn.Module]:
    """Find the layers that a saved model had quantized, where the weights themselves do not say it, by path.

    Raises:
        CheckpointError: one is no layer that can be quantized.
    """
    _check_quantizable(quantizable)
    could_be = plain_linears(model, quantizable)
    strange = [path for path in paths if path not in could_be]
    if strange:
        raise CheckpointError(
            f"{listed(strange)}: quantized when it was saved, but in the model no nn.Linear: build the model that was "
            "saved, or name its class in quantizable"
        )
    return {path: could_be[path] for path in paths}


def plain_linears(model: nn.Module, quantizable: Sequence[type[nn.Linear]] = ()) -> dict[str, nn.Module]:
    """List the layers that could be quantized, by path."""
    return {path: module for module, path in first_paths(model).items() if _is_quantizable(module, quantizable)}


def modules_read(model: nn.Module) -> set[nn.Module]:
    """List the modules whose weight their owner reads past their forward."""
    return {owner.get_submodule(path) for owner in modules_by_path(model).values() for path in weights_read(owner)}


def _check_quantizable(quantizable: Any) -> None:
    if not isinstance(quantizable, (tuple, list)):
        raise ConfigError(f"quantizable must be a list of subclasses of nn.Linear, but it is {quantizable!r}")
    for cls in quantizable:
        _require_linear_forward(cls)


def _require_linear_forward(cls: Any) -> None:
    """Run a small layer of a subclass, made as it makes them, against nn.Linear's own computation."""
    if not (isinstance(cls, type) and issubclass(cls, nn.Linear)):
        raise ConfigError(f"quantizable must hold subclasses of nn.Linear, but it holds {cls!r}")
    if class_acts_as_linear(cls):
        return
    x = torch.linspace(-1, 1, 180).view(5, 6, 6)
    try:
        with torch.random.fork_rng(devices=[]):
            layer = cls(6, 4)
        same = torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-6)
    except Exception as error:
        raise ConfigError(
            f"quantizable holds {cls.__name__}, which cannot be tried as {cls.__name__}(6, 4): {error}"
        ) from error
    if not same:
        raise ConfigError(
            f"quantizable holds {cls.__name__}, whose forward is not nn.Linear's: quantizing would change it"
        )


def _weight(layer: nn.Module) -> torch.Tensor:
    weight = layer._parameters["weight"]
    assert weight is not None
    return weight


def _has_several_owners(modules: Mapping[str, nn.Module], tensor: ModelTensor) -> bool:
    return len(tensor.names) > 1 and len({id(_owner(modules, name)[0]) for name in tensor.names}) > 1


def default_head(model: nn.Module) -> nn.Module | None:
    """The head that the model names, else its last direct child when that is itself a Linear."""
    head = transformers_facts.output_head(model)
    if head is None:
        last = list(model.children())[-1:]
        head = last[0] if last and isinstance(last[0], nn.Linear) else None
    return head


def _is_quantizable(module: nn.Module, quantizable: Sequence[type[nn.Linear]]) -> bool:
    """Whether a module is a Linear in all it does: its class, its own forward, and nothing but two parameters."""
    return (
        (isinstance(module, nn.Linear) or transformers_facts.is_conv1d(module))
        and "forward" not in module.__dict__
        and module._parameters.keys() == {"weight", "bias"}
        and module._parameters["weight"] is not None
        and module._parameters["weight"].is_floating_point()
        and not (module._buffers or module._modules)
        and (
            type(module) is nn.Linear
            or type(module) in quantizable
            or transformers_facts.is_conv1d(module)
            or acts_as_linear(module)
        )
    )
