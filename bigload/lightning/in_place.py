"""Linear layers that are quantized where they are: the module stays the object that it is, with another class.

Their weight is quantized when they are converted or, if they have no values yet, when these are loaded. As the module
stays, so do lists, optimizers and wrappers that hold it. Later `load_state_dict` calls take plain values, which are
quantized, and the parts that a quantized layer saves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..config import BnbQuantizationConfig
from ..errors import CheckpointError, QuantizationError
from ..hardware.devices import on_cpu_unless_named
from ..pipeline.guards import guard
from ..planning.planned_tensors import quantized_format
from ..quantization.copied_layers import is_bound_to
from ..quantization.formats import FourBit, Plain
from ..quantization.layers import config_of_layer, load_4bit, make_layer
from ..quantization.quantized_weight import QuantizedWeight, row_scales
from ..quantization.quantizer import code_table, quantize


@dataclass
class Waiting:
    """What is known of a layer before its weight is quantized.

    Attributes:
        created_on: the device where it was built, if its weight is on meta since then.
        stored: the parts of a quantized weight that were loaded before the layer was converted, by name.
        refusal: the hook that lets it refuse to compute with what it holds instead of them.
        is_assigned: whether it holds the tensors of a caller's state_dict.
        path: its name, once it is converted and waits for its values.
        config: how its values will be quantized, from then on.
    """

    created_on: torch.device | None = None
    stored: dict[str, torch.Tensor] | None = None
    refusal: RemovableHandle | None = None
    is_assigned: bool = False
    path: str = ""
    config: BnbQuantizationConfig | None = None

    def forget_stored(self, layer: nn.Module) -> None:
        """Let the layer compute and save as its class does."""
        if self.stored is not None and self.refusal is not None:
            self.refusal.remove()
            self.stored = self.refusal = None
            vars(layer).pop("_save_to_state_dict", None)


def wait_for_conversion(layer: nn.Linear, created_on: torch.device | None) -> None:
    """Let a new layer take what is loaded before it is converted: into a weight on meta, too, and quantized parts."""
    vars(layer)["waiting"] = Waiting(created_on)
    vars(layer)["_load_from_state_dict"] = functools.partial(_load_unconverted, layer)


def _load_unconverted(
    layer: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any], *rest: Any
) -> None:
    _read_lazy(state_dict, prefix)
    if _is_quantized(state_dict, prefix):  # the layer becomes one that takes them when it is converted
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        layer.waiting.forget_stored(layer)
        layer.waiting.stored, layer.waiting.refusal = own, layer.register_forward_pre_hook(_refuse_unconverted)
        vars(layer)["_save_to_state_dict"] = functools.partial(_save_stored, layer)
        return
    layer.waiting.forget_stored(layer)
    layer.waiting.is_assigned |= any(parameter.is_meta for parameter in layer.parameters(recurse=False))
    _load_plain_values(layer, state_dict, prefix, local_metadata, *rest)


def _refuse_unconverted(layer: Any, args: Any) -> None:
    raise QuantizationError(
        f"{layer!r} was loaded quantized, and is not converted yet: call the plugin's convert_module(model), which "
        "Fabric's setup and Trainer do"
    )


def _save_stored(layer: Any, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    destination.update({prefix + name: value for name, value in layer.waiting.stored.items()})


def stay_plain(layer: nn.Linear) -> None:
    """Let a layer that is not quantized take plain values only, and into a weight on meta too."""
    vars(layer).pop("waiting", None)
    vars(layer)["_load_from_state_dict"] = functools.partial(_load_plain, layer)


def _load_plain(
    layer: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any], *rest: Any
) -> None:
    _read_lazy(state_dict, prefix)
    if _is_quantized(state_dict, prefix):
        rest[3].append(f"{f'{prefix}weight'!r} is quantized in the state_dict, but not in the model")
        return
    for name, parameter in layer._parameters.items():
        value = state_dict.get(prefix + name)
        if value is not None and parameter is not None and parameter.is_meta:
            state_dict[prefix + name] = value.to(parameter.dtype, copy=True)
    _load_plain_values(layer, state_dict, prefix, local_metadata, *rest)


def _load_plain_values(
    layer: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any], *rest: Any
) -> None:
    if any(parameter.is_meta for parameter in layer.parameters(recurse=False)):
        local_metadata = {**local_metadata, "assign_to_params_buffers": True}  # there is no memory to copy into
    type(layer)._load_from_state_dict(layer, state_dict, prefix, local_metadata, *rest)


def _is_quantized(state_dict: Mapping[str, Any], prefix: str) -> bool:
    value = state_dict.get(f"{prefix}weight")
    has_parts = any(key.startswith(f"{prefix}weight.") for key in state_dict)
    return has_parts or (value is not None and not value.is_floating_point())


def wait_for_values(layer: nn.Linear, path: str, config: BnbQuantizationConfig) -> None:
    """Let a layer on meta be quantized when its values are loaded, or made on the device that it is moved to.

    Args:
        layer: its weight is on meta, and nothing says on which device it will be.
        path: its name, for errors.
        config: how its values will be quantized.
    """
    vars(layer)["waiting"] = Waiting(path=path, config=config)
    vars(layer)["_load_from_state_dict"] = functools.partial(_load_converted, layer)
    vars(layer)["_apply"] = functools.partial(_move_converted, layer)


def _load_converted(
    layer: Any,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    _read_lazy(state_dict, prefix)
    rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
    value = state_dict.get(f"{prefix}weight")
    if value is None:
        type(layer)._load_from_state_dict(layer, state_dict, prefix, *rest)
        return
    errors = len(error_msgs)
    made = unfilled(layer, layer.waiting.path, layer.waiting.config, value.device)
    made._load_from_state_dict(state_dict, prefix, *rest)
    if len(error_msgs) == errors:
        become(layer, made)


def _move_converted(layer: Any, move: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    weight = layer._parameters["weight"]
    try:
        with torch.no_grad():
            moved = move(weight)
    except NotImplementedError:  # torch moves nothing from meta to a device
        device = move(torch.empty(0, dtype=weight.dtype, device="cpu")).device
        become(layer, unfilled(layer, layer.waiting.path, layer.waiting.config, device))
        return layer  # type: ignore[no-any-return]
    if moved.is_meta:
        return type(layer)._apply(layer, move, recurse)  # type: ignore[no-any-return]
    raise QuantizationError(
        f"{layer.waiting.path!r} will be quantized, so to_empty() cannot give it memory: load its values with "
        "load_state_dict(), or call to_empty(), and give it values, before it is converted"
    )


def quantized(layer: nn.Linear, path: str, config: BnbQuantizationConfig, device: torch.device) -> nn.Module:
    """Make the layer that a layer with values becomes.

    Args:
        layer: not changed.
        path: its name, for errors.
        config: how to quantize its weight; resolved.
        device: where its weight is quantized, and will be.

    Raises:
        QuantizationError: the weight has values that the format cannot represent.
    """
    fmt, weight = quantized_format(config), layer.weight.detach()
    if isinstance(fmt, Plain):
        return _made(layer, path, config, weight.to(device, fmt.dtype, copy=True), device)
    value = quantize(weight.to(device, config.load_dtype), fmt)
    _require_finite(value, path, config.mode)
    return _made(layer, path, config, value, device)


def unfilled(layer: nn.Linear, path: str, config: BnbQuantizationConfig, device: torch.device) -> nn.Module:
    """Make the layer that a layer without values becomes: it refuses to compute until its values are loaded.

    Args:
        layer: not changed.
        path: its name, for errors.
        config: how its values will be quantized; resolved.
        device: where its weight will be.
    """
    fmt, shape = quantized_format(config), (layer.out_features, layer.in_features)
    weight: Any = _unfilled_weight(fmt, shape, config.load_dtype, device)
    made: Any = _made(layer, path, config, weight, device)
    vars(made)["forward_when_loaded"] = made.forward
    made.forward = functools.partial(_refuse_to_compute, made)
    return made  # type: ignore[no-any-return]


def _unfilled_weight(fmt: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
    if isinstance(fmt, Plain):
        return torch.zeros(shape, dtype=fmt.dtype, device=device)
    parts = {name: torch.zeros(part.shape, dtype=part.dtype, device=device) for name, part in fmt.parts(shape).items()}
    if isinstance(fmt, FourBit):
        parts["quant_map"] = code_table(fmt.quant_type, device).clone()
    return QuantizedWeight.from_parts(fmt, shape, dtype, parts)


def _refuse_to_compute(layer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    raise QuantizationError(
        f"{layer.loaded_as or 'the model'!r} was built empty and its weight was never loaded: load a checkpoint that "
        "holds it, or build the model without empty_init=True"
    )


def _made(layer: Any, path: str, config: BnbQuantizationConfig, weight: Any, device: torch.device) -> nn.Module:
    shape = (layer.out_features, layer.in_features)
    # As for the CPU, whatever the device: its forwards compute on others too, and a model may be moved.
    new: Any = make_layer(layer, weight, shape, config, torch.device("cpu"), path)
    guard([new], are_trained=config.llm_int8_has_fp16_weight)
    for name in ("waiting", "_save_to_state_dict"):
        vars(new).pop(name, None)
    if "_apply" in vars(new) and vars(new)["_apply"] is vars(layer).get("_apply"):
        del vars(new)["_apply"]  # that of waiting
    vars(new)["_load_from_state_dict"] = functools.partial(load_values, new)
    bias = layer._parameters["bias"]
    if bias is not None:
        data = torch.zeros_like(bias, device=device) if bias.is_meta else bias.detach()
        data = data.to(device, config.load_dtype, copy=True)  # it may be that of a caller's state_dict
        new._parameters["bias"] = nn.Parameter(data, requires_grad=config.llm_int8_has_fp16_weight)
    return new  # type: ignore[no-any-return]


def become(layer: Any, made: Any) -> None:
    """Turn a layer into another one, in place. Parameters that are trained stay the same objects."""
    own = {name: value.func for name, value in vars(made).items() if is_bound_to(made, value)}
    parameters = made._parameters
    for name, old in layer._parameters.items():
        new = parameters[name]
        is_packed = name == "weight" and (hasattr(new, "quant_state") or not new.has_fp16_weights)
        if old is None or old.is_meta or is_packed:
            continue
        if name == "weight":
            old.__class__ = type(new)
            vars(old).update(vars(new))
        old.data = new.data
        old.requires_grad_(new.requires_grad and old.requires_grad)
        parameters[name] = old
    object.__setattr__(layer, "__dict__", dict(vars(made)))
    layer.__class__ = type(made)
    vars(layer).update({name: functools.partial(function, layer) for name, function in own.items()})
    if hasattr(layer.weight, "module"):
        layer.weight.module = layer
    hooks = layer._load_state_dict_pre_hooks  # torch keeps the module of each by a weak reference
    for key, hook in hooks.items():
        if hook.with_module:
            hooks[key] = type(hook)(hook.hook, layer)


def load_stored(made: Any, stored: dict[str, Any], path: str) -> None:
    """Load the parts of a quantized weight, which came before the layer was converted.

    Raises:
        CheckpointError: they do not fit the layer.
    """
    missing: list[str] = []
    unexpected: list[str] = []
    errors: list[str] = []
    made._load_from_state_dict(dict(stored), "", {}, True, missing, unexpected, errors)
    if missing or unexpected or errors:
        raise CheckpointError(
            f"{path!r}: the state_dict that was loaded holds its weight quantized, but not as this plugin's mode "
            f"needs it ({'; '.join([*errors, *map(repr, missing + unexpected)])}): use the mode that it was saved in"
        )


def _read_lazy(state_dict: dict[str, Any], prefix: str) -> None:
    """Read the values that Lightning's lazy load of a checkpoint has left in the file."""
    for key, value in state_dict.items():
        if key.startswith(prefix) and not isinstance(value, torch.Tensor) and hasattr(value, "contiguous"):
            state_dict[key] = value.contiguous()


@on_cpu_unless_named()
def load_values(
    layer: Any,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Load plain values, which are quantized, or what a quantized layer saves; the `_load_from_state_dict` of a layer.

    Values are copied, with `assign=True` too. What does not fit is an error, with `strict=False` too.
    """
    _read_lazy(state_dict, prefix)
    key, errors = f"{prefix}weight", len(error_msgs)
    value = state_dict.get(key)
    if value is not None:
        try:
            state_dict.update(_as_saved(layer, value, key, prefix, state_dict))
        except (ValueError, QuantizationError) as error:
            error_msgs.append(f"{key!r}: {error}")
            return
    rest = (dict(local_metadata, assign_to_params_buffers=False), strict, missing_keys, unexpected_keys, error_msgs)
    if hasattr(layer, "state"):
        _load_int8(layer, state_dict, prefix, *rest)
    else:
        load_4bit(layer, state_dict, prefix, *rest)
    if value is not None and len(error_msgs) == errors and "forward_when_loaded" in vars(layer):
        layer.forward = vars(layer).pop("forward_when_loaded")


def _as_saved(layer: Any, value: torch.Tensor, key: str, prefix: str, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the layer would save if it held these values, by its name; nothing if it is that already.

    Raises:
        ValueError: neither plain values of the layer's shape, nor what such a layer saves.
        QuantizationError: values that the format cannot represent.
    """
    has_parts = any(other.startswith(f"{key}.") for other in state_dict)
    shape, is_int8 = (layer.out_features, layer.in_features), hasattr(layer, "state")
    if is_int8 and layer.state.has_fp16_weights:
        _require_plain_values(value, shape, has_parts)
        return {}
    if is_int8 and value.dtype == torch.int8 and f"{prefix}SCB" in state_dict and tuple(value.shape) == shape:
        return {}
    if not is_int8 and has_parts:
        return {}
    _require_plain_values(value, shape, has_parts)
    config = BnbQuantizationConfig(**config_of_layer(layer), torch_dtype=layer.loaded_dtype)
    device = row_scales(layer).device if is_int8 else layer._parameters["weight"].quant_state.absmax.device
    with torch.no_grad():
        made = quantize(value.to(device, config.load_dtype), quantized_format(config))  # type: ignore[arg-type]
    _require_finite(made, layer.loaded_as, config.mode)
    if is_int8:
        return {key: made.data, f"{prefix}SCB": made.row_scales}
    parts = made.quant_state.as_dict(packed=True)
    return {key: made.data} | {f"{key}.{name}": part for name, part in parts.items()}


def _require_plain_values(value: torch.Tensor, shape: tuple[int, ...], has_parts: bool) -> None:
    if value.is_floating_point() and tuple(value.shape) == shape and not has_parts:
        return
    if value.is_floating_point() and not has_parts:
        raise ValueError(f"size mismatch: the state_dict has shape {tuple(value.shape)}, the layer {shape}")
    raise ValueError(
        f"the state_dict holds {value.dtype} of shape {tuple(value.shape)}, which is quantized in another way; the "
        f"layer takes plain values of shape {shape}, or what a layer of its own mode saves"
    )


def _load_int8(layer: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Load the rows and their scales; bitsandbytes refuses scales once the layer has run."""
    scales = state_dict.pop(f"{prefix}SCB", None)
    state_dict.pop(f"{prefix}weight_format", None)
    unexpected_keys = rest[3]
    type(layer)._load_from_state_dict(layer, state_dict, prefix, *rest)
    own = {f"{prefix}SCB", f"{prefix}weight_format"}
    unexpected_keys[:] = [key for key in unexpected_keys if key not in own]
    if scales is not None and not layer.state.has_fp16_weights:
        row_scales(layer).copy_(scales)


def _require_finite(value: QuantizedWeight, path: str, mode: str) -> None:
    largest = max(float(torch.linalg.vector_norm(scales, math.inf)) for scales in value.scales if scales.numel())
    if not math.isfinite(largest):
        raise QuantizationError(f"{path!r}: values that are not finite as {mode}")
