"""Why a model, or a call of it, cannot be captured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..offload.captured import is_capturable as can_have
from ..offload.expert_forwards import ExpertsForward
from ..offload.forwards import CpuForward, ForwardOverride, StreamedForward, forward_override_of
from ..quantization.kernels.outliers import MAX_ROWS, is_on_gpu_alone
from .graphs import graphs_on
from .lookups import is_lookup

# Hooks that do nothing where all tensors are on one device, or nobody asks for what they collect.
_HARMLESS = ("bigload.", "transformers.utils.output_capturing")
_ASKED_FOR = ("output_attentions", "output_hidden_states", "output_router_logits")


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """List the tensors that a graph computes with where they are: not those that are copied or looked up for it."""
    away: set[int] = set()
    for module in model.modules():
        forward = forward_override_of(module)
        if isinstance(forward, StreamedForward):
            away |= {id(parameter) for parameter in forward.weights.parameters}
        elif is_lookup(module):
            away |= {id(parameter) for parameter in module.parameters()}
    yield from (tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in away)


def device_of(model: nn.Module) -> torch.device | None:
    """Return the device that all tensors of a model are on; None if there are several, or none."""
    devices = {tensor.device for tensor in _tensors(model)}
    return devices.pop() if len(devices) == 1 else None


def obstacle_of(model: nn.Module) -> str | None:
    """Say why no step of a model can be captured as it is now; None if nothing is known against it."""
    for path, module in model.named_modules():
        forward = forward_override_of(module)
        if forward is not None and not can_have(module) and not is_lookup(module):
            return f"{path or 'the model'!r} is offloaded, and {_reason_of(forward)}"
        hook = vars(module).get("_hf_hook")
        if hook is not None and getattr(hook, "offload", False):
            return f"{path or 'the model'!r} is offloaded by accelerate"
    devices = sorted({str(tensor.device) for tensor in _tensors(model)})
    if len(devices) > 1:
        return f"it is on several devices ({', '.join(devices)})"
    for path, state in _int8_with_outliers(model):
        if not devices or not is_on_gpu_alone(state, torch.device(devices[0])):
            return _waiting(path, state, "in each layer where Triton does not run")
    return _hook_in(model)


def obstacle_of_rows(model: nn.Module, rows: int) -> str | None:
    """Say why a step of so many sequences is not captured; None if nothing is known against it."""
    for path, state in _int8_with_outliers(model) if rows > MAX_ROWS else ():
        return _waiting(path, state, f"in steps of more than {MAX_ROWS} sequences")
    return None


def _int8_with_outliers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        state: Any = vars(module).get("state")
        if hasattr(state, "has_fp16_weights") and state.threshold > 0.0:
            yield path, state


def _waiting(path: str, state: Any, when: str) -> str:
    return (
        f"{path!r} is int8 with llm_int8_threshold={state.threshold:g}, for which the host waits {when}: load it with "
        "BnbQuantizationConfig(load_in_8bit=True, llm_int8_threshold=0.0)"
    )


def _hook_in(model: nn.Module) -> str | None:
    everywhere = nn.modules.module
    for hook in (*everywhere._global_forward_hooks.values(), *everywhere._global_forward_pre_hooks.values()):
        return f"a hook of all modules ({_name(hook)}) would not run"
    for path, module in model.named_modules():
        if not path:
            continue  # those of the model itself run around the step
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not _module_of(hook).startswith(_HARMLESS):
                return f"a hook of {path!r} ({_name(hook)}) would not run"
    return None


def _unwrapped(hook: Any) -> Any:
    while isinstance(hook, partial):
        hook = hook.func
    return hook


def _module_of(hook: Any) -> str:
    hook = _unwrapped(hook)
    return str(vars(type(hook)).get("__module__") if not hasattr(hook, "__qualname__") else hook.__module__)


def _name(hook: Any) -> str:
    hook = _unwrapped(hook)
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))


def _reason_of(forward: ForwardOverride) -> str:
    if isinstance(forward, CpuForward):
        return "the CPU computes it"
    if isinstance(forward, ExpertsForward) and forward.weights.cache() is not None:
        return "the host keeps the cache of its experts"
    return "no graph reads files or memory that is not pinned"


def is_capturable(model: nn.Module) -> bool:
    """Whether `generate` of a model on a GPU can have a static cache, and nothing is known against captured steps."""
    device = device_of(model)
    has_static = getattr(model, "_can_compile_fullgraph", False)  # which transformers asks of models with such caches
    return bool(has_static) and device is not None and graphs_on(device) is not None and obstacle_of(model) is None


def obstacle_now(model: nn.Module, kwargs: Mapping[str, Any]) -> str | None:
    """Say why a call is not captured, by what holds for it alone; None if nothing does."""
    if model.training:
        return "the model is in training mode: call model.eval()"
    if torch.is_grad_enabled():
        return "gradients are enabled: call it under torch.no_grad()"
    config = getattr(model, "config", None)
    for name in _ASKED_FOR:
        if kwargs.get(name, None) or (kwargs.get(name, None) is None and getattr(config, name, False)):
            return f"{name} is asked for"
    return None
