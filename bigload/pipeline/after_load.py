"""What the modules say is to be done when their tensors are loaded: extra state, attributes, and hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from ..errors import CheckpointError
from ..inspection.own_loading import SET_BY_LOADING, run_post_hooks, saves_extra_state
from ..io.tensors import StoredTensor, read_whole
from ..model.view import ModelView
from ..planning.plan import AfterLoad


@contextmanager
def finished(view: ModelView, after: AfterLoad) -> Iterator[None]:
    """Give modules their extra state and attributes, and run their hooks; undone if that or the `with` block fails.

    Raises:
        CheckpointError: a module's own code fails.
    """
    changed = [view.modules[path] for path in {*after.extra_states, *after.attributes, *after.post_hooks}]
    with _restored_on_failure(changed):
        for path, attributes in after.attributes.items():
            vars(view.modules[path]).update({**attributes, SET_BY_LOADING: tuple(attributes)})
        for path, state in after.extra_states.items():
            module: Any = view.modules[path]
            before = dict(vars(module))
            _run(path, module, "set_extra_state", partial(module.set_extra_state, _value(state)))
            if not saves_extra_state(module):
                names = (name for name, value in vars(module).items() if before.get(name, before) is not value)
                vars(module)[SET_BY_LOADING] = (*before.get(SET_BY_LOADING, ()), *names)
        for path in after.post_hooks:
            module = view.modules[path]
            _run(path, module, "hook after load_state_dict", partial(run_post_hooks, module, [], []))
        yield


def _value(state: Any) -> Any:
    return read_whole(state).clone() if isinstance(state, StoredTensor) else state


def _run(path: str, module: nn.Module, what: str, call: Callable[[], object]) -> None:
    try:
        call()
    except Exception as error:  # a module's own code may raise anything
        raise CheckpointError(
            f"'{path}', a {type(module).__name__}, is not loaded: its {what} raised {type(error).__name__}: {error}"
        ) from error


@contextmanager
def _restored_on_failure(modules: Iterable[nn.Module]) -> Iterator[None]:
    before = [
        (own, dict(own))
        for module in modules
        for own in (vars(module), module._parameters, module._buffers, module._modules)
    ]
    try:
        yield
    except BaseException:  # Ctrl-C too
        for own, values in before:
            own.clear()
            own.update(values)
        raise
