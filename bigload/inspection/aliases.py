"""Finds what holds a model's modules and tensors beside their owners: lists, partials, methods, closures, globals.

`self.steps = [self.fc1, self.fc2]` would keep the old layers when the model gets new ones. Containers are changed in
place, so that whoever shares one sees the new layers. What cannot be changed, such as a tuple, is made anew and put
where it was.
"""

from __future__ import annotations

import functools
import gc
import logging
import types
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import nn

from ..hardware.interrupts import interruptible
from .outer_names import ClassAttributes, functions_in, globals_of, is_a, is_foreign, is_of_user

logger = logging.getLogger(__name__)

# The attributes that every module has, and those of them that hold hooks. The others hold what is registered, which the
# model's own traversals replace.
_USUAL = frozenset(vars(nn.Module()))
_HOOKS = tuple(name for name in _USUAL if name.endswith("_hooks"))
_PLAIN = frozenset({int, float, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size})
_MUTABLE = (list, dict, set, deque)
_MAX_DEPTH = 8


class Alias(NamedTuple):
    """A place that holds modules or tensors of a model.

    Attributes:
        name: of the attribute, such as "encoder.steps".
        slots: a mapping with the place, or an object that acts as one.
        key: of the place.
        value: what it holds now.
        held: what was searched for and is in it: modules, tensors, and bound methods of modules.
    """

    name: str
    slots: Any
    key: str
    value: Any
    held: tuple[Any, ...]


def aliases(modules: Mapping[nn.Module, str], wanted: Callable[[Any], bool]) -> list[Alias]:
    """Find what holds some modules and tensors outside the registries of the modules that own them.

    Args:
        modules: all modules of the model, each with its path.
        wanted: whether to search for a module, a tensor, or a bound method of a module.
    """
    search = _Search(modules, wanted)
    for module, path in interruptible(modules.items()):
        own = vars(module)
        for name in own.keys() - _USUAL:
            if own[name].__class__ not in _PLAIN:
                search.look(f"{path}.{name}".lstrip("."), own, name, own[name])
        for name in filter(own.get, _HOOKS):
            search.look(f"{path}.{name}".lstrip("."), own, name, own[name])
    for cls in {base for each in {type(module) for module in modules} for base in each.__mro__}:
        search.look_into_class(cls, 0)
    return search.found


def exchanged(value: Any, new: Callable[[Any], Any]) -> Any:
    """Return what an alias holds with its modules, tensors and bound methods exchanged.

    Args:
        value: an alias's value.
        new: returns what comes in the place of one of them.
    """
    swap = functools.partial(exchanged, new=new)
    if is_a(value, _Items):
        return _Items(map(swap, value))
    if is_a(value, tuple) and hasattr(value, "_make"):
        return value._make(map(swap, value))
    if is_a(value, tuple, frozenset):
        return _with_attributes(value.__class__(map(swap, value)), value)
    if is_a(value, functools.partial):
        made = value.__class__(swap(value.func), *map(swap, value.args), **dict(map(swap, value.keywords.items())))
        return _with_attributes(made, value)
    if is_a(value, types.MethodType) and is_a(value.__func__, functools.partial):
        value = types.MethodType(swap(value.__func__), value.__self__)
    if is_a(value, weakref.ref):
        target = value()
        if target is None or new(target) is target:
            return value
        key = (value.key,) if is_a(value, weakref.KeyedRef) else ()
        return value.__class__(new(target), value.__callback__, *key)
    if is_a(value, *weakref.ProxyTypes):
        target = _behind(value)
        return value if new(target) is target else weakref.proxy(new(target))
    return new(value)


def _with_attributes(made: Any, old: Any) -> Any:
    getattr(made, "__dict__", {}).update(getattr(old, "__dict__", {}))
    return made


class _Search:
    """A search through the objects that modules hold."""

    def __init__(self, modules: Collection[nn.Module], wanted: Callable[[Any], bool]) -> None:
        self.found: list[Alias] = []
        self._modules, self._wanted = modules, wanted
        self._globals: set[tuple[int, str]] = set()
        self._seen: dict[int, Any] = {}  # the objects are kept, so that no other gets the id of one

    def look(self, name: str, slots: Any, key: str, value: Any, depth: int = 0) -> None:
        """Look at one place, and into what it holds. Objects that forbid it hold nothing that could be exchanged."""
        atoms = list(_atoms(value))
        held = tuple(atom for atom in atoms if _may_be_wanted(atom) and self._wanted(atom))
        if held:
            self.found.append(Alias(name, slots, key, value, held))
        for atom in atoms:
            if depth < _MAX_DEPTH and type(atom) not in _PLAIN and id(atom) not in self._seen:
                try:
                    self.look_into(name, atom, depth + 1)
                except Exception as error:  # their code may raise anything: a database without a connection, a request
                    logger.debug("%s, a %s, cannot be inspected: %r", name, type(atom).__name__, error)

    def look_into(self, name: str, value: Any, depth: int) -> None:
        """Look into what one object holds."""
        if (is_a(value, nn.Module) and value in self._modules) or id(value) in self._seen:
            return
        if is_a(value, type):
            if is_of_user(value):
                self.look_into_class(value, depth)
            return
        self._seen[id(value)] = value
        if is_a(value, *_MUTABLE):
            items = _Items(value.items() if isinstance(value, dict) else value)
            self.look(name, _Contents(value), "", items, depth)
        elif is_a(value, functools._lru_cache_wrapper):
            self.look(name, _Cache(value), "results", _cached_by(value), depth)
        elif is_a(value, types.MethodType):
            if not is_a(value.__self__, nn.Module) or value.__self__ not in self._modules:
                self.look_into(name, value.__self__, depth)
        elif is_a(value, types.FunctionType):
            self._look_into_function(name, value, depth)
        elif is_a(value, nn.Module) or not is_foreign(type(value)):
            for key, held in list(getattr(value, "__dict__", {}).items()):
                self.look(f"{name}.{key}", vars(value), key, held, depth)
            for key in _slots_of(value):
                self.look(f"{name}.{key}", _Attributes(value), key, getattr(value, key), depth)

    def _look_into_function(self, name: str, function: types.FunctionType, depth: int) -> None:
        for cell in function.__closure__ or ():
            if _is_filled(cell):
                self.look(name, _Attributes(cell), "cell_contents", cell.cell_contents, depth)
        for key in ("__defaults__", "__kwdefaults__"):
            self.look(name, _Attributes(function), key, getattr(function, key), depth)
        for key, held in list(vars(function).items()):
            self.look(f"{name}.{key}", vars(function), key, held, depth)
        for space, key in globals_of(function):
            if (id(space), key) not in self._globals:
                self._globals.add((id(space), key))
                self.look(f"{space.get('__name__')}.{key}", space, key, space[key], depth)

    def look_into_class(self, cls: type, depth: int) -> None:
        """Look into what a class holds: its own code too, unless it is a library's."""
        if id(cls) in self._seen or is_foreign(cls):
            return
        self._seen[id(cls)] = cls
        members = list(vars(cls).items())
        if not is_of_user(cls):
            members = [(key, held) for key, held in members if is_a(held, *_MUTABLE)]
        for key, held in members:
            name, functions = f"{cls.__name__}.{key}", functions_in(held)
            for function in functions:
                self.look_into(name, function, depth)
            if not functions:
                self.look(name, ClassAttributes(cls), key, _of_static(held), depth)


def _atoms(value: Any) -> Iterator[Any]:
    """Yield what a value holds, through the objects that cannot be changed."""
    if is_a(value, tuple, frozenset):  # _Items too
        for each in value:
            yield from _atoms(each)
    elif is_a(value, functools.partial):
        yield from _atoms((value.func, *value.args, *value.keywords.values()))
    elif is_a(value, types.MethodType):
        yield value
        yield from _atoms(value.__func__)
    elif is_a(value, weakref.ref):
        yield value()
    elif is_a(value, *weakref.ProxyTypes):
        yield _behind(value)
    else:
        yield value


def _behind(proxy: Any) -> Any:
    """Return what a weak proxy stands for; None if that is gone."""
    with suppress(ReferenceError):
        return proxy.__dir__.__self__
    return None


def _cached_by(function: Any) -> tuple[Any, ...]:
    """Return what a function with a cache holds: itself without the cache, arguments and results."""
    held = [each for each in gc.get_referents(function) if each is not vars(function)]
    return tuple(
        inner for each in held for inner in ((*each.keys(), *each.values()) if type(each) is dict else (each,))
    )


def _of_static(member: Any) -> Any:
    return member.__func__ if is_a(member, staticmethod) else member


def _may_be_wanted(value: Any) -> bool:
    return is_a(value, nn.Module, torch.Tensor, types.MethodType)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # not assigned yet
        return False


def _slots_of(value: Any) -> list[str]:
    named = [getattr(cls, "__slots__", ()) for cls in type(value).__mro__]
    every = [name for names in named for name in ([names] if isinstance(names, str) else names)]
    return [name for name in every if name not in ("__dict__", "__weakref__") and hasattr(value, name)]


class _Items(tuple[Any, ...]):
    """The items of a container that is changed in place; of a dict, pairs."""

    __slots__ = ()


class _Contents:
    """All that a container holds, as the one entry of a mapping."""

    def __init__(self, container: Any) -> None:
        self._container = container

    def __getitem__(self, key: str) -> _Items:
        return _Items(self._container.items() if isinstance(self._container, dict) else self._container)

    def __setitem__(self, key: str, items: _Items) -> None:
        self._container.clear()
        add = self._container.extend if isinstance(self._container, (list, deque)) else self._container.update
        add(items)


class _Cache:
    """What a function with a cache remembers: forgotten where it holds what is exchanged, and computed anew."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __getitem__(self, key: str) -> tuple[Any, ...]:
        return ()

    def __setitem__(self, key: str, value: object) -> None:
        self._function.cache_clear()


class _Attributes:
    """The attributes of an object without a dict, as a mapping."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner

    def __getitem__(self, key: str) -> Any:
        return getattr(self._owner, key)

    def __setitem__(self, key: str, value: Any) -> None:
        object.__setattr__(self._owner, key, value)  # of a frozen dataclass too
