"""Everything that bigload reads from transformers and its models. The library is imported only where needed."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import logging
import re
import shutil
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, ConfigError, import_optional, reason
from .diffusers_facts import is_diffusers_class
from .empty import init_empty_weights

logger = logging.getLogger(__name__)

# Names in configs for how many experts a token visits.
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "moe_top_k")


def import_transformers() -> ModuleType:
    """Import transformers.

    Raises:
        MissingDependencyError: it is not installed.
    """
    return import_optional("transformers", "pip install transformers")


def empty_model(folder: Path) -> nn.Module:
    """Build the model that a config.json, or the one in a folder, describes: without weights, in eval mode.

    Raises:
        CheckpointError: transformers cannot build a model from the config, or only by code that lies in the folder.
        MissingDependencyError: transformers is not installed.
    """
    transformers = import_transformers()
    _require_no_code(folder, transformers)
    try:
        # Not to be trusted, said here: transformers would ask at the terminal.
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model_class = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
        auto = transformers.AutoModel
        with init_empty_weights():
            model: nn.Module = model_class(config) if model_class else auto.from_config(config, trust_remote_code=False)
        if (folder / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    except Exception as error:  # a model class may raise anything for a config that does not fit it
        raise CheckpointError(
            f"transformers cannot build a model from the configs in '{folder}': {type(error).__name__}: {reason(error)}"
        ) from error
    return model.eval()


def _require_no_code(folder: Path, transformers: ModuleType) -> None:
    """Refuse a config whose model is made by code of its own, where transformers has no class for it.

    Raises:
        CheckpointError: it is.
    """
    try:
        said = json.loads((folder / "config.json" if folder.is_dir() else folder).read_bytes())
        auto_map, names = dict(said.get("auto_map") or {}), list(said.get("architectures") or ["AutoModel"])
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return  # transformers says what is wrong
    if not auto_map or (said.get("model_type") in transformers.CONFIG_MAPPING and hasattr(transformers, str(names[0]))):
        return
    auto = next((name for name in auto_map if name.startswith("AutoModel")), "AutoModel")
    raise CheckpointError(
        f"the model in '{folder}' is made by code of its own ({auto_map.get(auto, auto_map)}, says auto_map in "
        f"config.json), which bigload does not run: if you trust that code, build the model with transformers' "
        f"{auto}.from_config under bigload.init_empty_weights(), and pass it to load_and_quantize_model, or to "
        "quantize_checkpoint as model="
    )


def save_configs(model: Any, folder: Path, quantization: Any, dtype: torch.dtype) -> None:
    """Write config.json, generation_config.json and code of a transformers model, as its `save_pretrained` does.

    Args:
        model: the model; its own config is not changed.
        folder: where to write.
        quantization: the `BitsAndBytesConfig` to store as `quantization_config`.
        dtype: of the weights that are not quantized.

    Raises:
        ConfigError: transformers refuses to save the configs.
    """
    config = copy.deepcopy(model.config)
    config.quantization_config = quantization
    config.architectures = [type(model).__name__]
    config.dtype = str(dtype).removeprefix("torch.")
    try:
        _save_code(model, config, folder)
        config.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None and model.can_generate():
            model.generation_config.save_pretrained(folder)
    except (TypeError, ValueError) as error:  # transformers validates what it writes
        raise ConfigError(f"transformers does not save the configs of this {type(model).__name__}: {error}") from error


def _save_code(model: Any, config: Any, folder: Path) -> None:
    """Copy the code of a class that is not transformers' own, which `auto_map` in its config names.

    `save_pretrained` does so only for classes that an Auto class has loaded, not for those that were imported.
    """
    dynamic = importlib.import_module("transformers.dynamic_module_utils")
    if getattr(model, "_auto_class", None) is not None:
        dynamic.custom_object_save(model, folder, config=config)  # and the config's own when it is saved
    auto_map = getattr(config, "auto_map", None) or {}
    files = {str(reference).rpartition(".")[0] for reference in auto_map.values()}
    for module in {type(model).__module__, type(config).__module__}:
        source = getattr(sys.modules.get(module), "__file__", None)
        if source is not None and module.rpartition(".")[2] in files:
            for file in (source, *dynamic.get_relative_import_files(source)):
                shutil.copyfile(file, folder / Path(file).name)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's Conv1D: a Linear whose weight is stored (in_features, out_features)."""
    return is_conv1d_class(type(module))


def is_conv1d_class(cls: type) -> bool:
    """Whether a class is GPT-2's Conv1D."""
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def is_quantized_by_transformers(cls: type, quantization: Any) -> bool:
    """Whether transformers' own loader quantizes layers of a class with bitsandbytes; versions differ on subclasses.

    Args:
        cls: nn.Linear, a subclass of it, or Conv1D.
        quantization: a `BitsAndBytesConfig`.
    """
    if cls is nn.Linear or is_conv1d_class(cls):
        return True
    layer = nn.Linear(1, 1, device="meta")
    layer.__class__ = cls
    # The second layer is one that it does quantize, since it warns if there is none.
    model = nn.ModuleDict({"layer": layer, "linear": nn.Linear(1, 1, device="meta")})
    replace = importlib.import_module("transformers.integrations.bitsandbytes").replace_with_bnb_linear
    return bool(replace(model, [], quantization)["layer"] is not layer)


def config_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the floating-point dtype in a transformers model's config, or None."""
    dtype = getattr(getattr(model, "config", None), "dtype", None) if is_pretrained(model) else None
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else None


def experts_per_token(model: Any) -> int | None:
    """Return how many experts of each layer a token visits, as the config says; None if it does not."""
    config: Any = getattr(model, "config", None)
    try:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
    except ValueError:  # it has several, for models that may visit different numbers
        return None
    found = [getattr(text, name, None) for name in _EXPERTS_PER_TOKEN]
    found = [max(each, default=None) if isinstance(each, (list, tuple)) else each for each in found]
    return next((each for each in found if isinstance(each, int) and not isinstance(each, bool) and each > 0), None)


def no_split_classes(models: Iterable[nn.Module]) -> set[str]:
    """Return the names of all classes in the models' `_no_split_modules`."""
    named = (getattr(model, "_no_split_modules", None) for model in models)
    return {name for names in named if isinstance(names, (list, tuple, set)) for name in names}


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the module from the model's `get_output_embeddings`, or None."""
    get_head = getattr(model, "get_output_embeddings", None)
    try:
        head = get_head() if callable(get_head) else None
    except (NotImplementedError, AttributeError):  # for models without a head, depending on the version
        return None
    return head if isinstance(head, nn.Module) else None


def tied_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Return the pairs of parameter names that the model's class ties, even if they are two objects now.

    Its config may have changed since it was built: what that does not tie any more is left out.
    """
    tied = getattr(model, "all_tied_weights_keys", None)
    if not isinstance(tied, dict):
        return []
    expand = getattr(model, "get_expanded_tied_weights_keys", None)
    try:
        now = tied if expand is None else expand(all_submodels=True)
    except Exception:  # a class may name what it no longer has
        now = tied
    return [(one, other) for one, other in tied.items() if one in now]


def fp32_patterns(modules: Collection[nn.Module], torch_dtype: torch.dtype) -> list[str]:
    """Return the names of modules that transformers keeps in fp32 when it loads a model in a dtype.

    `_keep_in_fp32_modules` applies to float16 only, `_keep_in_fp32_modules_strict` to both 16-bit dtypes. (The
    attribute of this name in diffusers' classes follows another rule.)

    Args:
        modules: all modules of the model.
        torch_dtype: the dtype that the model is loaded in.
    """
    if torch_dtype not in (torch.float16, torch.bfloat16):
        return []
    fields = ["_keep_in_fp32_modules_strict"]
    if torch_dtype == torch.float16:
        fields.append("_keep_in_fp32_modules")
    # getattr on each of thousands of modules is slow: nn.Module searches parameters and buffers before it fails.
    own = [(type(module), vars(module)) for module in modules]
    kept: list[Any] = []
    for field in fields:
        kept += [attributes[field] for _, attributes in own if field in attributes]
        classes = {cls for cls, attributes in own if field not in attributes}
        kept += [getattr(cls, field, None) for cls in classes if not is_diffusers_class(cls)]
    return sorted({name for names in kept for name in names or ()})


class KeyConversion:
    """Renames and combines checkpoint tensors as transformers' own loader does for this model.

    It runs transformers' own rules and operations: prefixes of base models, legacy names, experts merged into one
    tensor.
    """

    def __init__(self, model: Any) -> None:
        core = importlib.import_module("transformers.core_model_loading")
        mapping = importlib.import_module("transformers.conversion_mapping")
        transforms = mapping.get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, core.WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, core.WeightConverter)]
        self._rename = core.rename_source_key
        self._model = model
        self._known = model.state_dict(keep_vars=True)  # its names: no tensor is read

    def among(self, keys: Iterable[str]) -> KeyConversion:
        """Return the same without the renamings of old names, if they rename none of these keys.

        Each takes microseconds for each key, and experts have thousands.
        """
        lines = "\n".join(keys)
        kept = copy.copy(self)
        if not any(_may_rename_a_line(renaming, lines) for renaming in self._renamings):
            kept._renamings = []
        return kept

    def target(self, key: str) -> tuple[str, str | None]:
        """Return the name of the model's tensor for a key, and the pattern of the conversion to run on it, if any."""
        prefix = self._model.base_model_prefix
        name, pattern = self._rename(key, self._renamings, self._converters, prefix, self._known)
        if name not in self._known and key in self._known:
            name, pattern = self._rename(key, [], [], prefix, self._known)
        return name, pattern

    def convert(self, target: str, collected: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Run the operations that combine checkpoint tensors into tensors of the model.

        Args:
            target: name of the first tensor of the model that they produce.
            collected: the checkpoint tensors, by the pattern that their keys match, in numeric order of the keys.

        Returns:
            Tensors by their names in the model.
        """
        converter = next(c for c in self._converters if set(collected) <= set(c.source_patterns))
        made: dict[str, Any] = {pattern: list(tensors) for pattern, tensors in collected.items()}
        for operation in converter.operations:
            made = operation.convert(
                made,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=target,
                model=self._model,
                config=self._model.config,
                missing_keys=None,
            )
        pattern = next((pattern for pattern in made if pattern in target), "")
        before, _, after = target.partition(pattern)
        return {
            before + name + after if pattern else name: tensor[0] if isinstance(tensor, list) else tensor
            for name, tensor in made.items()
        }


def _may_rename_a_line(renaming: Any, lines: str) -> bool:
    """Whether a renaming of transformers may change one of several keys, each on a line."""
    pattern = renaming.compiled_sources
    if renaming.scope_prefix is not None or re.search(r"\\[AZ]", pattern.pattern):  # begins elsewhere in a key
        return True
    return re.search(pattern.pattern, lines, pattern.flags | re.MULTILINE) is not None


def key_conversion(model: nn.Module) -> KeyConversion | None:
    """Return the key conversion of a transformers model; None for other models."""
    return KeyConversion(model) if is_pretrained(model) else None


def is_pretrained(model: nn.Module) -> bool:
    """Whether a model is a `PreTrainedModel` of transformers."""
    return _is_pretrained_class(type(model))  # type: ignore[arg-type]


@functools.cache
def _is_pretrained_class(cls: type) -> bool:
    return any(base.__module__ == "transformers.modeling_utils" for base in cls.__mro__)


def ignores_key(model: nn.Module, key: str) -> bool:
    """Whether the model's class declares that this checkpoint key may be unused."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, key) for pattern in patterns)
