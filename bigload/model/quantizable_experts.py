"""Selects the fused experts of a model that are quantized to 4 bit, and says why the others are not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from ..config import BnbQuantizationConfig
from ..errors import CheckpointError, ConfigError, listed
from .experts import Experts, find_experts, unsupported_experts
from .quantizable import matches, meant_to_stay, one_of
from .tensors import ModelTensor
from .view import ModelView


@dataclass(frozen=True)
class ChosenExperts:
    """The fused experts of a model, by the path of the module that holds them.

    Attributes:
        quantized: those that are quantized.
        plain: those that stay in 16 bit although nobody asked for that, each with the reason.
    """

    quantized: Mapping[str, Experts] = field(default_factory=dict)
    plain: Mapping[str, str] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, tuple[str, str]]:
        """Name of each quantized parameter -> the path of its module, and its name there."""
        return weights_of(self.quantized)

    def without(self, paths: Iterable[str], reason: str) -> ChosenExperts:
        """Return them with some of the quantized ones left in 16 bit, for a reason."""
        left = set(paths) & self.quantized.keys()
        if not left:
            return self
        quantized = {path: experts for path, experts in self.quantized.items() if path not in left}
        return ChosenExperts(quantized, {**self.plain, **dict.fromkeys(sorted(left), reason)})


def weights_of(experts: Mapping[str, Experts]) -> dict[str, tuple[str, str]]:
    """Return the name of each quantized parameter -> the path of its module, and its name there."""
    return {f"{path}.{name}".lstrip("."): (path, name) for path, held in experts.items() for name in held.weights}


def experts_to_quantize(
    view: ModelView, config: BnbQuantizationConfig, tensors: Sequence[ModelTensor]
) -> ChosenExperts:
    """Choose the experts to quantize. Both weights of a module are quantized, or none.

    Skipped are, as among Linears, tied weights, and what `skip_modules`, `keep_in_fp32_modules` or the model's class
    name, by the module or by the weight.

    Args:
        view: of the model.
        config: with every "auto" resolved.
        tensors: of the model.

    Raises:
        ConfigError: a module in `experts_modules` does not compute what transformers' experts do.
    """
    modules = _candidates(view, tensors)
    declared = config.experts_modules or ()
    if not modules and not declared:
        return ChosenExperts()
    found = find_experts(modules, config.bnb_4bit_blocksize, declared)
    plain = dict(unsupported_experts(modules, config.bnb_4bit_blocksize, declared))
    _, patterns = meant_to_stay(view, config)
    stays = one_of(patterns).search
    names = {name: tensor for tensor in tensors for name in tensor.names}
    chosen = {}
    for path, experts in found.items():
        weights = [f"{path}.{name}".lstrip(".") for name in experts.weights]
        if any(stays(name) for weight in weights for name in names[weight].names):
            continue
        if not config.load_in_4bit:
            plain[path] = f"{config.mode} has no kernel for fused experts"
        elif any(len({id(view.owner(name)) for name in names[weight].names}) > 1 for weight in weights):
            plain[path] = "tied to other modules' weights"
        else:
            chosen[path] = experts
    left = {path: why for path, why in plain.items() if not any(map(stays, _own(path, modules[path])))}
    return ChosenExperts(chosen, left)


def experts_stored_quantized(
    view: ModelView,
    config: BnbQuantizationConfig,
    tensors: Sequence[ModelTensor],
    stored: Iterable[str],
    declared: Iterable[str] = (),
) -> dict[str, Experts]:
    """Return the experts that the checkpoint stores quantized, by path.

    Args:
        view: of the model.
        config: its `skip_modules` and `keep_in_fp32_modules` must not name quantized experts.
        tensors: of the model.
        stored: the names in the model of all weights that are stored quantized; those of other modules are ignored.
        declared: paths of experts that were quantized when the model was saved.

    Raises:
        CheckpointError: one of a module's two weights is stored quantized, and the other is not.
        ConfigError: the config skips quantized experts.
    """
    names = set(stored)
    modules = {
        path: module for path, module in _candidates(view, tensors).items() if not names.isdisjoint(_own(path, module))
    }
    if not modules:
        return {}
    found = find_experts(modules, config.bnb_4bit_blocksize, _declared(modules, config, declared))
    chosen = {path: experts for path, experts in found.items() if names & weights_of({path: experts}).keys()}
    for path, experts in chosen.items():
        weights = weights_of({path: experts})
        absent = [name for name in weights if name not in names]
        if absent:
            raise CheckpointError(
                f"{listed(names & weights.keys())} is stored quantized, but {listed(absent)}, of the same experts, is "
                "not: both must be; use the original checkpoint"
            )
        for field_name in ("skip_modules", "keep_in_fp32_modules"):
            if any(matches(name, getattr(config, field_name) or ()) for name in weights):
                raise ConfigError(
                    f"the checkpoint is quantized already, and so is '{path}', which {field_name} names: remove it "
                    "from there, or use the original checkpoint"
                )
    return chosen


def experts_recorded(
    view: ModelView, config: BnbQuantizationConfig, tensors: Sequence[ModelTensor], paths: Iterable[str]
) -> dict[str, Experts]:
    """Return the experts that were quantized when the model was saved, by path.

    Raises:
        CheckpointError: a path is not that of experts that can be quantized.
    """
    wanted = list(paths)
    if not wanted:
        return {}
    modules = _candidates(view, tensors)
    found = find_experts(modules, config.bnb_4bit_blocksize, _declared(modules, config, wanted))
    unknown = [path for path in wanted if path not in found]
    if unknown:
        raise CheckpointError(
            f"{listed(unknown)}: experts that were quantized when the model was saved, but in this one no experts "
            "that can be: build the model that was saved, or name them in experts_modules"
        )
    return {path: found[path] for path in wanted}


def _candidates(view: ModelView, tensors: Sequence[ModelTensor]) -> dict[str, nn.Module]:
    """Return the modules that hold a 3-D parameter of their own, each by its first path."""
    paths = {tensor.name.rpartition(".")[0] for tensor in tensors if tensor.is_parameter and tensor.value.dim() == 3}
    return {path: module for path, module in view.modules.items() if path in paths} if paths else {}


def _declared(modules: Mapping[str, nn.Module], config: BnbQuantizationConfig, paths: Iterable[str]) -> list[str]:
    """Return what is declared to be experts and is among some modules."""
    names = [*(config.experts_modules or ()), *paths]
    return [name for name in names if any(matches(path, [name]) for path in modules)]


def _own(path: str, module: nn.Module) -> list[str]:
    return [f"{path}.{name}".lstrip(".") for name in module._parameters]
