"""Groups of weights at rest in host memory, as a load leaves them, made of layers that lie anywhere."""

import torch

from bigload.groups import Group
from bigload.host import HostGroup, parts_of


def at_rest(tensors, device):
    """Copy tensors into host memory, from which they are brought to a device."""
    store = HostGroup(parts_of(tensors), device)
    with torch.no_grad():
        for name, tensor in tensors.items():
            store.tensors[name].copy_(tensor)
    return store


def group_of(name, leaves, device):
    """Copy the weights of leaves into host memory."""
    tensors = {part: tensor for leaf in leaves for part, tensor in leaf.tensors().items()}
    return Group(name, tuple(leaves), at_rest(tensors, device))
