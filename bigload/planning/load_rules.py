"""Applies what the modules say about their own loading to the tensors of a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.bitsandbytes import QuantizedTensor
from ..checkpoint.checkpoint import Checkpoint
from ..errors import CheckpointError, listed
from ..inspection.own_loading import (
    EXTRA_STATE,
    Outcome,
    follow,
    has_extra_state,
    has_own_load_state_dict,
    has_own_loading,
    own_value,
    passed_on,
    rule_of,
    try_post_hooks,
)
from ..inspection.stand_ins import CannotFollow, memory_of
from ..io.tensors import ComputedTensor, StoredObject, StoredTensor, read_whole
from ..model.tensors import ModelTensor
from ..model.tree import paths_above
from ..model.view import ModelView
from .plan import AfterLoad
from .sources import Found, Source

logger = logging.getLogger(__name__)


class LoadRules:
    """The modules of a model that say something about their own loading.

    Attributes:
        after: what is left to do after the load.
        excused: names of tensors that a module's own loading leaves as they are, without calling them missing.
        resized: the shapes of those that a module's own loading gives another one.
    """

    def __init__(self, view: ModelView, checkpoint: Checkpoint) -> None:
        """Find them.

        Args:
            view: of the model.
            checkpoint: whose tensors will be loaded; its record may say that some are stored as a module's own loading
                leaves them, and what it had set on the module.
        """
        record = checkpoint.record
        done = () if record is None else record.as_loaded
        self._done, self._recorded = tuple(done), {} if record is None else record.attributes
        self._view, self._metadata, self._file = view, checkpoint.metadata, checkpoint.location
        modules = view.modules
        self._with_rule = {path: m for path, m in modules.items() if has_own_loading(m) and path not in done}
        self._with_extra = {path for path, module in modules.items() if has_extra_state(type(module))}  # type: ignore[arg-type]
        self._above = {above for path in self._with_rule for above in paths_above(path)}
        hooked = [path for path, m in reversed(modules.items()) if vars(m).get("_load_state_dict_post_hooks")]
        self.after, self.excused = AfterLoad(post_hooks=tuple(hooked)), set[str]()
        self.resized: dict[str, tuple[int, ...]] = {}
        self._lacking: list[str] = []

    def apply(self, stored: Mapping[str, Found]) -> dict[str, Found]:
        """Return where each tensor of the model is loaded from, by its name; what has no place keeps its key.

        Args:
            stored: by key, in the names of the model's own state_dict.

        Raises:
            CheckpointError: a module's own loading cannot be followed, or finds something wrong.
        """
        found = self._passed_on(dict(stored)) if has_own_load_state_dict(self._view.model) else dict(stored)
        if self._with_rule:
            found = dict(self._followed("", self._view.model, found))
        for path in self._with_extra - self.after.extra_states.keys():
            key = f"{path}.{EXTRA_STATE}".lstrip(".")
            if key in found:
                self.after.extra_states[path] = _as_extra_state(found.pop(key))
            else:
                self._lacking.append(key)
        self._note_resized_before(found)
        for path in self._recorded.keys() & self._view.modules.keys():
            self.after.attributes[path] = {**self.after.attributes.get(path, {}), **self._recorded[path]}
        return found

    def _note_resized_before(self, found: Mapping[str, Found]) -> None:
        """Note the buffers that a saved model's modules had resized by their own loading, which will not run again."""
        for path in self._done:
            module = self._view.modules.get(path)
            for name, own in module._buffers.items() if module is not None else ():
                key = f"{path}.{name}".lstrip(".")
                if own is not None and key in found and found[key].shape != tuple(own.shape):
                    self.resized[key] = found[key].shape

    def fitted(self, tensors: Sequence[ModelTensor]) -> Sequence[ModelTensor]:
        """Return the model's tensors in the shapes that the modules' own loading gives them."""
        if not self.resized:
            return tensors
        return [self._fitted(tensor) if self.resized.keys() & tensor.names else tensor for tensor in tensors]

    def _fitted(self, tensor: ModelTensor) -> ModelTensor:
        shapes = {self.resized.get(name, tensor.shape) for name in tensor.names}
        if len(shapes) > 1:  # tied to one that keeps its shape, which does not fit then
            return tensor
        made = torch.empty(*shapes, dtype=tensor.value.dtype, device="meta")
        is_trained = tensor.value.requires_grad
        return replace(tensor, value=nn.Parameter(made, is_trained) if tensor.is_parameter else made)

    def review(self, missing: list[str], unexpected: list[str]) -> None:
        """Let hooks that follow a load take keys from what is missing and unexpected; warn of missing extra state.

        Raises:
            CheckpointError: a hook uses weights.
        """
        missing += self._lacking
        for path in self.after.post_hooks:
            module = self._view.modules[path]
            try:
                try_post_hooks(module, missing, unexpected)
            except CannotFollow as error:
                hooks = listed(getattr(h, "__qualname__", repr(h)) for h in module._load_state_dict_post_hooks.values())
                raise _not_followed(path, module, f"the hook {hooks} after load_state_dict", error) from error
        lacking = [key for key in self._lacking if key in missing]
        if lacking:
            logger.warning("%s: extra state that the checkpoint lacks; the modules keep their own", listed(lacking))

    def _passed_on(self, stored: dict[str, Found]) -> dict[str, Found]:
        model = self._view.model
        state = {key: _stand_in(found) for key, found in stored.items()}
        objects = {id(value): stored[key] for key, value in state.items()}
        try:
            passed = passed_on(model, state)
            if any(id(value) not in objects for value in passed.values()):
                raise CannotFollow("it makes new values")
        except CannotFollow as error:
            raise _not_followed("", model, f"{type(model).__name__}.load_state_dict", error) from error
        return {key: objects[id(value)] for key, value in passed.items()}

    def _followed(self, path: str, module: nn.Module, local: dict[str, Found]) -> Iterator[tuple[str, Found]]:
        """Load a module and its children as `load_state_dict` does; `local` holds what is below `path`."""
        prefix = f"{path}." if path else ""
        if path in self._with_rule:
            local = self._run(path, module, local)
        if path not in self._above:
            yield from local.items()
            return
        below: dict[str, dict[str, Found]] = {}
        for key, found in local.items():
            child, dot, _ = key[len(prefix) :].partition(".")
            if dot and key.startswith(prefix) and child in module._modules:
                below.setdefault(child, {})[key] = found
            else:
                yield key, found
        for name, child_module in module._modules.items():
            if child_module is not None:
                yield from self._followed(f"{prefix}{name}", child_module, below.get(name, {}))

    def _run(self, path: str, module: nn.Module, local: dict[str, Found]) -> dict[str, Found]:
        prefix = f"{path}." if path else ""
        state = {key: _stand_in(found) for key, found in local.items()}
        run = partial(follow, module, prefix, metadata=self._metadata.get(path, {}))
        try:
            outcome = run(state=state)
        except CannotFollow as error:
            if not local:  # it has nothing to load: the module's tensors count as missing
                return local
            raise _not_followed(path, module, rule_of(module), error) from error
        wrong = [message for message in outcome.errors if not message.startswith("size mismatch for ")]
        if wrong:
            raise CheckpointError(f"'{path}', a {type(module).__name__}, does not load this: {'; '.join(wrong)}")
        packed = [key for key in outcome.used if isinstance(local[key].first, QuantizedTensor)]
        if packed:
            raise CheckpointError(
                f"{listed(packed)}: stored quantized, but {rule_of(module)} of '{path}' computes with the values: use "
                "the original checkpoint"
            )
        if outcome.attributes:
            self.after.attributes[path] = outcome.attributes
        return self._collected(path, module, local, state, outcome, _Replay(module, local, outcome, run))

    def _collected(
        self,
        path: str,
        module: nn.Module,
        local: Mapping[str, Found],
        state: Mapping[str, Any],
        outcome: Outcome,
        replay: _Replay,
    ) -> dict[str, Found]:
        """Return what a rule made of the tensors: those that it only renamed, and those that it computes."""
        prefix = f"{path}." if path else ""
        unchanged = {
            memory_of(value): local[key]
            for key, value in state.items()
            if isinstance(value, torch.Tensor) and not value._version
        }
        objects = {id(value): local[key] for key, value in state.items()}

        def found(kind: str, key: str, value: Any) -> Found:
            if not isinstance(value, torch.Tensor):
                known = objects.get(id(value))
                return known or _of_object(StoredObject(key, self._file, torch.uint8, (0,), 0, 0, value))
            known = unchanged.get(memory_of(value))
            if known is not None:
                return known
            return _found(key, value if not value.is_meta else replay.computed(kind, key, value, self._file))

        own = {f"{prefix}{name}": name for name in (*module._parameters, *module._buffers)}
        # Shapes that do not fit are reported with all others.
        unfit = {key for key in own if any(m.startswith(f"size mismatch for {key}:") for m in outcome.errors)}
        loaded = {key for key, name in own.items() if name in outcome.values}
        for key in loaded - unfit:
            shape = tuple(outcome.values[own[key]].shape)
            if shape != tuple(own_value(module, own[key]).shape):
                self.resized[key] = shape
        self.excused |= own.keys() - loaded - unfit - set(outcome.missing)
        gone = own.keys() - unfit
        if outcome.extra:
            gone |= {f"{prefix}{EXTRA_STATE}"}
            self.after.extra_states[path] = _as_extra_state(found("extra", "", outcome.extra[-1]))
        made = {key: found("state", key, value) for key, value in outcome.state.items() if key not in gone}
        return made | {key: found("values", own[key], outcome.values[own[key]]) for key in loaded}


class _Replay:
    """Runs a module's own loading again, on the values."""

    def __init__(
        self, module: nn.Module, local: Mapping[str, Found], outcome: Outcome, run: Callable[..., Outcome]
    ) -> None:
        self._module, self._local, self._outcome, self._run = module, local, outcome, run
        self._wanted: set[tuple[str, str]] = set()
        self._made: dict[tuple[str, str], torch.Tensor] = {}  # until each is taken

    def computed(self, kind: str, key: str, like: torch.Tensor, file: Any) -> ComputedTensor:
        """Describe one of the tensors that the rule computes."""
        first = next((self._local[used].first for used in sorted(self._outcome.used)), None)
        at = (file, 0) if first is None else (first.file, first.offset)
        self._wanted.add((kind, key))
        load = partial(self._load, kind, key)
        return ComputedTensor(key, at[0], like.dtype, tuple(like.shape), at[1], like.nbytes, load)

    def _load(self, kind: str, key: str) -> torch.Tensor:
        if (kind, key) not in self._made:
            self._made = self._all()
        return self._made.pop((kind, key))

    def _all(self) -> dict[tuple[str, str], torch.Tensor]:
        with torch.device("cpu"):
            state = {
                key: _whole(found) if key in self._outcome.used else _stand_in(found)
                for key, found in self._local.items()
            }
            written = {name: _real(own_value(self._module, name)) for name in self._outcome.written}
            outcome = self._run(state=state, written=written)
        results = {
            **{("state", key): value for key, value in outcome.state.items()},
            **{("values", name): value for name, value in outcome.values.items()},
            ("extra", ""): outcome.extra[-1] if outcome.extra else None,
        }
        return {key: results[key].detach() for key in self._wanted}


def _stand_in(found: Found) -> Any:
    if isinstance(found.first, StoredObject):
        return found.first.value
    (dtype,) = {source.tensor.dtype for source in found.sources[:1]}
    return torch.empty(found.shape, dtype=dtype, device="meta")


def _whole(found: Found) -> torch.Tensor:
    """Read all of a tensor; the result is its own."""
    (source, *others) = found.sources
    if not others and not source.region and not source.transposed:
        return _read(source).clone()
    whole = torch.empty(found.shape, dtype=source.tensor.dtype)
    for each in found.sources:
        part = whole[each.region] if each.region else whole
        part = part.mT if each.transposed else part
        part.copy_(_read(each).view(part.shape))
    return whole


def _read(source: Source) -> torch.Tensor:
    return read_whole(source.tensor) if isinstance(source.tensor, StoredTensor) else source.tensor.detach().cpu()


def _real(tensor: torch.Tensor) -> torch.Tensor:
    data = tensor.detach()
    return torch.empty(data.shape, dtype=data.dtype) if data.is_meta else data.cpu().clone()


def _found(name: str, tensor: torch.Tensor | ComputedTensor) -> Found:
    stored = tensor
    if isinstance(tensor, torch.Tensor):
        values = tensor.detach()
        return Found((Source(values),), tuple(values.shape), _described(name, values))
    assert isinstance(stored, StoredTensor)
    return Found((Source(stored),), stored.shape, stored)


def _described(name: str, values: torch.Tensor) -> StoredTensor:
    return ComputedTensor(name, Path(), values.dtype, tuple(values.shape), 0, values.nbytes, lambda: values)


def _of_object(stored: StoredObject) -> Found:
    return Found((Source(stored),), (0,), stored)


def _as_extra_state(found: Found) -> Any:
    if isinstance(found.first, StoredObject):
        return found.first.value
    (source,) = found.sources
    return source.tensor


def _not_followed(path: str, module: nn.Module, rule: str, error: CannotFollow) -> CheckpointError:
    where = repr(path) if path else "the model"
    return CheckpointError(
        f"{where}, a {type(module).__name__}, is loaded by {rule}, which cannot be followed here: {error}. Load the "
        "model with load_state_dict, then pass it without weights_location"
    )
