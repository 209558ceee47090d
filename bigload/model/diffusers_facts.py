"""Everything that bigload reads from diffusers and its models. The library is imported only where needed."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..errors import import_optional
from .empty import init_empty_weights

# The name of a file of weights, before its number and its suffix.
WEIGHTS_STEM = "diffusion_pytorch_model"
_BITS_AND_BYTES = "diffusers.quantizers.bitsandbytes"
# Attributes that only diffusers sets on a quantized model.
SERIALIZABLE = ("is_4bit_serializable", "is_8bit_serializable")
# What the quantizer leaves in a model's config.
_IN_CONFIG = ("quantization_config", "_pre_quantization_dtype")


def import_diffusers() -> ModuleType:
    """Import diffusers.

    Raises:
        MissingDependencyError: it is not installed.
    """
    return import_optional("diffusers", "pip install diffusers")


def is_diffusers(model: nn.Module) -> bool:
    """Whether a model is a `ModelMixin` of diffusers."""
    return is_diffusers_class(type(model))


def is_diffusers_class(cls: Any) -> bool:
    """Whether a class is a `ModelMixin` of diffusers."""
    return _is_diffusers_class(cls)


@functools.cache
def _is_diffusers_class(cls: type) -> bool:
    return any(base.__module__ == "diffusers.models.modeling_utils" for base in cls.__mro__)


def fp32_names(modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the names that diffusers' loader looks for in a tensor's: where one is a component, it loads float32.

    That is so whatever dtype is asked for. It reads the class of the model that is loaded, not of models inside it.

    Args:
        modules: all modules by path.
    """
    if not any(is_diffusers_class(cls) for cls in {type(module) for module in modules.values()}):
        return []
    loaded = {path for path, module in modules.items() if is_diffusers(module)}
    outermost = [path for path in loaded if not any(_is_inside(path, other) for other in loaded)]
    named = [getattr(type(modules[path]), "_keep_in_fp32_modules", None) or () for path in outermost]
    return sorted({name for names in named for name in ([names] if isinstance(names, str) else names)})


def _is_inside(path: str, other: str) -> bool:
    return path != other and (not other or path.startswith(f"{other}."))


def skip_list(modules: Mapping[str, nn.Module], quantized: Iterable[nn.Module]) -> list[str]:
    """List every Linear that is not quantized: diffusers' loader makes quantized layers of all that are not listed.

    Args:
        modules: all modules by path.
        quantized: the layers that are, or will be, quantized.
    """
    among = set(quantized)
    return [path for path, module in modules.items() if isinstance(module, nn.Linear) and module not in among]


def made_otherwise(modules: Mapping[str, nn.Module], quantized: Iterable[nn.Module], quantization: Any) -> list[str]:
    """Return the Linears that diffusers' loader would not make as they are, by its own rule and this skip list.

    An entry without a dot also skips every layer that ends in this name, so that a plain "proj_out" beside a quantized
    "blocks.0.proj_out" cannot be said.

    Args:
        modules: all modules by path.
        quantized: the quantized layers.
        quantization: the `BitsAndBytesConfig` of diffusers with the `skip_list`.
    """
    among = set(quantized)
    linears = {path: module for path, module in modules.items() if isinstance(module, nn.Linear)}
    skeleton = nn.Module()
    for path in linears:
        _place(skeleton, path, nn.Linear(1, 1, device="meta"))
    skipped = [*(quantization.llm_int8_skip_modules or ()), *fp32_names(modules)]
    importlib.import_module(f"{_BITS_AND_BYTES}.utils").replace_with_bnb_linear(
        skeleton, modules_to_not_convert=skipped, quantization_config=quantization
    )
    made = dict(skeleton.named_modules(remove_duplicate=False))
    return [path for path, module in linears.items() if (type(made[path]) is not nn.Linear) != (module in among)]


def _place(skeleton: nn.Module, path: str, layer: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in skeleton._modules:
            skeleton.add_module(parent, nn.Module())
        skeleton = skeleton.get_submodule(parent)
    skeleton.add_module(name, layer)


def attributes_of_quantized(model: Any, quantization: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Return the attributes that diffusers' own loader sets on a quantized model; its `save_pretrained` reads them.

    Args:
        model: the model; its own config is not changed.
        quantization: the `BitsAndBytesConfig` of diffusers.
        dtype: of what is not quantized.
    """
    bits = 4 if quantization.load_in_4bit else 8
    quantizers = importlib.import_module(f"{_BITS_AND_BYTES}.bnb_quantizer")
    quantizer = getattr(quantizers, f"BnB{bits}BitDiffusersQuantizer")(quantization, pre_quantized=False)
    quantizer.modules_to_not_convert = quantization.llm_int8_skip_modules
    return {
        "is_quantized": True,
        "quantization_method": quantization.quant_method,
        "hf_quantizer": quantizer,
        f"is_{bits}bit_serializable": True,
        "_internal_dict": _config_with(model, quantization_config=quantization, _pre_quantization_dtype=dtype),
    }


def config_without_quantization(model: Any) -> Any:
    """Return a copy of a model's config that does not say how it was quantized."""
    return _config_with(model)


def _config_with(model: Any, **fields: Any) -> Any:
    config = {name: value for name, value in model.config.items() if name not in _IN_CONFIG}
    return type(model.config)(config | fields)


def save_config(model: Any, folder: Path, quantization: Any) -> None:
    """Write the config.json of a diffusers model, as its `save_pretrained` does.

    Args:
        model: the model; its own config is not changed.
        folder: where to write.
        quantization: the `BitsAndBytesConfig` of diffusers to store as `quantization_config`.
    """
    other = copy.copy(model)  # diffusers writes a model's config only
    other.__dict__["_internal_dict"] = _config_with(model, quantization_config=quantization)
    other.save_config(folder)


def empty_model(config: Mapping[str, Any]) -> nn.Module:
    """Build the model that a config.json of diffusers describes: without weights, in eval mode.

    Raises:
        AttributeError: diffusers has no such class.
        MissingDependencyError: diffusers is not installed.
    """
    model_class = getattr(import_diffusers(), config["_class_name"])
    with init_empty_weights():
        model: nn.Module = model_class.from_config(dict(config))
    return model.eval()
