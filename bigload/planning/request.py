"""The checked arguments of a load: the weights, their quantization, and their placement."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.checkpoint import Checkpoint, WeightsLocation, open_checkpoint
from ..checkpoint.foreign import foreign_error
from ..checkpoint.scaled.tensor import ScaledTensor
from ..checkpoint.stored_config import config_of
from ..config import BnbQuantizationConfig, as_config
from ..errors import ConfigError, PlacementError, counted, listed
from ..hardware.devices import CPU, Device, DeviceMap, Place, as_place, default_device, is_strategy
from ..io.ring import ring_bytes
from ..model.tensors import ModelTensor
from ..model.view import ModelView
from ..notation import parse_size
from .offload_config import OffloadConfig, as_offload_config
from .planned_tensors import PlannedTensor
from .sources import KeyMapping

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlacementRequest:
    """The arguments of a load that concern placement.

    Attributes:
        device_map: in any of the accepted forms.
        budgets: bytes by place, from `resolve_budgets`.
        no_split_module_classes: names of classes whose modules must stay whole on one device, or None.
        offload: how offloaded blocks are stored and computed.
        offload_folder: the folder for "disk"; without one, only blocks that the device map puts on "disk" go there.
        fp32_on_cpu: compute blocks that are placed on the CPU there, in float32, if a GPU is used too.
        reserve: bytes kept free on each GPU, which follow from `offload` and the model.
        host_ring: bytes of the host buffer that files are read through on their way to a GPU.
        may_offload: whether a strategy may offload weights; not so those that are trained themselves.
        must_exist: whether the devices must exist on this machine; not so for a plan that is not executed.
        warns: whether to warn of what is asked in vain; not where the same is placed a second time, in another way.
        select: given a view of the model and all of its tensors, returns those that this process loads, or its shares
            of them, where several load the model together; None for all.
    """

    device_map: DeviceMap = None
    budgets: Mapping[Place, int] = field(default_factory=dict)
    no_split_module_classes: Collection[str] | None = None
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    offload_folder: str | os.PathLike[str] | None = None
    fp32_on_cpu: bool = False
    reserve: int = 0
    host_ring: int = 0
    may_offload: bool = True
    must_exist: bool = True
    warns: bool = True
    select: Callable[[ModelView, list[PlannedTensor]], list[PlannedTensor]] | None = None


@dataclass(frozen=True)
class LoadRequest:
    """The arguments of a load, checked.

    Attributes:
        config: the quantization; by default that of a checkpoint which is quantized already.
        checkpoint: the source of the weights; None means the model's own.
        placement: the arguments that concern placement.
        as_saved: no config was passed for a checkpoint of `save_quantized_model`: restore the model that was saved.
        key_mapping, tied_parameters, quantizable, initialize_missing, strict: as for `load_and_quantize_model`.
    """

    config: BnbQuantizationConfig
    checkpoint: Checkpoint | None
    placement: PlacementRequest
    as_saved: bool = False
    key_mapping: KeyMapping | None = None
    tied_parameters: Sequence[tuple[str, str]] | None = None
    quantizable: Sequence[type[nn.Linear]] = ()
    initialize_missing: Sequence[str] = ()
    strict: bool = False

    @property
    def source(self) -> Path | None:
        """The folder of the checkpoint, if one was named."""
        return None if self.checkpoint is None else self.checkpoint.folder


def load_request(
    bnb_quantization_config: Any,
    weights_location: WeightsLocation | None,
    device_map: DeviceMap,
    no_split_module_classes: Sequence[str] | None = None,
    max_memory: Mapping[Device, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    offload: OffloadConfig | None = None,
    *,
    key_mapping: KeyMapping | None = None,
    tied_parameters: Sequence[tuple[str, str]] | None = None,
    quantizable: Sequence[type[nn.Linear]] = (),
    initialize_missing: Sequence[str] = (),
    strict: bool = False,
    must_exist: bool = True,
) -> LoadRequest:
    """Check the arguments of `load_and_quantize_model`, and read the headers of the checkpoint.

    Args:
        must_exist: whether the devices must exist on this machine, and the weights be real; not so for a plan that is
            not executed.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged or quantized in more than one way.
        ConfigError: an argument is invalid; the checkpoint is not quantized and no config is passed, or the config
            contradicts its quantization.
        PlacementError: `max_memory` holds an invalid device or size.
    """
    passed = None if bnb_quantization_config is None else as_config(bnb_quantization_config)
    checkpoint = None if weights_location is None else open_checkpoint(weights_location)
    as_saved = passed is None and checkpoint is not None and checkpoint.record is not None
    if checkpoint is not None and checkpoint.is_quantized:
        config = config_of(checkpoint, passed)
    elif as_saved and checkpoint is not None and checkpoint.record is not None:
        config = checkpoint.record.config
    else:
        foreign = None if passed is not None or checkpoint is None else foreign_error(checkpoint, checkpoint.tensors)
        if foreign is not None:
            raise foreign
        if passed is None and checkpoint is not None:
            _require_config(checkpoint)
        config = as_config(passed)
    placement = placement_request(
        config, device_map, no_split_module_classes, max_memory, offload_folder, offload, must_exist=must_exist
    )
    return LoadRequest(
        config,
        checkpoint,
        placement,
        as_saved,
        key_mapping,
        tied_parameters,
        quantizable,
        require_names("initialize_missing", initialize_missing),
        strict,
    )


def _require_config(checkpoint: Checkpoint) -> None:
    """Ask for a config where the weights are stored in fp8 or the like, which are not kept so."""
    kinds = list(dict.fromkeys(each.kind for each in checkpoint.tensors.values() if isinstance(each, ScaledTensor)))
    if kinds:
        raise ConfigError(
            f"'{checkpoint.location}' is stored as {'; '.join(kinds)}, which is not kept: pass what to load it as, "
            "'nf4', 'int8' or another mode, or 'none' for 16 bit"
        )


def require_names(argument: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return the names that an argument lists.

    Raises:
        ConfigError: it is no list of strings.
    """
    if isinstance(names, str) or not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{argument} must be a list of names, such as ['score'], but it is {names!r}")
    return tuple(names)


def placement_request(
    config: BnbQuantizationConfig,
    device_map: DeviceMap,
    no_split_module_classes: Sequence[str] | None = None,
    max_memory: Mapping[Device, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    offload: OffloadConfig | None = None,
    *,
    must_exist: bool = True,
) -> PlacementRequest:
    """Check the arguments that concern placement.

    Raises:
        ConfigError: `offload`, `offload_folder` or `no_split_module_classes` is invalid.
        PlacementError: `max_memory` is invalid.
    """
    if isinstance(no_split_module_classes, str) or not all(
        isinstance(name, str) for name in no_split_module_classes or ()
    ):
        raise ConfigError(
            f"no_split_module_classes must be a list of names of classes, but it is {no_split_module_classes!r}"
        )
    if offload_folder is not None and (not isinstance(offload_folder, (str, os.PathLike)) or not str(offload_folder)):
        raise ConfigError(f"offload_folder is {offload_folder!r}; expected the path of a folder, or None")
    offload = as_offload_config(offload)
    return PlacementRequest(
        device_map,
        resolve_budgets(max_memory, must_exist=must_exist),
        no_split_module_classes,
        offload,
        offload_folder,
        fp32_on_cpu=config.llm_int8_enable_fp32_cpu_offload or offload.execute == "cpu",
        host_ring=ring_bytes(),
        may_offload=not config.llm_int8_has_fp16_weight,
        must_exist=must_exist,
    )


def resolve_budgets(max_memory: Mapping[Device, int | str] | None, *, must_exist: bool = True) -> dict[Place, int]:
    """Convert `max_memory` to bytes by place.

    Args:
        max_memory: {device or "disk": bytes or "10GiB"}.
        must_exist: whether the devices must exist on this machine.

    Raises:
        PlacementError: an invalid device or size, or the same device twice.
    """
    if max_memory is not None and not isinstance(max_memory, Mapping):
        raise PlacementError(f"max_memory must be {{device: bytes or '10GiB'}}, but it is {max_memory!r}")
    sizes = {device: parse_size(size) for device, size in (max_memory or {}).items()}
    budgets: dict[Place, int] = {}
    for device, size in sizes.items():
        try:
            place = as_place(device, must_exist=must_exist)
        except PlacementError as error:
            raise PlacementError(f"max_memory: {error}") from error
        if place in budgets:
            raise PlacementError(f"max_memory names {place} twice; set one budget for each device")
        budgets[place] = size
    return budgets


def check_map(
    device_map: DeviceMap,
    tensors: Sequence[ModelTensor],
    module_names: Collection[str],
    *,
    must_exist: bool = True,
) -> None:
    """Check that a device map names existing devices and covers every tensor; warn of modules that do not exist.

    Raises:
        PlacementError: it names an unknown device, or leaves out a tensor.
    """
    if device_map is None or is_strategy(device_map):
        return
    if not isinstance(device_map, Mapping):
        as_place(device_map, must_exist=must_exist)
        return
    for path, place in device_map.items():
        try:
            as_place(place, must_exist=must_exist)
        except PlacementError as error:
            raise PlacementError(f"device_map[{path!r}]: {error}") from error
    names = {name for tensor in tensors for name in tensor.names}
    unknown = [path for path in device_map if path and path not in names and path not in module_names]
    if unknown:
        known = [path for path in (*module_names, *names) if path]
        close = [difflib.get_close_matches(path, known, 1, 0.8) for path in unknown[:10]]
        meant = listed(path for found in close for path in found)
        logger.warning(
            "device_map names %s, which the model does not have%s; ignored",
            listed(unknown),
            f" (did you mean {meant}?)" if meant else "",
        )
    if "" in device_map:
        return
    homeless = [tensor.name for tensor in tensors if longest_match(tensor.name, device_map) is None]
    if homeless:
        raise PlacementError(
            f"device_map leaves out {counted(len(homeless), 'tensor')}: {listed(homeless)}; add their blocks, or '' "
            "for the rest"
        )


def longest_match(name: str, paths: Collection[str]) -> str | None:
    """Return the longest of some paths that is a prefix of a tensor's name, in whole components."""
    path = name
    while path not in paths:
        if not path:
            return None
        path = path.rpartition(".")[0]
    return path


def only_device(request: PlacementRequest) -> torch.device | None:
    """Return the one device that the whole model goes to, or that a strategy may use; None if there are several."""
    device_map = request.device_map
    if is_strategy(device_map):
        devices = computing_devices(request.budgets)
        return devices[0] if len(devices) == 1 else None
    if device_map is None:
        return default_device()
    places = set(places_of(device_map, request).values())
    (place,) = places if len(places) == 1 else (None,)
    return None if place == "disk" else place


def places_of(device_map: Device | Mapping[str, Device], request: PlacementRequest) -> dict[str, Place]:
    """Return the place of each path of a device map; a single device is the place of "", the whole model.

    Raises:
        PlacementError: no such device.
    """
    by_path = device_map if isinstance(device_map, Mapping) else {"": device_map}
    return {path: as_place(place, must_exist=request.must_exist) for path, place in by_path.items()}


def computing_devices(budgets: Mapping[Place, int]) -> list[torch.device]:
    """Return the devices that compute: the GPUs in the budgets, all GPUs if they name no device, else the CPU."""
    named = [place for place in budgets if isinstance(place, torch.device)]
    gpus = sorted((place for place in named if place.type == "cuda"), key=lambda place: place.index)
    if gpus:
        return gpus
    if named or not torch.cuda.is_available():
        return [CPU]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
