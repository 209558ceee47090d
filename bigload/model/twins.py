"""A model of transformers or diffusers built anew from its config, for what its class decides: dtypes and buffers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .diffusers_facts import config_without_quantization, is_diffusers
from .empty import default_dtype, init_empty_weights
from .transformers_facts import is_pretrained

logger = logging.getLogger(__name__)


class _NoInitialization(TorchFunctionMode):
    """Skips the functions of torch.nn.init in this thread: even on meta they take a third of the time."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


# Cache for the last models, which are likely to be loaded again, such as those of a pipeline. Threads may load in
# parallel.
_known_dtypes: dict[tuple[type, str, torch.dtype], Mapping[str, torch.dtype]] = {}
_MOST_KNOWN = 8


def class_dtypes(model: Any, torch_dtype: torch.dtype) -> Mapping[str, torch.dtype]:
    """Return the dtypes that floating tensors of a model have when its class builds it in `torch_dtype`.

    The loaders of transformers and diffusers build models the same way. transformers' keeps the dtypes that a class
    chooses itself: an `A_log` in fp32, a position table in bf16. diffusers' casts what it loads, so that here only
    buffers that are in no checkpoint count. Empty for other models, which are loaded in one dtype, and for classes that
    cannot be built from a config alone.
    """
    if not _has_config(model):
        return {}
    try:
        key = (type(model), _config_text(model), torch_dtype)
    except Exception:  # a config may hold values that are not JSON
        key = None
    known = None if key is None else _known_dtypes.get(key)
    if known is not None:
        return known
    with _NoInitialization():
        twin = _twin(model, torch_dtype, torch.device("meta")) or _twin(model, torch_dtype, torch.device("cpu"))
    if twin is None:  # the class needs more than a config
        return {}
    tensors = [*twin.named_parameters(remove_duplicate=False), *twin.named_buffers(remove_duplicate=False)]
    loaded = twin.state_dict() if is_diffusers(model) else {}
    dtypes = {name: tensor.dtype for name, tensor in tensors if tensor.is_floating_point() and name not in loaded}
    if key is not None:
        if len(_known_dtypes) >= _MOST_KNOWN:
            _known_dtypes.clear()
        _known_dtypes[key] = dtypes
    return dtypes


def rebuilt_buffers(model: Any, torch_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Build a model of transformers or diffusers anew, without weights, for the buffers that are in no checkpoint.

    Returns:
        Its real buffers by name; empty for other models, and where a class cannot be built from its config alone.
    """
    if not _has_config(model):
        return {}
    twin = _twin(model, torch_dtype, torch.device("cpu"))
    return {} if twin is None else {name: buffer for name, buffer in twin.named_buffers() if not buffer.is_meta}


def _has_config(model: nn.Module) -> bool:
    return is_pretrained(model) or is_diffusers(model)


def _config_text(model: Any) -> str:
    return str(model.to_json_string() if is_diffusers(model) else model.config.to_json_string(use_diff=False))


def _twin(model: Any, torch_dtype: torch.dtype, device: torch.device) -> Any:
    """Build a model of the same class and config without weights; None if its class cannot be built so.

    Args:
        model: not changed.
        torch_dtype: the default dtype meanwhile.
        device: of its buffers; some classes compute with values, which on meta there are none of.
    """
    try:
        if is_diffusers(model):
            build, config = type(model).from_config, config_without_quantization(model)
        else:
            build, config = type(model), model.config
        with default_dtype(torch_dtype), device, init_empty_weights():
            return build(config)
    except Exception as error:  # a class may raise anything where it is built from a config alone
        logger.info("%s cannot be built from its config alone on %s: %s", type(model).__name__, device, error)
        return None
