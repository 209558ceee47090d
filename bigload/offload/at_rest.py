"""What is written to offloaded weights, and `state_dict` and `load_state_dict` of their modules.

`state_dict` returns the weights at rest, and what `load_state_dict` loads is used from the next call on.

torch counts what is written to a tensor, except through `.data`. A parameter at rest has a class that counts this too.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import OffloadError
from ..hardware.nested_tensors import send_to_device, tensors_in
from .files import FileGroup
from .leaves import DATA, Group, NonCopyable, without_torch_function
from .on_device.slot_pool import SlotPool
from .residency import Residency


class _AtRest(torch.Tensor):
    """A weight that rests in host memory or files, whatever device computes with it.

    What is written to it is counted, also through `.data`, which torch does not count. Where it meets tensors of
    another device, what is written to it comes to where it rests, and a weight that is only read goes to the others.

    Attributes:
        _home: what streams it.
        own_class: what it would be in a model that is not offloaded.
    """

    _home: _Home
    own_class: Any = torch.Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation of torch on weights at rest."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        with without_torch_function():
            if name in ("__get__", "__set__", "__delete__"):
                if func == DATA.__get__:
                    return _travelling(args[0].detach(), args[0]._home)
                if func == DATA.__set__ and isinstance(args[0], _AtRestParameter):
                    return _set_data(*args)
                return func(*args, **kwargs)
            if name == "detach" and sys._getframe(1).f_code is _MAKE_PARAMETER:
                made = torch.Tensor._make_subclass(type(args[0]), args[0].detach())  # it demands the same class
                made._home = args[0]._home
                return made
            if not kwargs and not _writes(name) and _is_all_in_slot(args):
                return func(*args)
            given = [*tensors_in((args, kwargs))]
            own = [tensor for tensor in given if isinstance(tensor, _AtRest)]
            written = kwargs.get("out", next(iter((*args, *kwargs.values()))) if _writes(name) else None)
            targets = [tensor for tensor in tensors_in(written) if isinstance(tensor, _AtRest)]
            if targets:
                return _write(func, args, kwargs, written, targets)
            elsewhere = {tensor.device for tensor in given if tensor.dim()} - {tensor.device for tensor in own}
            if len(elsewhere) == 1:  # PEFT brings indices to where a weight says it is
                args, kwargs = send_to_device((args, kwargs), *elsewhere)
            out = func(*args, **kwargs)
            if out is own[0]:
                return out
            # What was computed of it alone goes on like it: a view, a copy, the values of a quantized weight.
            is_alone = len(own) == len(given) or "dequant" in name
            goes_on = is_alone and isinstance(out, torch.Tensor) and out.device == own[0].device
            return _travelling(out, own[0]._home) if goes_on else out

    @property
    def _is_param(self) -> bool:
        """Set by `nn.Parameter` on what it makes of a subclass. Of a weight at rest that becomes a usual parameter."""
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        own: Any = nn.Parameter if isinstance(self, _Traveller) else self.own_class
        self.__class__ = own
        vars(self).pop("_home", None)
        if own is not nn.Parameter:
            vars(self)["_is_param"] = value

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """Copy the values into memory of their own, as what they would be in a model that is not offloaded."""
        made: torch.Tensor | None = memo.get(id(self))
        if made is None:
            with without_torch_function():
                made = memo[id(self)] = self._as_own_class().__deepcopy__({})
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as what it would be in a model that is not offloaded."""
        with without_torch_function():
            return self._as_own_class().__reduce_ex__(protocol)

    def _as_own_class(self) -> Any:
        """View the same memory as what this would be in a model that is not offloaded."""
        plain = torch.Tensor._make_subclass(self.own_class, self.detach(), self.requires_grad)
        vars(plain).update((name, value) for name, value in vars(self).items() if name != "_home")
        return plain


class _Traveller(_AtRest):
    """The memory of a weight at rest, or what was computed of it where it rests."""


class _AtRestParameter(_AtRest, nn.Parameter):
    """A parameter at rest."""

    own_class: Any = nn.Parameter

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make one of its own class: `type(parameter)(values)` is a parameter that does not rest here."""
        return cls.own_class(*args, **kwargs)


_MAKE_PARAMETER = nn.Parameter.__new__.__code__


@functools.cache
def _at_rest_class(own: Any) -> Any:
    if own is nn.Parameter:
        return _AtRestParameter
    return type(own)(
        own.__name__, (_AtRestParameter, own), {"__module__": own.__module__, "own_class": own}
    )  # PEFT goes by the name


class _Home:
    """Where weights at rest belong."""

    def __init__(self, pool: SlotPool) -> None:
        self._pool, self.device = weakref.ref(pool), pool.copier.device

    def finish_copies(self) -> None:
        """Let copies that forwards have asked for end before the memory changes."""
        pool = self._pool()
        if pool is not None:
            pool.copier.finish()


def keep_writes(parameter: nn.Parameter, pool: SlotPool) -> None:
    """Let a parameter at rest count all that is written to it, by giving it another class."""
    own = type(parameter)
    if isinstance(parameter, _AtRest):
        return
    if own is nn.Parameter or own.__name__ in ("Params4bit", "Int8Params"):
        vars(parameter)["_home"] = _Home(pool)
        parameter.__class__ = _at_rest_class(own)


def stop_keeping_writes(parameters: Iterable[nn.Parameter]) -> None:
    """Give parameters that were at rest their own class back."""
    for parameter in parameters:
        if isinstance(parameter, _AtRestParameter):
            parameter.__class__ = parameter.own_class
        vars(parameter).pop("_home", None)  # a call that was interrupted has left its own class


def _travelling(tensor: torch.Tensor, home: _Home) -> torch.Tensor:
    """Let a tensor travel, unless it is where its home computes."""
    if tensor.device == home.device:
        return tensor
    made = tensor.as_subclass(_Traveller)
    made._home = home
    return made


def _set_data(parameter: _AtRestParameter, value: torch.Tensor) -> None:
    """Copy values to where the parameter rests. Those of another dtype or shape take their place from the next call."""
    own = parameter.detach()
    if (value.dtype, value.shape) != (own.dtype, own.shape) or value.is_meta:
        DATA.__set__(parameter, value.detach().as_subclass(torch.Tensor))
    elif value.data_ptr() != own.data_ptr():
        parameter._home.finish_copies()
        own.copy_(value)


def _is_all_in_slot(args: tuple[Any, ...]) -> bool:
    """Whether the weights among an operation's arguments are on the device that computes them, as in a forward."""
    for given in args:
        if isinstance(given, (list, tuple)) or (isinstance(given, _AtRest) and given.device != given._home.device):
            return False
    return True


def _write(func: Any, args: Any, kwargs: Any, written: Any, targets: Sequence[_AtRest]) -> Any:
    """Run an operation that writes to one tensor or several, of which those in `targets` are weights at rest."""
    for home in {target._home for target in targets}:
        home.finish_copies()
    if isinstance(written, torch.Tensor):
        args, kwargs = send_to_device((args, kwargs), written.device)
    elif args and written is args[0]:  # each stays where it is, and what it is computed with comes there
        args = (written, *(_beside(given, written) for given in args[1:]))
        kwargs = {name: _beside(given, written) for name, given in kwargs.items()}
    before = [_version(target) for target in targets]
    out = func(*args, **kwargs)
    # torch does not count what fused optimizers write.
    torch.autograd.graph.increment_version([t for t, n in zip(targets, before, strict=True) if n == _version(t)])
    return out


def _beside(given: Any, written: Sequence[torch.Tensor]) -> Any:
    """Move each tensor of a list to the device of the one that it is for."""
    if not isinstance(given, (list, tuple)) or len(given) != len(written):
        return given
    pairs = zip(given, written, strict=True)
    return [send_to_device(one, to.device) if isinstance(one, torch.Tensor) and one.dim() else one for one, to in pairs]


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _writes(name: str) -> bool:
    """Whether an operation of this name writes to its first argument."""
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__") and name not in _WRITE_NO_VALUES)


# What Python writes as `+=` and the like.
_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_WRITE_NO_VALUES = {"requires_grad_", "share_memory_", "rename_"}
_IN_PLACE = {"__setitem__", *(f"__i{name}__" for name in _OPERATORS)}


def hook_state_dicts(weights: Residency, pool: SlotPool) -> list[Any]:
    """Hook a leaf so that `state_dict` returns its weights at rest, and `load_state_dict` changes them.

    Returns:
        The handles that remove the hooks.
    """
    module, group = weights.leaf.module, weights.group
    return [
        module.register_state_dict_post_hook(_Hook(_show_at_rest, pool, group)),  # type: ignore[no-untyped-call]
        module._register_load_state_dict_pre_hook(_Hook(_prepare_to_load, weights)),  # type: ignore[no-untyped-call]
        module.register_load_state_dict_post_hook(_RefetchAfterLoad(pool, weights.group)),  # type: ignore[no-untyped-call]
    ]


def hook_embedding(module: nn.Module) -> Any:
    """Hook a module that the CPU computes where its weights rest, so that `state_dict` holds tensors of torch's class.

    Returns:
        The handle that removes the hook.
    """
    return module.register_state_dict_post_hook(_Hook(_show_plain))  # type: ignore[no-untyped-call]


class _Hook(NonCopyable):
    """A function with its first arguments, which a copy of the hooked module does not get."""

    def __init__(self, function: Callable[..., None], *given: object) -> None:
        self._function, self._given = function, given

    def __call__(self, *args: object) -> None:
        self._function(*self._given, *args)


def _prepare_to_load(weights: Residency, state: Mapping[str, object], prefix: str, *_: object) -> None:
    leaf = weights.leaf
    if not any(prefix + name in state for name in leaf.parameters):
        return
    if isinstance(weights.group.store, FileGroup):
        raise OffloadError(
            f"the weights of {leaf.path!r} are in files, which load_state_dict does not change; call "
            "model.offload.remove() first, then load the state_dict"
        )
    if weights.is_used():
        raise OffloadError(
            f"the weights of {leaf.path!r} are in use on the device: load the state_dict after its forward"
        )
    weights.swap_out()


class _RefetchAfterLoad(NonCopyable):
    def __init__(self, pool: SlotPool, group: Group) -> None:
        self._pool, self._group = weakref.ref(pool), group

    def __call__(self, module: nn.Module, keys: object) -> None:
        pool = self._pool()
        if pool is not None:
            pool.forget(self._group)


def _show_at_rest(
    pool: SlotPool, group: Group, module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: object
) -> None:
    group.store.require_unchanged()
    pool.copier.finish()  # who writes to these tensors must not change what forwards have yet to read
    # While the leaf runs, its tensors are those in a slot, which will be overwritten.
    memories = {slot.memory.untyped_storage().data_ptr() for slot in pool.slots}
    _show_plain(module, state, prefix)
    for name, tensor in state.items():
        is_own = name.startswith(prefix) and type(tensor) is torch.Tensor
        if is_own and tensor.untyped_storage().data_ptr() in memories:
            state[name] = group.store.at_rest(tensor)


def _show_plain(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
    """Let a state_dict hold tensors of torch's own class, which share the memory of a module's weights at rest."""
    with without_torch_function():
        for name, tensor in state.items():
            if name.startswith(prefix) and type(tensor) is _Traveller:
                state[name] = tensor.as_subclass(torch.Tensor)
