"""Selects the fused experts of a model that are quantized to 4 bit, and says why the others are not."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
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
    stored: Mapping[str, tuple[int, ...]],
    recorded: Collection[str] = (),
) -> dict[str, Experts]:
    """Return the experts that the checkpoint stores quantized, by path.

    Args:
        view: of the model.
        config: its `skip_modules` and `keep_in_fp32_modules` must not name quantized experts.
        tensors: of the model.
        stored: the name in the model of each weight that is stored quantized, and its shape; those of other modules are
            ignored.
        recorded: paths of experts that were quantized when bigload saved the model.

    Raises:
        CheckpointError: one of a module's two weights is stored quantized, and the other is not; or they are stored as
            (E, in_features, out_features).
        ConfigError: the config skips quantized experts.
    """
    names = stored.keys()
    modules = {
        path: module for path, module in _candidates(view, tensors).items() if not names.isdisjoint(_own(path, module))
    }
    if not modules:
        return {}
    found = find_experts(modules, config.bnb_4bit_blocksize, _declared(modules, config, recorded))
    chosen = {path: experts for path, experts in found.items() if names & weights_of({path: experts}).keys()}
    for path, experts in chosen.items():
        weights = weights_of({path: experts})
        absent = [name for name in weights if name not in names]
        if absent:
            raise CheckpointError(
                f"{listed(names & weights.keys())} is stored quantized, but {listed(absent)}, of the same experts, is "
                "not: both must be; use the original checkpoint"
            )
        if experts.is_transposed and path not in recorded:
            _require_turned(path, experts, stored)
        for field_name in ("skip_modules", "keep_in_fp32_modules"):
            if any(matches(name, getattr(config, field_name) or ()) for name in weights):
                raise ConfigError(
                    f"the checkpoint is quantized already, and so is '{path}', which {field_name} names: remove it "
                    "from there, or use the original checkpoint"
                )
    return chosen


def _require_turned(path: str, experts: Experts, stored: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse weights that others than bigload quantized in a module's own layout, where blocks run over its outputs."""
    weights = weights_of({path: experts})
    is_turned = all(stored[full] == experts.packed_shape(name) for full, (_, name) in weights.items())
    can_tell = any(experts.packed_shape(name) != experts.plain_shape(name) for name in experts.weights)
    if not (is_turned and can_tell):
        raise CheckpointError(
            f"{listed(weights)}: stored quantized as (E, in_features, out_features), the layout of this model's "
            "experts; in 4 bit they are computed as (E, out_features, in_features), and transposed they would have "
            "other values: use the original checkpoint"
        )


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
