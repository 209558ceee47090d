"""What of a layer is streamed: its tensors, each with the places that hold it, so that another can take its place."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from ..errors import OffloadError
from ..hardware.pinned import Store
from ..model.tree import leaves, modules_by_path
from ..quantization.formats import part_name
from ..quantization.layers import is_quantized
from ..quantization.quantized_weight import state_holders
from .slots import Slot, Use

# By the part of a weight: the objects that hold it, and the attribute of each.
_Places = dict[str, list[tuple[Any, str]]]


class NonCopyable:
    """What a copied model would share with the first: so there is no copy."""

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise OffloadError(
            "a model that is given its weights as it runs cannot be copied or pickled; save its state_dict, or bring "
            "its weights back first (model.offload.remove())"
        )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self.__deepcopy__(None)


class MethodOverride(NonCopyable):
    """Takes the place of one of a module's methods, as an attribute of the instance."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self._name = module, name
        self._before = vars(module).get(name)
        vars(module)[name] = self

    def remove(self) -> None:
        """Give the module back what it had, unless others have overridden the method since; may be called again."""
        own = vars(self.module)
        if own.get(self._name) is self and self._before is None:
            del own[self._name]
        elif own.get(self._name) is self:
            own[self._name] = self._before


def remove_all(handles: list[Any]) -> None:
    """Call `remove()` of each, the last first; a second call finishes what Ctrl-C interrupts."""
    while handles:
        handles[-1].remove()
        handles.pop()


@dataclass(frozen=True, eq=False)
class Leaf:
    """A module that is given its weights whenever it runs.

    Attributes:
        path: its path in the model.
        module: an nn.Linear, a Conv1D, a layer of bitsandbytes, or any module, as a whole.
        parameters: those of it that are streamed, by their paths from the module; the others stay where they are.
    """

    path: str
    module: nn.Module
    parameters: tuple[str, ...] = ("weight",)


class StreamedTensor:
    """One tensor that is streamed, wherever it is held.

    Attributes:
        name: in its group.
        is_swapped_in: it is the device's, or was left so by a call that was interrupted.
    """

    def __init__(self, name: str, places: Iterable[tuple[Any, str]], owner: nn.Module, key: str) -> None:
        self.name = name
        self._places = tuple(places)
        self._owner, self._key = owner, key
        holder, attribute = self._places[0]
        # The parameter whose values it is; None for what belongs to a quantized weight.
        self.parameter: nn.Parameter | None = holder if isinstance(holder, nn.Parameter) else None
        self.identity = (id(holder), attribute)
        self.is_swapped_in = False
        self._users: list[Use] = []

    def get(self) -> torch.Tensor:
        """Return the tensor that is there."""
        tensor: torch.Tensor = getattr(*self._places[0])
        return tensor.detach() if isinstance(tensor, nn.Parameter) else tensor

    def put(self, tensor: torch.Tensor) -> None:
        """Put a tensor there, of the same shape and dtype; parameters keep their identity."""
        for holder, attribute in self._places:
            setattr(holder, attribute, tensor)

    def swap_in(self, use: Use, there: torch.Tensor) -> None:
        """Put the device's tensor there for a call; for others of the same slot it is there already."""
        is_first = not self.is_used()
        self._users.append(use)
        if is_first:
            self.is_swapped_in = True
            self.put(there)

    def swap_out(self, rest: Mapping[str, torch.Tensor]) -> None:
        """Put its tensor of those at rest there, unless a call uses the device's."""
        if self.is_swapped_in and not self.is_used():
            self.put(rest[self.name])
            self.is_swapped_in = False

    def restore(self, tensor: torch.Tensor) -> None:
        """Put a tensor there to stay, whatever a call that is over has yet to put back."""
        self.is_swapped_in = False
        self.put(tensor)

    def is_used(self) -> bool:
        """Whether a call uses the device's tensor."""
        return self.slot() is not None

    def slot(self) -> Slot | None:
        """Return the slot that the tensor of calls lies in; one that has left its slot does not count."""
        if self._users:
            self._users = [use for use in self._users if use.slot is not None and use in use.slot.users]
        return self._users[0].slot if self._users else None

    def require_at_rest(self, rest: torch.Tensor) -> None:
        """Refuse to run with a weight that another has replaced or moved: its values would be ignored.

        Raises:
            OffloadError: says which.
        """
        parameter = self.parameter
        if parameter is None or self.is_swapped_in:
            return
        is_there = parameter.data_ptr() == rest.data_ptr()
        if not is_there or self._owner._parameters.get(self._key) is not parameter:
            raise OffloadError(
                f"{self.name!r} is streamed, but was replaced or moved since; take the model off its engine first "
                "(remove()), then change it"
            )


def streamed_tensors_of(leaf: Leaf) -> list[StreamedTensor]:
    """List what is streamed of a leaf: of a quantized weight also what bitsandbytes dequantizes it with.

    Raises:
        OffloadError: a parameter is not there, or quantized in a way that cannot be streamed.
    """
    streamed = []
    for path in leaf.parameters:
        owner_path, _, key = path.rpartition(".")
        owner: Any = leaf.module.get_submodule(owner_path)
        parameter = owner._parameters.get(key)
        if parameter is None:
            raise OffloadError(f"{leaf.path!r} has no parameter {path!r} to stream")
        places: _Places = {"weight": [(parameter, "data")]}
        if key == "weight" and is_quantized(owner):
            if owner is not leaf.module:
                raise OffloadError(f"{leaf.path!r}: {owner_path!r} in it is quantized, and must be a leaf itself")
            places = _places_8bit(leaf.path, owner) if hasattr(owner, "state") else _places_4bit(leaf.path, owner)
        prefix = f"{leaf.path}.{path}" if leaf.path else path
        streamed += [StreamedTensor(part_name(prefix, part), held, owner, key) for part, held in places.items()]
    return streamed


def _places_4bit(path: str, layer: Any) -> _Places:
    state = getattr(layer.weight, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        raise OffloadError(f"{path!r} is not quantized yet, or packed by bitsandbytes for this CPU: load it anew")
    return {"weight": [(layer.weight, "data")]} | {part: [held] for part, held in state_holders(state).items()}


def _places_8bit(path: str, layer: Any) -> _Places:
    if layer.state.has_fp16_weights:
        raise OffloadError(f"{path!r} holds the main weights of int8 training, which cannot be streamed")
    if layer.weight.CB is not None:
        layer.init_8bit_state()  # as its first forward does: from here on all is held by the state
    if layer.state.CB is None or layer.state.SCB is None:
        raise OffloadError(f"{path!r} is not quantized yet; move the model to its device first")
    return {"weight": [(layer.weight, "data"), (layer.state, "CB")], "SCB": [(layer.state, "SCB")]}


@dataclass(frozen=True, eq=False)
class Group:
    """Leaves whose weights come to the device together.

    Attributes:
        name: of the group, such as the path of a decoder layer.
        leaves: its modules.
        store: where the weights rest; its parts are named as the streamed tensors of its leaves.
    """

    name: str
    leaves: tuple[Leaf, ...]
    store: Store


def streamed_by_leaf(group: Group) -> dict[Leaf, list[StreamedTensor]]:
    """List the streamed tensors of each leaf, one and the same for a tensor that several leaves share.

    Raises:
        OffloadError: the store lacks one.
    """
    known: dict[tuple[int, str], StreamedTensor] = {}
    found: dict[Leaf, list[StreamedTensor]] = {}
    modules: set[nn.Module] = set()
    for leaf in group.leaves:
        if leaf.module in modules:
            raise OffloadError(f"{leaf.path!r} is twice in the group {group.name!r}")
        modules.add(leaf.module)
        found[leaf] = [known.setdefault(each.identity, each) for each in streamed_tensors_of(leaf)]
    for each in known.values():
        part = group.store.layout.parts.get(each.name)
        there = each.get()
        if part is None or (part.dtype, part.shape) != (there.dtype, tuple(there.shape)):
            raise OffloadError(f"{each.name!r} is {there.dtype} {tuple(there.shape)}, its store holds {part}")
    return found


def require_owned(
    model: nn.Module, streamed: dict[Group, dict[Leaf, list[StreamedTensor]]], embeddings: Collection[Leaf]
) -> None:
    """Refuse weights that a module reads which is not given them.

    Raises:
        OffloadError: one is in two groups, or held by a module that is in none.
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
            raise OffloadError(f"{name!r} is streamed for another module, and this one would not find it on the device")
