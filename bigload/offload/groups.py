"""Groups: the layers whose weights come to the device together, and which of their tensors do."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from ..errors import OffloadError
from ..hardware.pinned import Store
from ..model.tree import leaves, modules_by_path
from .leaves import Cell, Leaf, cells_of


@dataclass(frozen=True, eq=False)
class Group:
    """Leaves whose weights come to the device together.

    Attributes:
        name: of the group, such as the path of a decoder layer.
        leaves: its modules.
        store: where the weights rest; its parts are named as the cells of its leaves.
    """

    name: str
    leaves: tuple[Leaf, ...]
    store: Store


def cells_by_leaf(group: Group) -> dict[Leaf, list[Cell]]:
    """List the cells of each leaf, one and the same for a tensor that several leaves share.

    Raises:
        OffloadError: the store lacks one.
    """
    known: dict[tuple[int, str], Cell] = {}
    found: dict[Leaf, list[Cell]] = {}
    modules: set[nn.Module] = set()
    for leaf in group.leaves:
        if leaf.module in modules:
            raise OffloadError(f"{leaf.path!r} is twice in the group {group.name!r}")
        modules.add(leaf.module)
        found[leaf] = [known.setdefault(cell.identity, cell) for cell in cells_of(leaf)]
    for cell in known.values():
        part = group.store.layout.parts.get(cell.name)
        there = cell.get()
        if part is None or (part.dtype, part.shape) != (there.dtype, tuple(there.shape)):
            raise OffloadError(f"{cell.name!r} is {there.dtype} {tuple(there.shape)}, its store holds {part}")
    return found


def require_owned(model: nn.Module, cells: dict[Group, dict[Leaf, list[Cell]]], embeddings: Collection[Leaf]) -> None:
    """Refuse weights that a module reads which is not given them.

    Raises:
        OffloadError: one is in two groups, or held by a module that is in none.
    """
    group_of: dict[int, Group] = {}
    allowed = {module for leaf in embeddings for module in leaf.module.modules()}
    for group, by_leaf in cells.items():
        for leaf, own in by_leaf.items():
            allowed.update(leaf.module.modules())
            for cell in own:
                if cell.parameter is not None and group_of.setdefault(id(cell.parameter), group) is not group:
                    raise OffloadError(f"{cell.name!r} is in two groups; weights that are tied must be in one")
    modules = modules_by_path(model)
    for name, parameter in leaves(modules, "_parameters").items():
        if id(parameter) in group_of and modules[name.rpartition(".")[0]] not in allowed:
            raise OffloadError(f"{name!r} is streamed for another module, and this one would not find it on the device")
