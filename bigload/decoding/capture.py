"""`capture_decode`: decode steps of a model are replayed as CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn

from ..errors import ConfigError, counted
from ..model.view import require_module
from ..notation import show
from .decode_steps import DecodeStats, DecodeSteps
from .graphs import graphs_on
from .obstacles import device_of

logger = logging.getLogger(__name__)


def capture_decode(model: nn.Module, *, step: str | None = None, max_graphs: int = 8) -> DecodeCapture:
    """Have decode steps of a model replayed as CUDA graphs, which take the time of the GPU instead of Python's.

    A decode step is a forward with one token of each sequence and a static cache, as
    `model.generate(..., cache_implementation="static")` calls it: greedy, sampling, or with beams. The first step of
    each kind (batch size, shapes, other arguments) runs as before, the second is captured, and from then on a replay
    computes the same values. All other forwards run as before. A step that cannot be captured runs as before too, and
    the reason is logged once, as a warning of the logger `bigload`.

    What a step returns is in memory of its own. Code of the model in Python does not run in a replay: values that it
    would read or change there stay as they were. Where weights, modules, hooks or the attention implementation have
    changed since, a step is captured again.

    Args:
        model: in eval mode on one GPU. While its steps are captured, transformers does not compile them.
        step: the name of the method that computes one step of a model that is not from transformers. Every call of it
            is one. It may change buffers and caches in place.
        max_graphs: how many graphs are kept, those used last. One whose cache is no more is used for the next cache of
            the same shape, whose place it keeps.

    Returns:
        A handle, whose `remove()` ends it. It is a context manager too.

    Raises:
        ConfigError: `model` is no nn.Module, its steps are captured already, it has no such method, or `max_graphs` is
            below 1.

    Examples:
        >>> import bigload, torch
        >>> model = torch.nn.Linear(8, 8)
        >>> bigload.capture_decode(model)
        DecodeCapture(without effect: the model is on cpu, and CUDA graphs need a GPU)
    """
    require_module(model)
    name = "forward" if step is None else step
    if not callable(getattr(model, name, None)):
        raise ConfigError(f"step is {step!r}, but {type(model).__name__} has no method of that name")
    if isinstance(max_graphs, bool) or not isinstance(max_graphs, int) or max_graphs < 1:
        raise ConfigError(f"max_graphs is {max_graphs!r}; expected 1 or more")
    if isinstance(vars(model).get(name), DecodeSteps):
        raise ConfigError(f"the decode steps of this {type(model).__name__} are captured already: call remove() first")
    return DecodeCapture(model, name, max_graphs)


class DecodeCapture:
    """The decode steps of one model, captured; `capture_decode` returns it.

    Attributes:
        without_effect: why it does nothing; None if it has an effect.

    Examples:
        >>> import bigload, torch
        >>> with bigload.capture_decode(torch.nn.Linear(8, 8)) as capture:
        ...     capture.without_effect
        'the model is on cpu, and CUDA graphs need a GPU'
    """

    def __init__(self, model: nn.Module, name: str, max_graphs: int) -> None:
        """Override a method of the model, where it is on a GPU."""
        device = device_of(model) or _first_device(model)
        graphs = graphs_on(device)
        self.without_effect = None if graphs else f"the model is on {device}, and CUDA graphs need a GPU"
        self._steps: DecodeSteps | None = None
        self._restore: list[Callable[[], None]] = []
        if graphs is None:
            logger.warning("capture_decode has no effect: %s", self.without_effect)
            return
        self._steps = DecodeSteps(model, name, device, graphs, max_graphs)
        config = getattr(model, "generation_config", None)
        if config is not None and getattr(config, "disable_compile", True) is None:
            config.disable_compile = True
            self._restore.append(lambda: setattr(config, "disable_compile", None))

    def __repr__(self) -> str:
        if self.without_effect:
            return f"DecodeCapture(without effect: {self.without_effect})"
        stats = self.stats()
        return (
            f"DecodeCapture({counted(stats.replayed, 'step')} replayed, {stats.uncaptured} not, "
            f"{counted(stats.graphs, 'graph')} of {show(stats.nbytes)})"
        )

    def __enter__(self) -> DecodeCapture:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def stats(self) -> DecodeStats:
        """Return what it has done so far.

        Examples:
            >>> import bigload, torch
            >>> bigload.capture_decode(torch.nn.Linear(8, 8)).stats().graphs
            0
        """
        return DecodeStats(0, 0, 0, 0, 0.0, 0, ()) if self._steps is None else self._steps.stats()

    def release(self) -> None:
        """Free the graphs, and the caches that they keep. The next steps are captured again.

        Examples:
            >>> import bigload, torch
            >>> bigload.capture_decode(torch.nn.Linear(8, 8)).release()
        """
        if self._steps is not None:
            self._steps.release()

    def remove(self) -> None:
        """Free the graphs; from now on all steps run as before. May be called again.

        Examples:
            >>> import bigload, torch
            >>> bigload.capture_decode(torch.nn.Linear(8, 8)).remove()
        """
        if self._steps is not None:
            self._steps.remove()
        while self._restore:
            self._restore.pop()()


def _first_device(model: nn.Module) -> torch.device:
    """Return a GPU that a model has tensors on, if there is one."""
    devices = [tensor.device for tensor in (*model.parameters(), *model.buffers())]
    gpus = [device for device in devices if device.type == "cuda"]
    return next(iter([*gpus, *devices]), torch.device("cpu"))
