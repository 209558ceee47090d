"""What code finds outside the objects that it is given: globals, and attributes of classes.

`SHARED = nn.Linear(..)` at the top of a file, used in a forward, or `class Net: table = {..}`. Only the user's code
is looked through: libraries keep none of a model's modules in their globals, but much else.
"""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

# Libraries whose objects hold none of a model's modules, but much else.
FOREIGN = frozenset({"torch", "logging", "threading", "tokenizers", "numpy", "builtins", "re", "io"})
_LIBRARIES = (
    FOREIGN | sys.stdlib_module_names | {"accelerate", "bigload", "bitsandbytes", "diffusers", "peft", "transformers"}
)
# `globals()["SHARED"]`, `sys.modules[__name__].SHARED`: then every name and text of the code may be that of a global.
_BY_TEXT = frozenset({"globals", "modules", "import_module"})


class ClassAttributes:
    """The attributes of a class, as a mapping that can be written to."""

    def __init__(self, cls: type) -> None:
        self._cls = cls

    def __getitem__(self, key: str) -> Any:
        return vars(self._cls)[key]

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self._cls, key, value)


class Global:
    """A global by its name, looked up when it is needed. Equal to another one of the same file and name."""

    def __init__(self, namespace: Mapping[str, Any], name: str) -> None:
        self._namespace, self._name = namespace, name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Global) and hash(self) == hash(other)

    def __hash__(self) -> int:
        return hash((id(self._namespace), self._name))

    def value(self) -> Any:
        """Return what it is now."""
        return self._namespace.get(self._name)


def globals_with_layers(function: FunctionType) -> dict[str, Global]:
    """Return the globals that a function names and that may be, or hold, layers."""
    space: dict[str, Any] = function.__globals__
    names = global_names(function.__code__) & space.keys() if is_of_user(function) else ()
    return {name: Global(space, name) for name in names if _may_hold(space[name])}


def _may_hold(value: Any) -> bool:
    if isinstance(value, (type, ModuleType)):
        return is_of_user(value)
    return value is None or isinstance(value, (nn.Module, list, tuple, dict))


def is_of_user(thing: Any) -> bool:
    """Whether a function, class or module is the user's own, not a library's."""
    name = thing.__name__ if isinstance(thing, ModuleType) else thing.__module__
    return (name or "").partition(".")[0] not in _LIBRARIES


def globals_of(function: FunctionType) -> Iterator[tuple[MutableMapping[str, Any], str]]:
    """Yield the globals that a function of the user's names: of its own file, and of the user's modules that it names.

    Yields:
        The namespace of a file, and the name in it.
    """
    if not is_of_user(function):
        return
    words, names = _words(function.__code__), global_names(function.__code__)
    own: dict[str, Any] = function.__globals__
    spaces = [own, *_imported(function, words)]
    for space in spaces:  # grows: `package.layers.SHARED`
        used = names if space is own and words.isdisjoint(_BY_TEXT) else words
        for name in used & space.keys():
            if not isinstance(space[name], ModuleType):
                yield space, name
            elif is_of_user(space[name]) and not any(vars(space[name]) is known for known in spaces):
                spaces.append(vars(space[name]))


def functions_in(member: Any) -> list[FunctionType]:
    """Return the functions of a property, a method of a class, and the like."""
    if isinstance(member, property):
        found = [member.fget, member.fset]
    elif isinstance(member, (functools.cached_property, functools.partialmethod)):
        found = [member.func]
    else:
        found = [member.__func__] if isinstance(member, (classmethod, staticmethod)) else []
    return [each for each in found if isinstance(each, FunctionType)]


def _imported(function: FunctionType, words: frozenset[str]) -> list[dict[str, Any]]:
    """Return the namespaces of the user's modules that a function imports when it runs."""
    package = function.__globals__.get("__package__") or ""
    names = [name for word in words for name in (word, f"{package}.{word}")]
    found = [module for name in names if isinstance(module := sys.modules.get(name), ModuleType)]
    return [vars(module) for module in found if is_of_user(module)]


@functools.cache
def _words(code: CodeType) -> frozenset[str]:
    """Return the names of globals and attributes in a function's code and the functions in it, and its texts."""
    inner = (_words(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    texts = (text for text in code.co_consts if isinstance(text, str))
    return frozenset(code.co_names).union(texts, *inner)


@functools.cache
def global_names(code: CodeType) -> frozenset[str]:
    """Return the names of globals in a function's code and the functions in it."""
    inner = (global_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    own = (step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    return frozenset(own).union(*inner)
