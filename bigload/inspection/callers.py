"""Who calls the modules of a model that is divided among devices, and where what they return is needed.

A block is called by a loop over blocks, which passes on what it returns: only inputs have to be moved. But a forward
also combines what its children return with one another, with its own parameters or, in the model itself, with labels.
Then these must be on one device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn


def called_at(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """List a module; in place of one without a forward, as a list of modules, what others call in it."""
    if _has_forward(module):
        yield path, module
    else:
        yield from called_in(path, module)


def called_in(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """List the children that a module may call, with their paths."""
    for name, child in module.named_children():
        yield from called_at(f"{path}.{name}".lstrip("."), child)


def owners_of_parameters(
    devices: Mapping[str, torch.device], modules: Mapping[str, nn.Module]
) -> dict[str, torch.device]:
    """Return the modules whose own parameters have a device, beside their children, with the device of the first.

    Args:
        devices: path of a module, or of a parameter -> its device.
        modules: of the model, by path.
    """
    found: dict[str, torch.device] = {}
    for path, device in devices.items():
        owner, _, name = path.rpartition(".")
        if path not in modules and owner in modules and modules[owner]._parameters.get(name) is not None:
            found.setdefault(owner, device)
    return found


def destinations(
    devices: Mapping[str, torch.device], modules: Mapping[str, nn.Module], main: torch.device
) -> dict[str, torch.device]:
    """Return the paths of modules whose outputs meet others in the forward that calls them, and the device for these.

    Args:
        devices: path of a module, or of a parameter -> its device, in the order of the model.
        modules: of the model, by path.
        main: the device that the inputs of the model are moved to.
    """
    found: dict[str, torch.device] = {}
    for path, module in modules.items():
        if _has_forward(module) and not isinstance(module, nn.Sequential):
            first, *others = _layers_before_blocks(path, module, devices) or [""]
            found |= {other: devices[first] for other in others if devices[other] != devices[first]}
    for path, device in owners_of_parameters(devices, modules).items():
        for child, _ in called_in(path, modules[path]):
            inside = (at for unit, at in devices.items() if f"{unit}.".startswith(f"{child}."))
            if any(at != device for at in inside):
                found[child] = device
    last = [*devices][-1]
    if last in modules[""]._modules and devices[last] != main:  # the model's output, which it compares with labels
        found[last] = main
    return found


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def _layers_before_blocks(path: str, module: nn.Module, devices: Mapping[str, torch.device]) -> list[str]:
    """List the children that are layers, such as embeddings of tokens and of positions, up to a list of modules."""
    layers = []
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            break
        inner = f"{path}.{name}".lstrip(".")
        if inner in devices and not child._modules:
            layers.append(inner)
    return layers
