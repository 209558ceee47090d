"""Every fact that is read from a transformers model, from what the model carries; the library stays unimported."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from .empty import init_empty_weights
from .errors import CheckpointError, MissingDependencyError


def import_transformers() -> ModuleType:
    """Import transformers.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise MissingDependencyError("this needs transformers: pip install 'bigload[demo]'") from error


def empty_model(folder: Path) -> nn.Module:
    """Build the model that a folder's config.json describes, without weights, in eval mode.

    Raises:
        CheckpointError: transformers cannot make sense of the config.
        MissingDependencyError: transformers is not installed.
    """
    transformers = import_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        names = getattr(config, "architectures", None) or [""]
        model_class = getattr(transformers, names[0], None)
        with init_empty_weights():
            model: nn.Module = model_class(config) if model_class else transformers.AutoModel.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"transformers cannot build a model from '{folder / 'config.json'}': {error}") from error
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.eval()


def is_conv1d(module: nn.Module) -> bool:
    """Ask whether a module is GPT-2's Conv1D: a Linear whose weight is stored (in_features, out_features)."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def output_head(model: nn.Module) -> nn.Module | None:
    """Give the output head that the model itself names, if it names one."""
    get_head = getattr(model, "get_output_embeddings", None)
    try:
        head = get_head() if callable(get_head) else None
    except (NotImplementedError, AttributeError):  # transformers' default for models without one, by version
        return None
    return head if isinstance(head, nn.Module) else None


def tied_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Give the pairs of parameter names that the model's class ties, whether or not they are one object now."""
    tied = getattr(model, "all_tied_weights_keys", None)
    return list(tied.items()) if isinstance(tied, dict) else []


def fp32_patterns(model: nn.Module, torch_dtype: torch.dtype) -> list[str]:
    """Give the names of modules that the library keeps in fp32 when it loads in this dtype.

    `_keep_in_fp32_modules` counts under float16 only, `_keep_in_fp32_modules_strict` under both 16-bit dtypes.
    """
    names: set[str] = set()
    for module in model.modules():
        if torch_dtype == torch.float16:
            names.update(getattr(module, "_keep_in_fp32_modules", None) or ())
        if torch_dtype in (torch.float16, torch.bfloat16):
            names.update(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    return sorted(names)


def ignores_key(model: nn.Module, key: str) -> bool:
    """Ask whether the model's class says that this checkpoint key may be left over."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, key) for pattern in patterns)
