"""`state_dict`, `load_state_dict` and `.to()` of modules whose weights are offloaded, and what is written to those.

`to`, `cuda`, `cpu`, `half` and the like call a module's `_apply`, which calls that of its children. For an offloaded
weight the call is tried on an empty tensor on the device that computes. If that tensor does not change, the weight
stays at rest; otherwise the call is refused before anything changes. `state_dict` returns the weights at rest, and what
`load_state_dict` loads is used from the next call on.

torch counts what is written to a tensor, except through `.data`. A parameter at rest has a class that counts this too.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import OffloadError
from ..model.tree import paths_above
from .device_hooks import send_to_device, tensors_in
from .files import FileGroup
from .forwards import require_readable
from .leaves import (
    DATA,
    Group,
    Leaf,
    MethodOverride,
    NonCopyable,
    remove_all,
    without_overrides,
    without_torch_function,
)
from .residency import Residency
from .slot_pool import SlotPool


class _AtRest(torch.Tensor):
    """A weight that rests in host memory or files, whatever device computes with it.

    What is written to it is counted, also through `.data`, which torch does not count. Where it meets tensors of
    another device, what is written to it comes to where it rests, and a weight that is only read goes to the others.

    Attributes:
        _home: what streams it.
    """

    _home: _Home

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation of torch on weights at rest."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        with without_torch_function():
            if func == DATA.__get__:
                return _travelling(args[0].detach(), args[0]._home)
            if func == DATA.__set__ and isinstance(args[0], _AtRestParameter):
                return _set_data(*args)
            if name in ("__get__", "__set__", "__delete__"):
                return func(*args, **kwargs)
            given = [*tensors_in((args, kwargs))]
            own = [tensor for tensor in given if isinstance(tensor, _AtRest)]
            written = kwargs.get("out", next(iter((*args, *kwargs.values()))) if _writes(name) else None)
            targets = [tensor for tensor in tensors_in(written) if isinstance(tensor, _AtRest)]
            if targets:
                return _write(func, args, kwargs, written, targets)
            elsewhere = {tensor.device for tensor in given if tensor.dim() and not isinstance(tensor, _AtRest)}
            if len(elsewhere) == 1 and elsewhere.isdisjoint(tensor.device for tensor in own):
                args, kwargs = send_to_device((args, kwargs), *elsewhere)
            out = func(*args, **kwargs)
            # What was computed of it alone goes on like it: a view, a copy, the values of a quantized weight.
            is_alone = len(own) == len(given) or name.startswith("dequantize")
            goes_on = is_alone and isinstance(out, torch.Tensor) and out.device == own[0].device
            return _travelling(out, own[0]._home) if goes_on else out

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """Copy the values into memory of their own, as what they would be in a model that is not offloaded."""
        with without_torch_function():
            own: Any = _own_class(type(self))
            made: torch.Tensor = own.__deepcopy__(self, memo)
            made.__class__ = own
            vars(made).pop("_home", None)
            memo[id(self)] = made
            return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as what it would be in a model that is not offloaded."""
        with without_torch_function():
            own: Any = _own_class(type(self))
            plain = torch.Tensor._make_subclass(own, self.detach(), self.requires_grad)
            vars(plain).update((name, value) for name, value in vars(self).items() if name != "_home")
            return plain.__reduce_ex__(protocol)


class _Traveller(_AtRest):
    """The memory of a weight at rest, or what was computed of it where it rests."""


class _AtRestParameter(_AtRest, nn.Parameter):
    """A parameter at rest."""


@functools.cache
def _at_rest_class(own: Any) -> Any:
    if own is nn.Parameter:
        return _AtRestParameter
    return type(own)(own.__name__, (_AtRestParameter, own), {"__module__": own.__module__})  # PEFT goes by the name


def _own_class(at_rest: type) -> type:
    if at_rest is _Traveller:
        return torch.Tensor
    return nn.Parameter if at_rest is _AtRestParameter else at_rest.__bases__[1]


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
            parameter.__class__ = _own_class(type(parameter))
            vars(parameter).pop("_home", None)


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
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


# What Python writes as `+=` and the like.
_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_IN_PLACE = {"__setitem__", *(f"__i{name}__" for name in _OPERATORS)}


class ApplyGuards:
    """Keep weights at rest when the model, or a part of it, is moved or cast, and let parts of it be copied."""

    def __init__(self, model: nn.Module, leaves: Mapping[Leaf, torch.device]) -> None:
        """Override `_apply` and `__deepcopy__` of the leaves and of the modules that contain them.

        Args:
            model: changed in place.
            leaves: the modules with offloaded weights, each with the device that computes it.
        """
        self._guards: list[MethodOverride] = []
        inside: dict[str, dict[Leaf, torch.device]] = defaultdict(dict)
        for leaf, device in leaves.items():
            for path in [leaf.path, *paths_above(leaf.path)]:
                inside[path][leaf] = device
        try:
            for path, found in inside.items():
                module = model.get_submodule(path)
                self._guards.append(_ApplyGuard(module, found))
                self._guards.append(_Copy(path, module, found))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Restore the modules' own methods; calling it again does nothing."""
        remove_all(self._guards)


class _ApplyGuard(MethodOverride):
    def __init__(self, module: nn.Module, leaves: Mapping[Leaf, torch.device]) -> None:
        self._own: Callable[..., Any] = module._apply
        self._away = {name for leaf in leaves if leaf.module is module for name in leaf.parameters}
        self._leaves = leaves
        super().__init__(module, "_apply")

    def __call__(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Apply `fn` to all tensors of the module except those at rest.

        Raises:
            OffloadError: `fn` would change those too.
        """
        if recurse or self._away:
            # One weight stands for all of its dtype and device.
            looked_at = {
                (leaf.module.get_parameter(name).dtype, device): leaf.path
                for leaf, device in self._leaves.items()
                for name in leaf.parameters
            }
            for (dtype, device), path in looked_at.items():
                _require_unchanged(fn, dtype, device, path)
        own: dict[str, Any] = vars(self.module)
        held = own["_parameters"]
        own["_parameters"] = {name: parameter for name, parameter in held.items() if name not in self._away}
        try:
            self._own(fn, recurse)
        finally:
            held.update(own["_parameters"])  # torch may put other parameters there
            own["_parameters"] = held
        return self.module


class _Copy(MethodOverride):
    """Copies a part of a model as it would be without offloading, onto the device that computes it.

    PEFT copies layers that it trains as a whole (`modules_to_save`), or computes with (DoRA).
    """

    def __init__(self, path: str, module: nn.Module, leaves: Mapping[Leaf, torch.device]) -> None:
        self._path = path
        self._devices = {device for leaf, device in leaves.items() if leaf.module is module}
        super().__init__(module, "__deepcopy__")

    def __call__(self, memo: dict[int, Any]) -> nn.Module:
        """Copy the module.

        Raises:
            OffloadError: it is the whole model, or a file with its weights has changed.
        """
        if not self._path:
            self.__deepcopy__(memo)
        require_readable(self.module)
        reduced: Any = self.module.__reduce_ex__(4)
        make, given, state = reduced[:3]
        made: Any = make(*given)
        memo[id(self.module)] = made
        made.__setstate__(copy.deepcopy(without_overrides(state), memo))
        for device in self._devices:
            made.to(device)
        return made  # type: ignore[no-any-return]


def _require_unchanged(
    fn: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, device: torch.device, path: str
) -> None:
    made = fn(torch.empty(0, dtype=dtype, device=device))
    if (made.dtype, made.device) == (dtype, device):
        return
    change = f"be moved to {made.device}" if made.device != device else f"be cast to {made.dtype}"
    raise OffloadError(
        f"the weights of {path!r} are offloaded and streamed, in {dtype} on {device}: they cannot {change}; call "
        "model.offload.remove() first, then change the model"
    )


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
