"""Selects the layers of a model that are quantized."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..config import BnbQuantizationConfig
from ..errors import CheckpointError, ConfigError, listed
from ..hardware.interrupts import interruptible
from ..inspection.linears import acts_as_linear, class_acts_as_linear
from . import diffusers_facts, transformers_facts
from .fp32_modules import fp32_patterns
from .tensors import ModelTensor
from .view import ModelView, view_of

logger = logging.getLogger(__name__)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns matches whole, consecutive components of a dotted name; `*` matches anything."""
    return one_of(patterns).search(name) is not None


def one_of(patterns: Iterable[str]) -> re.Pattern[str]:
    """Return the expression to search a name for: it finds one of the patterns, as `matches` does."""
    return _compiled(tuple(patterns))


@functools.cache
def _compiled(patterns: tuple[str, ...]) -> re.Pattern[str]:
    bodies = [".*".join(re.escape(piece) for piece in pattern.split("*")) for pattern in patterns]
    return re.compile(rf"(?:^|\.)(?:{'|'.join(bodies)})(?:\.|$)" if bodies else "(?!)")


def layers_to_quantize(
    model: nn.Module | ModelView,
    config: BnbQuantizationConfig,
    tensors: Sequence[ModelTensor],
    quantizable: Sequence[type[nn.Linear]] = (),
    read: Collection[str] | None = None,
) -> dict[str, nn.Module]:
    """Return the layers to quantize, by path: nn.Linear, subclasses that compute the same, and GPT-2's Conv1D.

    Skipped are tied weights, layers whose weight other code reads (`plain_because_read`), modules kept in fp32 by the
    config or the transformers class, and `skip_modules` or, if that is None, the output head.

    Args:
        model: not changed.
        config: its `skip_modules` and `keep_in_fp32_modules` are used.
        tensors: of the model, from `tensors_of`.
        quantizable: further subclasses of nn.Linear to quantize.
        read: the layers of `plain_because_read`, where they are known already.

    Raises:
        ConfigError: a class in `quantizable` does not do what nn.Linear does.
    """
    view = view_of(model)
    linears = plain_linears(view, quantizable)
    classes = {type(module) for module in view.modules.values()}
    absent = [cls.__name__ for cls in quantizable if cls not in classes]
    if absent:
        logger.warning("quantizable names %s, but no layer of the model is of that class", listed(absent))
    everything = [name for tensor in tensors for name in tensor.names]
    for field in ("skip_modules", "keep_in_fp32_modules"):
        named = getattr(config, field) or []
        unused = [pattern for pattern in named if not any(matches(name, [pattern]) for name in everything)]
        if unused:
            logger.warning("%s names %s, which nothing in the model matches", field, listed(unused))
    if "*" in (config.skip_modules or ()):
        return {}
    read = plain_because_read(view, config, quantizable) if read is None else read
    return _chosen(view, config, tensors, {path: layer for path, layer in linears.items() if path not in read})


def _chosen(
    view: ModelView, config: BnbQuantizationConfig, tensors: Sequence[ModelTensor], linears: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """Return those linears that are not tied and that nobody wants to stay as they are."""
    tied = {name for tensor in tensors if _has_several_owners(view, tensor) for name in tensor.names}
    heads, patterns = meant_to_stay(view, config)
    paths: dict[nn.Module, list[str]] = {}
    for path, module in interruptible(view.modules.items()):
        paths.setdefault(module, []).append(f"{path}.weight".lstrip("."))
    stays = one_of(patterns).search
    return {
        path: module
        for path, module in interruptible(linears.items())
        if module not in heads
        and _weight(module).numel()
        and not any(weight in tied or stays(weight) for weight in paths[module])
    }


def meant_to_stay(view: ModelView, config: BnbQuantizationConfig) -> tuple[set[nn.Module], list[str]]:
    """Return what is not quantized on purpose: the output heads, and patterns of the config and the model's class."""
    heads = default_heads(view.model) if config.skip_modules is None else set()
    own = [*(config.keep_in_fp32_modules or ()), *(config.skip_modules or ())]
    return heads, [*own, *fp32_patterns(view.modules)]


def plain_because_read(
    model: nn.Module | ModelView, config: BnbQuantizationConfig, quantizable: Sequence[type[nn.Linear]] = ()
) -> dict[str, str]:
    """Return the layers that stay plain because other code reads their weight, each with what it reads.

    The values of a quantized weight are packed; it shows the dtype that it is stored in, and 4 bit another shape. A
    cast, as routers make, would change nothing or, where packed bytes are stored as floats, destroy it.

    Args:
        model: not changed.
        config: how weights would be quantized.
        quantizable: further subclasses of nn.Linear to quantize.

    Returns:
        Path -> "values", "dtype", "shape" or "cast". A read that is right for a quantized weight too does not count.
    """
    view = view_of(model)
    trains = config.llm_int8_has_fp16_weight
    stored = torch.int8 if config.load_in_8bit else config.bnb_4bit_quant_storage
    assert isinstance(stored, torch.dtype)  # the config has checked it
    shown = None if trains or stored == config.torch_dtype else stored
    reads = view.weight_reads(shown)
    found = {}
    for path, module in plain_linears(view, quantizable).items() if reads else ():
        wrong = {"values"} if trains else {"values", "cast"}
        if shown is not None:
            wrong.add("dtype")
        if config.load_in_4bit or (transformers_facts.is_conv1d(module) and not trains):
            wrong.add("shape")
        read = wrong & reads.get(module, set())
        if read:
            found[path] = max(read)  # values before shape before dtype before cast
    return found


def layers_stored_quantized(
    model: nn.Module | ModelView,
    config: BnbQuantizationConfig,
    tensors: Sequence[ModelTensor],
    stored: Iterable[str],
    quantizable: Sequence[type[nn.Linear]] = (),
) -> dict[str, nn.Module]:
    """Return the layers whose weights the checkpoint stores quantized, by path.

    Args:
        model: not changed.
        config: its `skip_modules` and `keep_in_fp32_modules` must not name a quantized layer.
        tensors: of the model, from `tensors_of`.
        stored: the names of those weights in the model.
        quantizable: further subclasses of nn.Linear that may be quantized.

    Raises:
        CheckpointError: a stored weight does not belong to a layer that can be quantized, or is tied to another
            module's.
        ConfigError: the config skips a quantized layer, or a class in `quantizable` does not do what nn.Linear does.
    """
    view = view_of(model)
    candidates = {f"{path}.weight".lstrip("."): path for path in plain_linears(view, quantizable)}
    names = list(stored)
    among = set(names)
    shared = [t.name for t in tensors if t.name in among and _has_several_owners(view, t)]
    if shared:
        raise CheckpointError(
            f"{listed(shared)}: stored quantized, but in the model tied to other modules' weights: build the model "
            "without the tie, or use the original checkpoint"
        )
    unknown = [name for name in names if name not in candidates]
    if unknown:
        raise CheckpointError(
            f"{listed(unknown)}: stored quantized, but in the model no weight of an nn.Linear: build the model from "
            "this checkpoint's config, or name its class in quantizable"
        )
    for field in ("skip_modules", "keep_in_fp32_modules"):
        plain = [candidates[name] for name in interruptible(names) if matches(name, getattr(config, field) or ())]
        if plain:
            raise ConfigError(
                f"the checkpoint is quantized already, and so are {listed(plain)}, which {field} names: remove "
                "them from it, or use the original checkpoint"
            )
    return {candidates[name]: view.owner(name) for name in names}


def layers_recorded(
    model: nn.Module | ModelView, paths: Iterable[str], quantizable: Sequence[type[nn.Linear]] = ()
) -> dict[str, nn.Module]:
    """Return the layers that were quantized when the model was saved, by path.

    Raises:
        CheckpointError: a path is not that of a layer that can be quantized.
    """
    candidates = plain_linears(model, quantizable)
    unknown = [path for path in paths if path not in candidates]
    if unknown:
        raise CheckpointError(
            f"{listed(unknown)}: quantized when it was saved, but in the model no nn.Linear: build the model that was "
            "saved, or name its class in quantizable"
        )
    return {path: candidates[path] for path in paths}


def plain_linears(model: nn.Module | ModelView, quantizable: Sequence[type[nn.Linear]] = ()) -> dict[str, nn.Module]:
    """Return the layers that can be quantized, by path.

    Raises:
        ConfigError: a class in `quantizable` does not do what nn.Linear does.
    """
    _check_quantizable(quantizable)
    each = interruptible(view_of(model).first_paths.items())
    return {path: module for module, path in each if _is_quantizable(module, quantizable)}


def _check_quantizable(quantizable: Any) -> None:
    if not isinstance(quantizable, (tuple, list)):
        raise ConfigError(f"quantizable must be a list of subclasses of nn.Linear, but it is {quantizable!r}")
    for cls in quantizable:
        _require_linear_forward(cls)


def _require_linear_forward(cls: Any) -> None:
    """Check a subclass against nn.Linear's computation, on a small layer from its own constructor."""
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


def _has_several_owners(view: ModelView, tensor: ModelTensor) -> bool:
    return len(tensor.names) > 1 and len({id(view.owner(name)) for name in tensor.names}) > 1


def default_heads(model: nn.Module) -> set[nn.Module]:
    """Return the output head that the model declares, else its last direct child if that is an nn.Linear.

    If the model declares a list of heads, as MusicGen does, all modules in it are heads: transformers does not quantize
    what is below the declared one either.

    A model of diffusers has none: its own loader quantizes all of its Linears, and what it reads cannot say otherwise
    where others have the same name (Flux's `proj_out`).
    """
    if diffusers_facts.is_diffusers(model):
        return set()
    head = transformers_facts.output_head(model)
    if head is None:
        last = list(model.children())[-1:]
        head = last[0] if last and isinstance(last[0], nn.Linear) else None
    return set() if head is None else set(head.modules())


def _is_quantizable(module: nn.Module, quantizable: Sequence[type[nn.Linear]]) -> bool:
    """Whether a module computes what nn.Linear does, and holds only a floating-point weight and a bias."""
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
