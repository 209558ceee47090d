"""Tensors that lie in the memory of a slot, of which autograd and callers must keep none."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only


class SlotView(NamedTuple):
    """The place in a group's memory of a tensor that autograd would have kept."""

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def view_in(self, memory: torch.Tensor) -> torch.Tensor:
        """Return the tensor in the memory, (n,), uint8, of a slot that holds the group."""
        return memory.view(self.dtype).as_strided(self.shape, self.stride, self.offset)


def as_slot_view(memory: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor | SlotView:
    """Return the place of a tensor in a slot's memory; the tensor itself if it lies elsewhere."""
    if not _lies_in(tensor, memory):
        return tensor
    return SlotView(tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def _lies_in(tensor: torch.Tensor, memory: torch.Tensor) -> bool:
    if tensor.layout is not torch.strided:
        return False
    return tensor.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()


def copied_out_of_slot(out: Any, memory: torch.Tensor) -> Any:
    """Clone the outputs of a module that are views of its weights, which the next group will overwrite."""

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone() if _lies_in(tensor, memory) else tensor

    return copied(out) if isinstance(out, torch.Tensor) else tree_map_only(torch.Tensor, copied, out)
