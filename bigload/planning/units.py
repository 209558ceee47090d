"""Splits a model into units that are placed whole: its repeated blocks, and the modules outside them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import nn

from ..errors import listed
from ..hardware.interrupts import interruptible
from ..model import transformers_facts
from ..model.view import ModelView
from ..quantization.formats import FourBit, Plain
from ..quantization.packed_experts import cache_layout
from .planned_tensors import PlannedTensor

logger = logging.getLogger(__name__)

# torch's CUDA allocator rounds tensors up to GPU_BYTES; the parts of a streamed group are aligned to GROUP_BYTES.
GPU_BYTES = 512
GROUP_BYTES = 256
# Smaller tensors (norms, biases, tables) stay on the device that computes when their unit is offloaded.
RESIDENT_BYTES = 2**20


@dataclass(frozen=True, eq=False)
class Unit:
    """A part of a model that is placed whole.

    Attributes:
        paths: of its modules or parameters; several only if they share a tied weight.
        is_block: whether it is one of the model's repeated blocks.
        tensors: all of its tensors.
        offloaded: the tensors that leave the device when the unit is offloaded.
        is_embedding: whether it is an embedding: when offloaded, its lookup runs where the weight is stored, and the
            weight is never copied to the device.
    """

    paths: tuple[str, ...]
    is_block: bool
    tensors: tuple[PlannedTensor, ...] = field(repr=False)
    offloaded: tuple[PlannedTensor, ...] = field(repr=False)
    is_embedding: bool

    @property
    def name(self) -> str:
        """The first of its paths; "" for a whole model."""
        return self.paths[0]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of its tensors, not rounded."""
        return sum(planned.nbytes for planned in self.tensors)

    @cached_property
    def gpu_bytes(self) -> int:
        """Bytes on a GPU that holds all of it."""
        return bytes_of(self.tensors, GPU_BYTES)

    @cached_property
    def staying_bytes(self) -> int:
        """Bytes that stay on the GPU when it is offloaded."""
        away = set(map(id, self.offloaded))
        return bytes_of([planned for planned in self.tensors if id(planned) not in away], GPU_BYTES)

    @cached_property
    def group_bytes(self) -> int:
        """Bytes in host memory or on the disk when it is offloaded."""
        return bytes_of(self.offloaded, GROUP_BYTES)

    @property
    def streamed_bytes(self) -> int:
        """Bytes copied to the device for each forward when it is offloaded."""
        return 0 if self.is_embedding else self.group_bytes

    @cached_property
    def fp32_bytes(self) -> int:
        """Bytes when the CPU computes it in float32."""
        return bytes_of([planned.on_cpu() for planned in self.tensors])

    @cached_property
    def fused(self) -> dict[str, dict[str, PlannedTensor]]:
        """Path of a module of fused experts in 4 bit that leave when it is offloaded -> its two weights, by name."""
        found: dict[str, dict[str, PlannedTensor]] = {}
        for planned in self.offloaded:
            if isinstance(planned.format, FourBit) and len(planned.shape) == 3:
                path, _, name = planned.tensor.name.rpartition(".")
                found.setdefault(path, {})[name] = planned
        return {path: weights for path, weights in found.items() if len(weights) == 2}

    @cached_property
    def experts(self) -> list[tuple[int, int]]:
        """For each of its modules of fused experts, how many there are, and the bytes of one with its scales."""
        found = []
        for weights in self.fused.values():
            number, total = next(iter(weights.values())).shape[0], 0
            for planned in weights.values():
                parts = planned.format.parts(planned.shape)
                total += (parts["weight"].nbytes + parts["absmax"].nbytes) // number
            found.append((number, total))
        return found

    @property
    def can_stay_with_cpu(self) -> bool:
        """Whether the CPU can compute its fused experts: nothing but biases of theirs stays on the device."""
        own = [name for planned in self.tensors for name in planned.tensor.names]
        ends = tuple(
            f".{weight}{end}" for weights in self.fused.values() for weight in weights for end in ("", "_bias")
        )
        inside = [name for name in own if any(name.startswith(f"{path}.") for path in self.fused)]
        return bool(self.fused) and all(name.endswith(ends) for name in inside)

    @property
    def most_experts(self) -> int:
        """How many experts the largest of its modules of fused experts has."""
        return max((planned.shape[0] for weights in self.fused.values() for planned in weights.values()), default=0)

    @cached_property
    def is_by_expert(self) -> bool:
        """Whether nothing but fused experts leaves, so that they are copied to the device one by one."""
        return bool(self.fused) and len(self.offloaded) == sum(map(len, self.fused.values()))

    def by_expert(self) -> Unit:
        """Return the unit with nothing but the weights of fused experts offloaded."""
        return replace(self, offloaded=tuple(p for weights in self.fused.values() for p in weights.values()))

    def cache_bytes(self, cached: int, multiple: int = GPU_BYTES) -> int:
        """Return the bytes on the device of so many experts of each of its modules of fused experts, 0 for none."""
        if not cached:
            return 0
        total = 0
        for weights in self.fused.values():
            own = {name: (planned.format, planned.shape) for name, planned in weights.items()}
            layout = cache_layout(own, min(cached, *(shape[0] for _, shape in own.values())))  # type: ignore[arg-type]
            total += -(-layout.nbytes // multiple) * multiple
        return total

    @property
    def has_parameters(self) -> bool:
        """Whether it holds parameters, not only buffers."""
        return any(planned.tensor.is_parameter for planned in self.tensors)


def bytes_of(tensors: Sequence[PlannedTensor], multiple: int = 1) -> int:
    """Return the bytes of tensors, with each of their parts rounded up to a multiple."""
    return sum(planned.rounded_bytes(multiple) for planned in interruptible(tensors))


def units_of(
    view: ModelView,
    tensors: Sequence[PlannedTensor],
    no_split_module_classes: Collection[str] | None = None,
    *,
    warns: bool = True,
) -> list[Unit]:
    """Split a model into units, in the order of its modules.

    A module stays whole if it is a block, if its children hold no tensors, or if it reads a child's weight without
    calling the child's forward.

    Args:
        view: of the model.
        tensors: all of the model's, with their formats.
        no_split_module_classes: names of the classes of blocks; by default the model's own `_no_split_modules`, else
            the classes in its largest list of modules.
        warns: whether to warn of names that no class of the model has.
    """
    by_name = {name: planned for planned in tensors for name in planned.tensor.names}
    if no_split_module_classes is None:
        blocks = transformers_facts.no_split_classes([view.model, *view.pretrained]) or _repeated_classes(
            view.modules, by_name
        )
    else:
        blocks = set(no_split_module_classes)
        unknown = blocks - {type(module).__name__ for module in view.modules.values()}
        if unknown and warns:
            logger.warning(
                "no_split_module_classes names %s, but no module of the model is of that class", listed(sorted(unknown))
            )
    pieces = [
        (path, type(module).__name__ in blocks, names)
        for path, module, names in interruptible(_walk("", view.model, blocks, view))
        if names
    ]
    return [_unit(merged, by_name, view) for merged in interruptible(_merged(pieces, by_name))]


_Piece = tuple[str, bool, list[str]]


def _walk(
    path: str, module: nn.Module, blocks: Collection[str], view: ModelView
) -> Iterator[tuple[str, nn.Module | None, list[str]]]:
    """Yield the pieces of a module: path, module (None for a single tensor), and names of the tensors."""
    children = [(name, child) for name, child in _children(module) if _holds(child)]
    if not children or type(module).__name__ in blocks or view.reads_below(module):
        yield path, module, [name for name, _ in _tensors_under(path, module)]
        return
    for name in _own(module):
        full = f"{path}.{name}".lstrip(".")
        yield full, None, [full]
    for name, child in children:
        yield from _walk(f"{path}.{name}".lstrip("."), child, blocks, view)


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in module._modules.items() if child is not None]


def _own(module: nn.Module) -> list[str]:
    slots = (*module._parameters.items(), *module._buffers.items())
    return [name for name, tensor in slots if tensor is not None]


def _tensors_under(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    waiting = [(path, module)]
    while waiting:
        at, inner = waiting.pop()
        for name in _own(inner):
            yield f"{at}.{name}".lstrip("."), inner
        waiting += [(f"{at}.{name}".lstrip("."), child) for name, child in _children(inner)]


_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def _repeated_classes(modules: Mapping[str, nn.Module], by_name: Mapping[str, PlannedTensor]) -> set[str]:
    """Return the classes in the largest ModuleList, or Sequential whose elements are all of one class."""
    largest: tuple[int, set[str]] = (0, set())
    for path, module in interruptible(modules.items()):
        elements = [child for _, child in _children(module)]
        classes = {type(child).__name__ for child in elements}
        is_list = isinstance(module, nn.ModuleList) or (isinstance(module, nn.Sequential) and len(classes) == 1)
        are_blocks = all(child._modules and not isinstance(child, _CONTAINERS) for child in elements)
        if is_list and are_blocks and len(elements) > 1:
            held = {id(by_name[name]): by_name[name].nbytes for name, _ in _tensors_under(path, module)}
            largest = max(largest, (sum(held.values()), classes), key=lambda found: found[0])
    return largest[1]


def _merged(pieces: Sequence[_Piece], by_name: Mapping[str, PlannedTensor]) -> list[list[_Piece]]:
    """Group pieces that share a tensor, at the position of the first."""
    group_of: dict[int, list[_Piece]] = {}
    groups: dict[int, list[_Piece]] = {}
    for piece in interruptible(pieces):
        shared = {id(group): group for name in piece[2] if (group := group_of.get(id(by_name[name]))) is not None}
        group = next(iter(shared.values()), None)
        if group is None:
            group = []
            groups[id(group)] = group
        for other in list(shared.values())[1:]:
            group += other
            del groups[id(other)]
            group_of.update({key: group for key, value in group_of.items() if value is other})
        group.append(piece)
        group_of.update({id(by_name[name]): group for name in piece[2]})
    return list(groups.values())


def _unit(
    pieces: Sequence[_Piece],
    by_name: Mapping[str, PlannedTensor],
    view: ModelView,
) -> Unit:
    tensors = list({id(by_name[name]): by_name[name] for _, _, names in pieces for name in names}.values())
    offloaded = tuple(planned for planned in tensors if _can_leave(planned, view))
    owners = {type(view.owner(planned.tensor.name)) for planned in offloaded}
    paths = tuple(path for path, _, _ in pieces)
    return Unit(paths, any(block for _, block, _ in pieces), tuple(tensors), offloaded, owners == {nn.Embedding})


def _can_leave(planned: PlannedTensor, view: ModelView) -> bool:
    """Whether a tensor belongs to one leaf module, and only the forward of that module reads it."""
    if not planned.tensor.is_parameter or planned.nbytes < RESIDENT_BYTES:
        return False
    owners = {view.owner(name) for name in planned.tensor.names}
    (owner,) = owners if len(owners) == 1 else (None,)
    is_plain = not isinstance(planned.format, Plain) or planned.format.dtype.is_floating_point
    return owner is not None and is_plain and _is_leaf(owner) and owner not in view.read_by_owner


def _is_leaf(module: nn.Module) -> bool:
    """Whether no child of a module holds tensors; children such as activation functions do not."""
    return not any(_holds(child) for _, child in _children(module))


def _holds(module: nn.Module) -> bool:
    return bool(_own(module)) or not _is_leaf(module)


def whole_model(tensors: Sequence[PlannedTensor]) -> Unit:
    """Return a model as one unit, for a load that puts all of it on one device."""
    return Unit(("",), False, tuple(tensors), (), False)
