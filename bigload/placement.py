"""The Plan: for each tensor of the model its sources, its format and its home. Pure; touches no device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from . import formats, hf
from .config import BnbQuantizationConfig
from .errors import CheckpointError, ConfigError, PlacementError, counted, listed
from .formats import Format, FourBit, Int8, Plain
from .keys import Source
from .memory import parse_size
from .modules import ModelTensor, matches
from .prequantized import QuantizedTensor

Device = int | str | torch.device
DeviceMap = Device | Mapping[str, Device] | None

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True, eq=False)
class PlannedTensor:
    """One tensor of the model: what it is made from, what it becomes, and where.

    Attributes:
        tensor: the model's tensor.
        shape: as the format sees it; a Conv1D weight that is quantized is (out_features, in_features) here.
        sources: the pieces that fill it, none for a real buffer that stays as it is.
        format: what it is held in.
        device: its home.
    """

    tensor: ModelTensor
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    format: Format
    device: torch.device

    @property
    def nbytes(self) -> int:
        """Bytes in its home."""
        return formats.nbytes(self.format, self.shape)


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that a load will do.

    Attributes:
        tensors: one entry for each tensor of the model, tied ones once.
        layers: the layers that are replaced by bitsandbytes' own, by path.
        device_map: block path -> the device that computes it.
        config: the config, with every "auto" resolved.
    """

    tensors: tuple[PlannedTensor, ...]
    layers: Mapping[str, nn.Module]
    device_map: Mapping[str, torch.device]
    config: BnbQuantizationConfig

    @cached_property
    def source_bytes(self) -> int:
        """Bytes that will be read, each once."""
        return sum(source.tensor.nbytes for planned in self.tensors for source in planned.sources)

    @cached_property
    def device_bytes(self) -> dict[torch.device, int]:
        """Bytes of the loaded model on each device, before the allocator's rounding."""
        total: dict[torch.device, int] = defaultdict(int)
        for planned in self.tensors:
            total[planned.device] += planned.nbytes
        return dict(total)


def make_plan(
    model: nn.Module,
    config: BnbQuantizationConfig,
    tensors: Sequence[ModelTensor],
    layers: Mapping[str, nn.Module],
    sources: Mapping[str, tuple[Source, ...]],
    device_map: Mapping[str, torch.device],
    class_dtypes: Mapping[str, torch.dtype] | None = None,
) -> Plan:
    """Give every tensor of the model its format and home.

    Args:
        model: read for the dtypes its class insists on.
        config: resolved, without "auto".
        tensors: the model's tensors.
        layers: the layers to quantize, by path.
        sources: where each tensor comes from, by its first name.
        device_map: checked, from `resolve_device_map`.
        class_dtypes: the dtype that each tensor's class builds it in, where the class says.

    Raises:
        CheckpointError: a weight that is stored quantized has another shape than the layer's.
        ConfigError: a weight cannot be held in the format asked for.
    """
    fp32 = [*(config.keep_in_fp32_modules or ()), *hf.fp32_patterns(model, config.landing_dtype)]
    weights = {f"{path}.weight".lstrip("."): layer for path, layer in layers.items()}
    planned = []
    for tensor in tensors:
        pieces = sources.get(tensor.name, ())
        device = device_of(tensor.name, device_map)
        layer = next((weights[name] for name in tensor.names if name in weights), None)
        if layer is None:
            usual = (class_dtypes or {}).get(tensor.name, config.landing_dtype)
            fmt: Format = Plain(_kept_dtype(tensor, pieces, usual, fp32))
            shape = tensor.shape
        else:
            shape = tensor.shape[::-1] if hf.is_conv1d(layer) else tensor.shape
            stored = pieces[0].tensor
            if isinstance(stored, QuantizedTensor):
                fmt = stored.format
                _require_shape(stored, shape)
            else:
                fmt = _quantized_format(config)
                pieces = tuple(source.mirrored() for source in pieces) if hf.is_conv1d(layer) else pieces
                _require_divisible(fmt, shape, tensor.name)
        planned.append(PlannedTensor(tensor, shape, pieces, fmt, device))
    return Plan(tuple(planned), layers, device_map, config)


def _kept_dtype(
    tensor: ModelTensor, sources: Sequence[Source], usual: torch.dtype, fp32: Collection[str]
) -> torch.dtype:
    if not tensor.persistent and sources:
        return sources[0].tensor.dtype  # made again by its class, in the dtype that it chose
    if not tensor.value.is_floating_point() or not sources:
        return tensor.value.dtype  # integers, and buffers that the model computed itself
    return torch.float32 if any(matches(name, fp32) for name in tensor.names) else usual


def _quantized_format(config: BnbQuantizationConfig) -> Format:
    if config.mode == "int8-training":
        return Plain(config.landing_dtype if config.landing_dtype.itemsize == 2 else torch.float16)
    if config.load_in_8bit:
        return Int8()
    assert isinstance(config.bnb_4bit_quant_storage, torch.dtype)
    return FourBit(
        config.bnb_4bit_quant_type,
        config.bnb_4bit_blocksize,
        config.bnb_4bit_use_double_quant,
        config.bnb_4bit_quant_storage,
    )


def _require_shape(stored: QuantizedTensor, shape: tuple[int, ...]) -> None:
    if stored.shape != shape:
        raise CheckpointError(
            f"'{stored.name}' has shape {stored.shape} in '{stored.file.name}', the model expects {shape}: build the "
            "model from this checkpoint's config",
            mismatched_shapes={stored.name: (stored.shape, shape)},
        )


def _require_divisible(fmt: Format, shape: tuple[int, ...], name: str) -> None:
    try:
        fmt.parts(shape)
    except ValueError as error:
        raise ConfigError(
            f"'{name}' of shape {shape} cannot be stored as asked: {error}; use bnb_4bit_quant_storage='uint8' or add "
            f"'{name.removesuffix('.weight')}' to skip_modules"
        ) from error


def as_device(device: Device) -> torch.device:
    """Take a device in any spelling and check that it exists: 0, "cuda", "cuda:0", "cpu", a `torch.device`.

    Raises:
        PlacementError: not a device, not one of this machine, or one that bigload does not run on.
    """
    try:
        parsed = torch.device(f"cuda:{device}" if isinstance(device, int) or str(device).isdigit() else device)
    except (RuntimeError, TypeError) as error:
        raise PlacementError(
            f"{device!r} is not a device; expected 'cpu', a GPU's number, or 'cuda:N' (or, as a whole "
            "device_map, 'auto' or a dict of block path: device)"
        ) from error
    if parsed.type == "cpu":
        return torch.device("cpu")
    if parsed.type != "cuda":
        raise PlacementError(f"device '{parsed}' is of a kind bigload does not load onto; use 'cpu' or 'cuda:N'")
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if parsed.index is None and count else parsed.index or 0
    if index >= count:
        have = f"{count} CUDA device(s), 0 to {count - 1}" if count else "no CUDA device"
        raise PlacementError(f"device '{parsed}' does not exist: this machine has {have}")
    return torch.device("cuda", index)


def default_device() -> torch.device:
    """Give the current GPU, or the CPU where there is none."""
    return as_device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def named_devices(device_map: DeviceMap) -> list[torch.device]:
    """List the devices that a device map names, in its order.

    Raises:
        PlacementError: one of them does not exist.
    """
    if device_map is None or device_map in STRATEGIES:
        return [default_device()]
    named = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    return [as_device(device) for device in named if device != "disk"]


def resolve_device_map(
    device_map: DeviceMap, tensors: Sequence[ModelTensor], module_names: Collection[str]
) -> dict[str, torch.device]:
    """Turn a device map in any spelling into {block path: device}, with everything covered.

    Args:
        device_map: None (the current GPU, or the CPU), a device, a strategy ("auto", "balanced", "balanced_low_0",
            "sequential": one device, in this version), or {block path: device}, "" being the whole model.
        tensors: all that must be placed.
        module_names: the paths that a block may have.

    Raises:
        PlacementError: unknown blocks or devices, tensors left out, or places that this version does not run.
    """
    if device_map is None or device_map in STRATEGIES:
        return {"": default_device()}
    if not isinstance(device_map, Mapping):
        if isinstance(device_map, str) and device_map == "disk":
            raise _not_yet({"": "disk"})
        return {"": as_device(device_map)}
    offloaded = {path: str(device) for path, device in device_map.items() if device == "disk"}
    if offloaded:
        raise _not_yet(offloaded)
    devices = {path: as_device(device) for path, device in device_map.items()}
    names = {name for tensor in tensors for name in tensor.names}
    unknown = [path for path in devices if path and path not in names and path not in module_names]
    if unknown:
        raise PlacementError(f"device_map names {listed(unknown)}, which are no modules or parameters of the model")
    homeless = [tensor.name for tensor in tensors if _longest_match(tensor.name, devices) is None]
    if homeless:
        raise PlacementError(
            f"device_map leaves out {counted(len(homeless), 'tensor')}: {listed(homeless)}; add their blocks, or '' "
            "for the rest"
        )
    used = set(devices.values())
    if len(used) > 1 and torch.device("cpu") in used:
        raise _not_yet({path: "cpu" for path, device in devices.items() if device.type == "cpu"})
    if len(used) > 1:
        raise PlacementError(
            f"device_map spreads the model over {listed(sorted(map(str, used)))}; this version computes on one device"
        )
    return devices


def _not_yet(offloaded: Mapping[str, str]) -> PlacementError:
    places = ", ".join(f"'{path}': '{device}'" for path, device in list(offloaded.items())[:5])
    return PlacementError(
        f"device_map puts blocks off the GPU ({places}); this version does not offload: place them on the GPU, or the "
        "whole model on the CPU"
    )


def device_of(name: str, device_map: Mapping[str, torch.device]) -> torch.device:
    """Find a tensor's device: that of the longest path in the map which leads to it."""
    path = _longest_match(name, device_map)
    assert path is not None, name
    return device_map[path]


def _longest_match(name: str, device_map: Collection[str]) -> str | None:
    path = name
    while path not in device_map:
        if not path:
            return None
        path = path.rpartition(".")[0]
    return path


def resolve_budgets(max_memory: Mapping[Device, int | str] | None) -> dict[torch.device, int]:
    """Take the caller's `max_memory`: {device in any spelling: bytes in any spelling}; "disk" bounds nothing here.

    Raises:
        PlacementError: no such device, or not a size.
    """
    if max_memory is not None and not isinstance(max_memory, Mapping):
        raise PlacementError(f"max_memory must be {{device: bytes or '10GiB'}}, but it is {max_memory!r}")
    budgets = {device: parse_size(size) for device, size in (max_memory or {}).items()}
    try:
        return {as_device(device): size for device, size in budgets.items() if device != "disk"}
    except PlacementError as error:
        raise PlacementError(f"max_memory: {error}") from error
