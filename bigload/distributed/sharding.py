"""Shards a loaded model: torch's own `fully_shard` on each block, with the parts that this process has loaded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..errors import ConfigError, QuantizationError, listed
from ..hardware.interrupts import immediate_interrupts
from ..model.view import ModelView
from ..planning.plan import Plan
from ..planning.units import RESIDENT_BYTES, units_of
from ..quantization.cpu_forwards import streamed_forward
from ..quantization.layers import is_quantized
from .counts import count_values
from .ranks import Ranks
from .shards import NotHere, QuantizedShard, is_divided, not_merged, shard_of


def groups_of(view: ModelView, plan: Plan, classes: Collection[str] | None) -> list[str]:
    """Return the paths of the modules whose weights are gathered together: blocks, and large layers beside them.

    What is left belongs to the model itself, which is not in the list: small weights, weights that are tied to others
    elsewhere, and those that other modules read without calling their own.

    Args:
        view: of the model.
        plan: its plan, of shares.
        classes: names of the classes of blocks, by default the model's own.
    """
    found = []
    for unit in units_of(view, plan.tensors, classes, warns=False):
        path, module = unit.name, view.modules.get(unit.name)
        if len(unit.paths) > 1 or module is None or not path or not unit.has_parameters:
            continue
        below = (name for planned in unit.tensors if planned.tensor.is_parameter for name in planned.tensor.names)
        if not all(name.startswith(f"{path}.") for name in below):
            continue
        is_large = sum(planned.nbytes * _ranks(planned) for planned in unit.tensors) >= RESIDENT_BYTES
        is_read = module in view.read_by_owner
        if unit.is_block or (is_large and not is_read and isinstance(module, (nn.Linear, nn.Embedding))):
            found.append(path)
    return found


def _ranks(planned: Any) -> int:
    return 1 if planned.share is None else planned.share.ranks


# The attribute of a layer that holds those of its attributes that sharding has replaced.
UNSHARDED = "_bigload_unsharded"
# What the error says that refuses to load them from a state_dict; for all layers once.
_NOT_LOADED = "are quantized, and divided among processes"
# The attribute of a model that says how it was sharded.
_SHARDING = "_bigload_sharding"


def require_not_sharded(model: nn.Module) -> None:
    """Refuse to load into a model that has been sharded.

    Raises:
        ConfigError: processes hold parts of it.
    """
    if _SHARDING in vars(model):
        raise ConfigError("the model is loaded already, and divided among processes: build it again")


def _refuse_save() -> NoReturn:
    raise QuantizationError(
        "save_pretrained cannot save a model that processes hold in parts: save it by "
        "bigload.save_quantized_model(model, folder) in all of them"
    )


class _RefuseDDP:
    """Stands for the names that DistributedDataParallel asks a model for before it looks at its weights."""

    def __iter__(self) -> Iterator[str]:
        raise ConfigError(
            "the model is divided among processes by fully_shard, which adds up its gradients: give it to no "
            "DistributedDataParallel, Accelerator.prepare or Trainer, and train it in a loop of your own (for these, "
            "load it with replicate=True)"
        )


def _save_whole_adapters(save: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Save adapters as PEFT does, but not the parts of them that are here, over those of other processes."""
    if kwargs.get("state_dict") is None:
        raise QuantizationError(
            "save_pretrained would save the parts of the adapters that this process holds: call get_model_state_dict("
            "model, options=StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)) in "
            "all processes, and save_pretrained(folder, state_dict=...) with it in the first"
        )
    return save(*args, **kwargs)


def sharding_of(model: nn.Module) -> Sharding | None:
    """Return how a model was sharded; None if it was not."""
    return vars(model).get(_SHARDING)


class Sharding:
    """How a model is to be sharded.

    Attributes:
        groups: paths of the modules whose weights are gathered together, from `groups_of`.
        options: further arguments of `fully_shard`.
        adapters: adds adapters to the model; None for none.
        mesh: of the processes, when it is sharded.
    """

    mesh: Any = None

    def __init__(
        self,
        groups: Sequence[str],
        options: Mapping[str, Any],
        adapters: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        self.groups, self.options, self.adapters = groups, options, adapters

    def shard(
        self, model: nn.Module, parts: dict[str, nn.Parameter], names: Mapping[str, Sequence[str]], ranks: Ranks
    ) -> nn.Module:
        """Put parts into a model, let adapters be added, and apply `fully_shard` to its groups and to itself.

        Args:
            model: its layers are those that compute quantized weights; its weights are on meta.
            parts: of each parameter, by its first name; emptied, so that none stays in memory beside FSDP's.
            names: all names of each, by the first.
            ranks: the processes.

        Returns:
            The model, or what `adapters` has made of it.
        """
        from torch.distributed.fsdp import fully_shard

        quantized = _put(model, parts, names)
        _guard_weights()
        for layer in {id(layer): layer for layer, _ in quantized}.values():
            _adapt(layer, self.groups)
        groups = [model.get_submodule(path) for path in self.groups]
        root = model if self.adapters is None else self._adapted(model, ranks)
        # fully_shard takes no parameters without dimensions. Nothing would add up their gradients.
        ignored = {parameter for parameter in root.parameters() if not parameter.dim()}
        for parameter in ignored:
            parameter.requires_grad_(False)
        _claim(quantized)
        kwargs = {"mesh": ranks.mesh, **self.options} | ({"ignored_params": ignored} if ignored else {})
        for module in groups:
            fully_shard(module, **kwargs)
        fully_shard(root, **kwargs)
        for layer, leaf in quantized:
            _describe(layer._parameters[leaf])
        root.register_forward_pre_hook(_RefuseUnsharded(root), prepend=True)
        for module in root.modules():
            quantizer = vars(module).get("hf_quantizer")
            if quantizer is not None and quantized:
                quantizer.is_serializable = _refuse_save
        self.mesh, self.adapters = ranks.mesh, None  # which may hold anything
        if hasattr(root, "peft_config") and root is not model:
            save: Any = root.save_pretrained
            vars(root)["save_pretrained"] = functools.partial(_save_whole_adapters, save)
        count_values(model, root)
        for module in {id(module): module for module in (model, root)}.values():
            vars(module).update({_SHARDING: self, "_ddp_params_and_buffers_to_ignore": _RefuseDDP()})
        return root

    def _adapted(self, model: nn.Module, ranks: Ranks) -> nn.Module:
        """Add adapters, with the values that the first process gives them."""
        before = {id(parameter) for parameter in model.parameters()}
        assert self.adapters is not None
        with immediate_interrupts():
            root = self.adapters(model)
        if not isinstance(root, nn.Module) or all(module is not model for module in root.modules()):
            raise ConfigError(
                f"adapters must return the model that it is given, or one around it, but returned a "
                f"{type(root).__name__}; pass, for example, lambda model: get_peft_model(model, config)"
            )
        for parameter in root.parameters():
            if id(parameter) not in before and type(parameter) is nn.Parameter:
                parameter.data = parameter.data.to(ranks.device)
                ranks.spread(parameter.data)
        return root


def _put(
    model: nn.Module, parts: dict[str, nn.Parameter], names: Mapping[str, Sequence[str]]
) -> list[tuple[nn.Module, str]]:
    """Put parts into a model; returns the owners of quantized ones, with their names there."""
    quantized = []
    for first in list(parts):
        parameter = parts.pop(first)
        is_quantized_part = isinstance(getattr(parameter, "own", None), QuantizedShard)
        if is_quantized_part:
            _describe(parameter)
        for name in names[first]:
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            owner._parameters[leaf] = parameter
            if is_quantized_part:
                quantized.append((owner, leaf))
    return quantized


def _claim(quantized: Sequence[tuple[nn.Module, str]]) -> None:
    """Let quantized parts claim what fully_shard can take."""
    claimed: dict[int, Any] = {}
    for layer, leaf in quantized:
        part: Any = layer._parameters[leaf]
        if part.dtype != part.own.dtype:
            layer._parameters[leaf] = claimed.setdefault(id(part), part.as_claimed())


class _RefuseUnsharded:
    """A hook of a sharded model that refuses to train parameters that were added to it later.

    Each process would train its own: nothing adds up their gradients.
    """

    def __init__(self, root: nn.Module) -> None:
        self._known = WeakKeyDictionary((module, set(module._parameters)) for module in root.modules())

    def __call__(self, root: nn.Module, args: Any) -> None:
        if not torch.is_grad_enabled():
            return
        new = [
            f"{type(module).__name__}.{leaf}"
            for module in root.modules()
            for leaf, parameter in module._parameters.items()
            if parameter is not None and parameter.requires_grad and leaf not in self._known.get(module, ())
        ]
        if new:
            raise ConfigError(
                f"{listed(new, 3)}: added to the model after it was sharded, so that each process would train its own: "
                "pass load_and_quantize_model adapters=lambda model: get_peft_model(model, config) instead"
            )


@functools.cache
def _guard_weights() -> None:
    """From now on, refuse that a divided weight is exchanged, as by a merge of adapters; called once.

    FSDP would put its own in the place of the new one after the next forward.
    """
    register_module_parameter_registration_hook(_refuse_exchange)


def _refuse_exchange(module: nn.Module, name: str, parameter: Any) -> None:
    if UNSHARDED in vars(module) and is_divided(module._parameters.get(name)):
        raise not_merged(f"{vars(module).get('loaded_as', type(module).__name__)}.{name}")


def _adapt(module: Any, groups: Sequence[str]) -> None:
    """Let a layer, or fused experts, go on where their weight is only there while they compute."""
    own = vars(module)
    module.register_forward_pre_hook(functools.partial(_require_gathered, groups))
    if is_quantized(module):
        own["forward"] = streamed_forward(module)  # keeps no packed copy of the whole weight
        own["quant_state"] = None  # each gathered weight brings its own
    ours = {
        "_save_to_state_dict": functools.partial(nn.Module._save_to_state_dict, module),
        "_load_from_state_dict": functools.partial(_load, module),
    }
    own[UNSHARDED] = {name: own[name] for name in ours if name in own}
    own.update(ours)


def _require_gathered(groups: Sequence[str], module: nn.Module, args: Any) -> None:
    """Refuse a call of a layer by itself, for which FSDP gathers nothing."""
    for parameter in module._parameters.values():
        own = shard_of(parameter)
        if isinstance(own, QuantizedShard):
            name = own.whole.name
            block = max((f"'{path}'" for path in groups if name.startswith(f"{path}.")), key=len, default="the model")
            raise QuantizationError(
                f"'{name}' is divided among processes, and whole only while {block} runs: call that instead of the "
                f"layer alone, in all processes; or call its unshard() before, and its reshard() afterwards"
            )


def _load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *given: Any) -> None:
    """Load what belongs to a quantized layer, but for its weight, of which a process holds a part."""
    missing, error_msgs = given[2], given[4]
    names = [name for name, held in module._parameters.items() if isinstance(shard_of(held), QuantizedShard)]
    mine = {prefix + name for name in names if _is_own(state_dict.get(prefix + name), module._parameters[name])}
    keys = [key for name in names for key in state_dict if key == prefix + name or key.startswith(f"{prefix}{name}.")]
    foreign = [key for key in keys if key not in mine]
    if foreign and not any(_NOT_LOADED in said for said in error_msgs):
        error_msgs.append(
            f"'{foreign[0]}' and others {_NOT_LOADED}: load such weights by load_and_quantize_model with mesh, and "
            "adapters alone by torch.distributed.checkpoint.state_dict: set_model_state_dict(model, state, options="
            "StateDictOptions(full_state_dict=True, strict=False)), without full_state_dict if state is divided too"
        )
    kept = {key: value for key, value in state_dict.items() if key not in keys}
    absent: list[str] = []
    own = functools.partial(nn.Module._load_from_state_dict, module)
    own(kept, prefix, given[0], given[1], absent, given[3], error_msgs)
    missing += [key for key in absent if key.removeprefix(prefix) not in names]


def _is_own(given: Any, held: Any) -> bool:
    """Whether what is to be loaded is what a parameter holds already, as in the model's own state_dict."""
    own, held_part = shard_of(given), shard_of(held)
    assert isinstance(held_part, QuantizedShard)
    return isinstance(own, QuantizedShard) and own.whole is held_part.whole


def _describe(parameter: Any) -> None:
    """Set on a part of a quantized weight, or on what FSDP made of it, what PEFT reads of bitsandbytes' parameters."""
    own = shard_of(parameter)
    assert isinstance(own, QuantizedShard)
    state, away = own.whole.quant_state, NotHere(own.whole.name)
    if state is not None:
        parameter.quant_state = away
        parameter.quant_type, parameter.compress_statistics = state.quant_type, bool(state.nested)
        parameter.blocksize, parameter.quant_storage = state.blocksize, own.whole.storage
    else:
        parameter.CB, parameter.SCB = None, away
        parameter.has_fp16_weights = False


@contextmanager
def unsharded_on_failure(model: nn.Module) -> Iterator[None]:
    """Undo what `shard` does to a model's modules if the `with` block fails."""
    before = [(module, type(module), _contents(module)) for module in model.modules()]
    try:
        yield
    except BaseException:  # Ctrl-C too
        for module, cls, contents in before:
            module.__class__ = cls
            for name in vars(module).keys() - contents.keys():
                del vars(module)[name]
            for name, (value, items) in contents.items():
                vars(module)[name] = value
                if items is not None:
                    value.clear()
                    value.update(items)
        raise


def _contents(module: nn.Module) -> dict[str, tuple[Any, dict[Any, Any] | None]]:
    """Return a module's attributes, with the contents of those that are tables."""
    return {name: (value, dict(value) if isinstance(value, dict) else None) for name, value in vars(module).items()}
