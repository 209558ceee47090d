"""Groups of weights at rest in host memory, as a load leaves them, made of layers that lie anywhere."""

import torch

from bigload.hardware.pinned import HostGroup
from bigload.offload.groups import Group
from bigload.offload.leaves import cells_of
from bigload.quantization.formats import Part


def parts_of(tensors):
    """Describe tensors as parts."""
    return {name: Part(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def tensors_of(leaves):
    """Give what is streamed of leaves, by name."""
    return {cell.name: cell.get() for leaf in leaves for cell in cells_of(leaf)}


def at_rest(tensors, device):
    """Copy tensors into host memory, from which they are brought to a device."""
    store = HostGroup(parts_of(tensors), device)
    with torch.no_grad():
        for name, tensor in tensors.items():
            store.tensors[name].copy_(tensor)
    return store


def group_of(name, leaves, device):
    """Copy the weights of leaves into host memory."""
    return Group(name, tuple(leaves), at_rest(tensors_of(leaves), device))
