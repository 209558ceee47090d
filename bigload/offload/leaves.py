"""The leaf modules whose weights are streamed, and for each of their tensors the objects that hold it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from ..errors import OffloadError
from ..hardware.pinned import Store
from ..model.tree import leaves, modules_by_path
from ..quantization.experts import has_quantized_experts
from ..quantization.formats import part_name
from ..quantization.layers import is_quantized
from ..quantization.quantized_weight import keep_row_scales, state_holders
from .on_device.slots import Slot, Use

# Parameters at rest, and bitsandbytes' own, override `__torch_function__`; what moves them goes past it.
without_torch_function = torch._C.DisableTorchFunctionSubclass
DATA: Any = torch.Tensor.data
# Part of a weight -> the (object, attribute) pairs that hold it.
_Places = dict[str, list[tuple[Any, str]]]


def refuse_copy() -> NoReturn:
    """Refuse to copy or pickle.

    Raises:
        OffloadError: always.
    """
    raise OffloadError(
        "a model with offloaded weights cannot be copied or pickled; save its state_dict, or call "
        "model.offload.remove() first (a part of it can be copied, by copy.deepcopy)"
    )


class NonCopyable:
    """Refuses to be copied or pickled: the copy of a model would share it with the original."""

    def __deepcopy__(self, memo: object) -> NoReturn:
        refuse_copy()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_copy()


class MethodOverride(NonCopyable):
    """Overrides a method of one module, as an attribute of the instance."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self._name = module, name
        self._before = vars(module).get(name)
        vars(module)[name] = self

    def remove(self) -> None:
        """Restore what was there before, unless others have overridden the method since; may be called again."""
        own = vars(self.module)
        if own.get(self._name) is self and self._before is None:
            del own[self._name]
        elif own.get(self._name) is self:
            own[self._name] = self._before


def without_overrides(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a module's attributes as they are without its offloading, for a copy."""
    own = {}
    for name, value in state.items():
        kept = value
        while isinstance(kept, MethodOverride):
            kept = kept._before
        if isinstance(value, dict) and name.endswith("_hooks"):
            kept = type(value)((key, hook) for key, hook in value.items() if not _is_ours(hook))
        if kept is value or kept is not None:
            own[name] = kept
    return own


def _is_ours(hook: Any) -> bool:
    return isinstance(getattr(hook, "hook", hook), NonCopyable)  # torch wraps some


def remove_all(handles: list[Any]) -> None:
    """Call `remove()` of each handle, last first; a second call finishes one that Ctrl-C interrupted."""
    while handles:
        handles[-1].remove()
        handles.pop()


@dataclass(frozen=True, eq=False)
class Leaf:
    """A module whose weights are on the device only while it runs.

    Attributes:
        path: its path in the model.
        module: an nn.Linear, a Conv1D, a layer of bitsandbytes, fused experts, or any module with its children.
        parameters: paths, from the module, of the parameters that are streamed; the others stay where they are.
    """

    path: str
    module: nn.Module
    parameters: tuple[str, ...] = ("weight",)


class StreamedTensor:
    """One tensor that is streamed, and all objects that hold it.

    Attributes:
        name: its name in its group.
        parameter: the parameter whose values it is; None for the other parts of a quantized weight.
        identity: equal for tensors that are one and the same.
        is_swapped_in: the objects hold the slot's tensor, for a call that runs or one that was interrupted.
    """

    def __init__(self, name: str, places: Iterable[tuple[Any, str]], owner: nn.Module, key: str) -> None:
        self.name = name
        self._places = tuple(places)
        self._owner, self._key = owner, key
        holder, attribute = self._places[0]
        self.parameter: nn.Parameter | None = holder if isinstance(holder, nn.Parameter) else None
        self.identity = (id(holder), attribute)
        self.is_swapped_in = False
        self._is_counted = self.parameter is not None and not self.parameter.is_inference()
        self._version = self._version_in_slot = self._count_writes()
        self._version_at_rest = self._pointer_at_rest = self._pointer_in_slot = 0
        self._class_at_rest: type[nn.Parameter] | None = None
        self._users: list[Use] = []

    def get(self) -> torch.Tensor:
        """Return the tensor that the objects hold now."""
        with without_torch_function():
            tensor: torch.Tensor = getattr(*self._places[0])
            return tensor.detach() if isinstance(tensor, nn.Parameter) else tensor

    def put(self, tensor: torch.Tensor) -> None:
        """Let the objects hold another tensor of the same shape and dtype; parameters keep their identity."""
        with without_torch_function():
            self._put(tensor)

    def _put(self, tensor: torch.Tensor) -> None:
        for holder, attribute in self._places:
            setattr(holder, attribute, tensor)

    def put_at_rest(self, at_rest: torch.Tensor) -> None:
        """Put the tensor at rest in place for all times at which no call uses a slot's."""
        self._version_at_rest, self._pointer_at_rest = at_rest._version, at_rest.data_ptr()
        self.put(at_rest)

    def swap_in(self, use: Use, in_slot: torch.Tensor, *, is_only_read: bool = False) -> None:
        """Put the slot's tensor in place for a call, unless another call has done so.

        The caller has switched `__torch_function__` off, here and in `swap_out`.

        Args:
            use: the use of the slot.
            in_slot: the slot's tensor.
            is_only_read: the parameter gets its own class meanwhile: the one that counts what is written takes time.
        """
        is_first = not self.is_used()
        self._users.append(use)
        if is_first:
            self.is_swapped_in = True
            self._version_in_slot, self._pointer_in_slot = self._count_writes(), in_slot.data_ptr()
            if is_only_read and self.parameter is not None:
                self._class_at_rest = type(self.parameter)
                self.parameter.__class__ = getattr(self._class_at_rest, "own_class", self._class_at_rest)
            self._put(in_slot)

    def swap_out(self, at_rest: Mapping[str, torch.Tensor]) -> None:
        """Put the tensor at rest back in place, unless a call uses the slot's. What was written to that one is kept."""
        if self.is_swapped_in and not self.is_used():
            held = self.parameter
            if held is None or held.data_ptr() in (self._pointer_in_slot, self._pointer_at_rest):
                if self._count_writes() != self._version_in_slot:
                    at_rest[self.name].copy_(self.get())
                self._put(at_rest[self.name])
            # Else others have put other memory there, which the next call finds.
            if held is not None and self._class_at_rest is not None:
                held.__class__ = self._class_at_rest
                self._class_at_rest = None
            self.is_swapped_in = False

    def restore(self, tensor: torch.Tensor) -> None:
        """Put a tensor in place for good, even if an interrupted call has left the slot's there."""
        self.is_swapped_in = False
        self.put(tensor)

    def is_used(self) -> bool:
        """Whether a call uses the slot's tensor."""
        return self.slot() is not None

    def slot(self) -> Slot | None:
        """Return the slot whose tensor running calls use; None if no call does."""
        if self._users:
            self._users = [use for use in self._users if use.slot is not None and use in use.slot.users]
        return self._users[0].slot if self._users else None

    def is_replaced(self, at_rest: torch.Tensor) -> bool:
        """Whether others have put another parameter, or other memory, in the place of the tensor at rest."""
        parameter = self.parameter
        if parameter is None or self.is_swapped_in:
            return False
        is_other = self._owner._parameters.get(self._key) is not parameter
        return is_other or parameter.data_ptr() != at_rest.data_ptr()

    def is_changed(self, at_rest: torch.Tensor) -> bool:
        """Whether `is_replaced`, or written to since `note_writes`. Each call of a leaf asks, so this calls neither."""
        parameter = self.parameter
        if parameter is None or self.is_swapped_in:
            return False
        return (
            (self._is_counted and parameter._version != self._version)
            or at_rest._version != self._version_at_rest
            or self._owner._parameters.get(self._key) is not parameter
            or parameter.data_ptr() != self._pointer_at_rest
        )

    def writes(self, at_rest: torch.Tensor) -> tuple[int, int]:
        """Count what was written so far: to the parameter, and to the tensor at rest."""
        return self._count_writes(), at_rest._version

    def is_written(self, writes: tuple[int, int]) -> bool:
        """Whether some of these writes are new since `note_writes`."""
        return writes != (self._version, self._version_at_rest)

    def note_writes(self, writes: tuple[int, int]) -> None:
        """Take note of all that was written so far."""
        self._version, self._version_at_rest = writes

    def _count_writes(self) -> int:
        return self.parameter._version if self._is_counted and self.parameter is not None else 0


def streamed_tensors_of(leaf: Leaf) -> list[StreamedTensor]:
    """List the streamed tensors of a leaf, including the quantization state of its weights.

    Raises:
        OffloadError: a parameter is missing, or quantized in a way that cannot be streamed.
    """
    streamed = []
    for path in leaf.parameters:
        owner_path, _, key = path.rpartition(".")
        owner: Any = leaf.module.get_submodule(owner_path)
        parameter = owner._parameters.get(key)
        if parameter is None:
            raise OffloadError(
                f"{leaf.path!r} has no parameter {path!r} to stream; call model.offload.remove() before a weight is "
                "parametrized, pruned or deleted"
            )
        places: _Places = {"weight": [(parameter, "data")]}
        if key == "weight" and is_quantized(owner):
            places = _places_8bit(leaf.path, owner) if hasattr(owner, "state") else _places_4bit(leaf.path, parameter)
        elif has_quantized_experts(owner) and key in owner.quantized_experts.weights:
            places = _places_4bit(leaf.path, parameter)
        prefix = f"{leaf.path}.{path}" if leaf.path else path
        streamed += [StreamedTensor(part_name(prefix, part), held, owner, key) for part, held in places.items()]
    return streamed


def _places_4bit(path: str, weight: Any) -> _Places:
    state = getattr(weight, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        raise OffloadError(f"{path!r} is not quantized yet, or packed by bitsandbytes for this CPU: load it again")
    return {"weight": [(weight, "data")]} | {part: [held] for part, held in state_holders(state).items()}


def _places_8bit(path: str, layer: Any) -> _Places:
    if layer.weight.CB is not None:
        keep_row_scales(layer)
        layer.init_8bit_state()  # as its first forward does; afterwards the state holds all parts
    if layer.state.CB is None or layer.state.SCB is None:
        raise OffloadError(f"{path!r} is not quantized yet; move the model to its device first")
    return {"weight": [(layer.weight, "data"), (layer.state, "CB")], "SCB": [(layer.state, "SCB")]}


@dataclass(eq=False)
class Group:
    """Leaves whose weights are copied to the device together.

    Attributes:
        name: such as the path of a decoder layer.
        leaves: its modules.
        store: holds the weights at rest; its parts have the names of the leaves' streamed tensors. It is exchanged
            when others give a weight another dtype or shape.
        cached: how many experts of each leaf stay on the device, those used last, if the leaves are fused experts in 4
            bit; their experts are then copied one by one. None if the group is always copied as a whole.
    """

    name: str
    leaves: tuple[Leaf, ...]
    store: Store
    cached: int | None = None


def streamed_by_leaf(group: Group) -> dict[Leaf, list[StreamedTensor]]:
    """List the streamed tensors of each leaf. Leaves that share a tensor get one object for it.

    Raises:
        OffloadError: a leaf is listed twice, or one of its tensors cannot be streamed.
    """
    known: dict[tuple[int, str], StreamedTensor] = {}
    found: dict[Leaf, list[StreamedTensor]] = {}
    modules: set[nn.Module] = set()
    for leaf in group.leaves:
        if leaf.module in modules:
            raise OffloadError(f"{leaf.path!r} is twice in the group {group.name!r}")
        modules.add(leaf.module)
        found[leaf] = [known.setdefault(each.identity, each) for each in streamed_tensors_of(leaf)]
    return found


def require_stored(group: Group, streamed: Mapping[Leaf, Sequence[StreamedTensor]]) -> None:
    """Refuse a store that lacks a tensor of the leaves, or holds it in another dtype or shape.

    Raises:
        OffloadError: the store is not one of these tensors.
    """
    for each in (each for own in streamed.values() for each in own):
        part, tensor = group.store.layout.parts.get(each.name), each.get()
        if part is None or (part.dtype, part.shape) != (tensor.dtype, tuple(tensor.shape)):
            raise OffloadError(f"{each.name!r} is {tensor.dtype} {tuple(tensor.shape)}, its store holds {part}")


def require_owned(
    model: nn.Module, streamed: dict[Group, dict[Leaf, list[StreamedTensor]]], embeddings: Collection[Leaf]
) -> None:
    """Refuse weights that another module reads too, which would not find them on the device.

    Raises:
        OffloadError: a weight is in two groups, or a module outside all groups holds it.
    """
    group_of: dict[int, Group] = {}
    allowed = {module for leaf in embeddings for module in leaf.module.modules()}
    for group, by_leaf in streamed.items():
        for leaf, own in by_leaf.items():
            allowed.update(leaf.module.modules())
            for each in own:
                if each.parameter is not None and group_of.setdefault(id(each.parameter), group) is not group:
                    raise OffloadError(f"{each.name!r} is in two groups; weights that are tied must be in one")
    modules = modules_by_path(model)
    for name, parameter in leaves(modules, "_parameters").items():
        if id(parameter) in group_of and modules[name.rpartition(".")[0]] not in allowed:
            raise OffloadError(f"{name!r} is offloaded as another module's; this one would not find it on the device")
