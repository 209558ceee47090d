"""A quantized weight in bitsandbytes' representation, and its parts by their names in `formats`."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..hardware.devices import on_cpu_unless_named
from ..model.empty import default_dtype
from .bnb import library
from .formats import NESTED_BLOCKSIZE, FourBit, Int8

_SCALES = "row_scales"  # the attribute of an Int8Params that keeps its scales for layers that share it


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A quantized weight in bitsandbytes' representation.

    Attributes:
        data: the packed 4-bit values, (n, 1), in quant_storage; or the int8 rows, (out_features, in_features).
        quant_state: of a 4-bit weight, its `bitsandbytes.functional.QuantState`.
        row_scales: of an int8 weight, its SCB, (out_features,), fp32.
    """

    data: torch.Tensor
    quant_state: Any = None
    row_scales: torch.Tensor | None = None

    @classmethod
    def from_parts(
        cls, fmt: FourBit | Int8, shape: tuple[int, ...], dtype: torch.dtype, parts: Mapping[str, torch.Tensor]
    ) -> QuantizedWeight:
        """Make a weight of its parts, without copying them.

        Args:
            fmt: its format.
            shape: (out_features, in_features).
            dtype: what it is dequantized to.
            parts: by name, all on one device.
        """
        if isinstance(fmt, Int8):
            return cls(parts["weight"], row_scales=parts["SCB"])
        make, nested = library().functional.QuantState, {}
        if fmt.double_quant:
            nested["offset"] = parts["nested_offset"]
            nested["state2"] = make(
                absmax=parts["nested_absmax"],
                code=parts["nested_quant_map"],
                blocksize=NESTED_BLOCKSIZE,
                dtype=torch.float32,
            )
        state = make(
            absmax=parts["absmax"],
            shape=torch.Size(shape),
            code=parts["quant_map"],
            blocksize=fmt.blocksize,
            quant_type=fmt.quant_type,
            dtype=dtype,
            **nested,
        )
        return cls(parts["weight"], quant_state=state)

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """Its parts, by name."""
        if self.row_scales is not None:
            return {"weight": self.data, "SCB": self.row_scales}
        held = state_holders(self.quant_state)
        return {"weight": self.data, **{part: getattr(*holder) for part, holder in held.items()}}

    @property
    def scales(self) -> list[torch.Tensor]:
        """The floating parts that are not finite if any value was not finite."""
        if self.row_scales is not None:
            return [self.row_scales]
        state = self.quant_state
        return [state.offset, state.state2.absmax] if state.nested else [state.absmax]


def state_holders(state: Any) -> dict[str, tuple[Any, str]]:
    """Return the object, and the name of its attribute, that holds each part of a QuantState, by the part's name."""
    held = {"absmax": (state, "absmax"), "quant_map": (state, "code")}
    if state.nested:
        held["nested_offset"] = (state, "offset")
        held["nested_absmax"] = (state.state2, "absmax")
        held["nested_quant_map"] = (state.state2, "code")
    return held


def state_around(state: Any, parts: Mapping[str, torch.Tensor]) -> Any:
    """Return a copy of a QuantState with other parts, given by name."""
    made = copy.copy(state)
    if state.nested:
        made.state2 = copy.copy(state.state2)
    for part, (holder, attribute) in state_holders(made).items():
        setattr(holder, attribute, parts[part])
    return made


def row_scales(layer: Any) -> Any:
    """Return the SCB of an int8 layer, which bitsandbytes moves from the weight to the state in the first forward."""
    if layer.weight.SCB is not None:
        return layer.weight.SCB
    return getattr(layer.weight, _SCALES, None) if layer.state.SCB is None else layer.state.SCB


def keep_row_scales(layer: Any) -> None:
    """Let an int8 layer keep its scales where bitsandbytes loses them.

    If its weight was exchanged by what `weight.to()` returns, as PEFT's DoRA does, bitsandbytes would take the scales
    of the new weight, which has none. And the first of several layers that share a weight takes the scales off it; the
    others would quantize its int8 rows once more, as if they were values.
    """
    weight = layer._parameters.get("weight")
    if getattr(weight, "CB", None) is not None:
        if weight.SCB is None:
            weight.SCB = layer.state.SCB
        setattr(weight, _SCALES, weight.SCB)
    elif layer.state.CB is None and hasattr(weight, _SCALES):
        layer.state.CB, layer.state.SCB = weight.data, getattr(weight, _SCALES)


def move_shared_scales(weight: Any) -> None:
    """Move the scales that a weight keeps for layers that share it to where the weight is now."""
    scales = getattr(weight, _SCALES, None)
    if scales is not None and scales.device != weight.device:
        setattr(weight, _SCALES, scales.to(weight.device))


def load_packed(
    module: Any,
    names: Iterable[str],
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Load a module's state with the parts of its 4-bit weights: packed bytes mean nothing without their scales.

    Values are copied, with `assign=True` too: the parameter holds more than a tensor. Of a weight that is refused
    nothing is written.

    Args:
        module: whose class's `_load_from_state_dict` loads the rest.
        names: of its 4-bit parameters.
        state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs: as torch gives them to
            `_load_from_state_dict`.
    """
    read, states = set(), {}
    for name in names:
        full = prefix + name
        parts = {key[len(full) + 1 :]: key for key in state_dict if key.startswith(f"{full}.")}
        read |= set(parts.values())
        if full not in state_dict and not parts:
            continue
        try:
            states[name] = _state_of(
                module._parameters[name],
                state_dict.get(full),
                {part: state_dict[key] for part, key in parts.items()},
            )
        except ValueError as error:
            error_msgs.append(f"{full!r} is in 4 bit, and {error}")
            state_dict.pop(full, None)
            read.add(full)
    copying = {**local_metadata, "assign_to_params_buffers": False}
    own = type(module)._load_from_state_dict  # calls the hooks before it copies
    absent: list[str] = []
    own(module, state_dict, prefix, copying, strict, absent, unexpected_keys, error_msgs)
    missing_keys += [key for key in absent if key not in read]
    unexpected_keys[:] = [key for key in unexpected_keys if key not in read]
    for name, state in states.items():
        parameter = module._parameters[name]
        holders = state_holders(parameter.quant_state)
        for part, holder in state_holders(state).items():
            getattr(*holders[part]).copy_(getattr(*holder))


def load_rows(
    layer: Any,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Load an int8 layer's state, rows and scales; bitsandbytes would cast any values to int8, without their scales.

    Nor does it take the scales of a layer that has run, which then holds its own elsewhere.

    Args:
        layer: of bitsandbytes.
        state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs: as torch gives them to
            `_load_from_state_dict`.
    """
    weight: Any = layer._parameters.get("weight")
    held = row_scales(layer) if hasattr(weight, "SCB") else None
    rows, scales = state_dict.get(f"{prefix}weight"), state_dict.get(f"{prefix}SCB")
    if held is not None and (rows is not None or scales is not None) and not _are_rows(rows, scales, weight, held):
        found = [None if part is None else (part.dtype, tuple(part.shape)) for part in (rows, scales)]
        error_msgs.append(
            f"{prefix}weight is in int8, and the state_dict holds {found[0]} with the scales {found[1]}, instead of "
            f"rows {tuple(weight.shape)} in int8 with a scale for each: load all that the state_dict of such a model "
            "holds"
        )
        for key in ("weight", "SCB", "weight_format"):
            state_dict.pop(f"{prefix}{key}", None)
    shown = getattr(weight, "SCB", None)
    if held is not None:
        weight.SCB = held
    absent: list[str] = []
    copying = {**local_metadata, "assign_to_params_buffers": False}
    own = type(layer)._load_from_state_dict
    own(layer, state_dict, prefix, copying, strict, absent, unexpected_keys, error_msgs)
    if held is not None:
        weight.SCB = shown
    missing_keys += absent if rows is None and scales is None else []  # else they are loaded, or refused


def _are_rows(rows: Any, scales: Any, weight: torch.Tensor, held: torch.Tensor) -> bool:
    parts = ((rows, weight), (scales, held))
    return all(part is not None and (part.dtype, part.shape) == (own.dtype, own.shape) for part, own in parts)


def _state_of(parameter: Any, weight: Any, parts: Mapping[str, torch.Tensor]) -> Any:
    """Return the QuantState of a packed weight and its parts in a state_dict.

    Raises:
        ValueError: with the reason why a parameter cannot take them.
    """
    state = getattr(parameter, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        raise ValueError("its weight was replaced, or packed by bitsandbytes for this CPU: load the model again")
    if weight is None or not parts:
        lacking = "its packed bytes" if weight is None else "the scales of its packed bytes"
        raise ValueError(f"the state_dict lacks {lacking}: load all that the state_dict of such a model holds of it")
    try:
        with on_cpu_unless_named(), default_dtype(torch.float32):  # it makes a tensor of the offset
            new = library().functional.QuantState.from_dict(dict(parts), device=state.absmax.device)
    except Exception as error:
        raise ValueError(f"its quant_state in the state_dict cannot be read: {error}") from error
    kinds = [(tuple(one.shape), one.quant_type, one.blocksize, bool(one.nested)) for one in (state, new)]
    packed = [(tensor.dtype, tuple(tensor.shape)) for tensor in (parameter, weight)]
    if kinds[0] != kinds[1] or packed[0] != packed[1]:
        raise ValueError(
            f"the state_dict holds {kinds[1]} packed as {packed[1]} where {kinds[0]} packed as {packed[0]} is needed"
        )
    return new
