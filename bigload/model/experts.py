"""Fused experts: modules that hold the weights of all experts of a layer as 3-D parameters."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True)
class Experts:
    """What is known of one module of fused experts. It holds no path and no tensor.

    An expert computes `down(act(up(x)))` or, with a gate, `down(act(gate(x)) * up(x))`; gate and up are one weight.

    Attributes:
        up: the name of the first parameter: "gate_up_proj", or "up_proj" without a gate.
        down: the name of the second: "down_proj".
        num_experts: E, the first dimension of both.
        hidden_size: H, the features of a token.
        intermediate_size: I, the features that `down` takes.
        up_features: what `up` makes of a token: 2 I with a gate, I without.
        has_gate: whether `up` holds gates too.
        has_bias: whether there are parameters `<up>_bias`, (E, up_features), and `<down>_bias`, (E, H).
        is_transposed: whether the module's parameters are (E, in, out). Quantized, they are turned to (E, out, in).
        arguments: names of what the module's forward takes: the tokens, (T, H); the numbers of their experts, (T, k);
            the weights of these, (T, k).
        kind: "routed" for such a forward; "sorted" for Llama-4's, which takes (E * T, H): all tokens, multiplied by
            their scores, once for each expert.

    Example:
        >>> experts = Experts("gate_up_proj", "down_proj", 8, 64, 32, 64)
        >>> experts.weights
        ('gate_up_proj', 'down_proj')
        >>> experts.packed_shape("down_proj"), experts.plain_shape("down_proj")
        ((8, 64, 32), (8, 64, 32))
    """

    up: str
    down: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    up_features: int
    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = False
    arguments: tuple[str, ...] = ("hidden_states", "top_k_index", "top_k_weights")
    kind: Literal["routed", "sorted"] = "routed"

    @property
    def weights(self) -> tuple[str, str]:
        """The names of the parameters that are quantized, both or none."""
        return self.up, self.down

    @property
    def biases(self) -> tuple[str, ...]:
        """The names of the parameters that stay in 16 bit."""
        return (f"{self.up}_bias", f"{self.down}_bias") if self.has_bias else ()

    def packed_shape(self, weight: str) -> tuple[int, int, int]:
        """Return (E, out_features, in_features) of one of the two weights: the shape of its quant_state."""
        if weight == self.up:
            return self.num_experts, self.up_features, self.hidden_size
        return self.num_experts, self.hidden_size, self.intermediate_size

    def plain_shape(self, weight: str) -> tuple[int, int, int]:
        """Return the shape of one of the two parameters before it is quantized."""
        number, rows, columns = self.packed_shape(weight)
        return (number, columns, rows) if self.is_transposed else (number, rows, columns)

    def activate(self, module: Any, h: torch.Tensor) -> torch.Tensor:
        """Return what `down` takes, (pairs, I), of what `up` made, (pairs, up_features), by the module's own code."""
        if not self.has_gate:
            return module.act_fn(h)  # type: ignore[no-any-return]
        if hasattr(module, "_apply_gate"):  # of each decorated class; GPT-OSS's takes gates and ups in turns
            return module._apply_gate(h)  # type: ignore[no-any-return]
        gate, up = h.chunk(2, dim=-1)
        return module.act_fn(gate) * up  # type: ignore[no-any-return]

    def normalize(self, module: Any, y: torch.Tensor) -> torch.Tensor:
        """Return what `down` made, (pairs, H), through the norm that some classes have behind each expert."""
        if getattr(module, "has_post_expert_norm", False):
            return module.post_expert_norm(y)  # type: ignore[no-any-return]
        return y


def find_experts(
    modules: Mapping[str, nn.Module], blocksize: int = 64, declared: Iterable[str] = ()
) -> dict[str, Experts]:
    """Return the fused experts that can be quantized to 4 bit, by path.

    These are the classes of transformers that its `use_experts_implementation` decorates, Llama-4's, and those that
    `declared` names. Routers are not among them.

    Args:
        modules: a model's modules by path; each once.
        blocksize: the number of weights that will share a scale; an expert must be a whole number of blocks.
        declared: `experts_modules` of the config: names of modules that compute as those of transformers do.

    Raises:
        ConfigError: a declared module does not compute what transformers' experts do.
    """
    found = _survey(modules, blocksize, declared)
    return {path: experts for path, experts in found.items() if isinstance(experts, Experts)}


def unsupported_experts(
    modules: Mapping[str, nn.Module], blocksize: int = 64, declared: Iterable[str] = ()
) -> dict[str, str]:
    """Return the fused experts that stay in 16 bit, by path, each with the reason; arguments as for `find_experts`."""
    found = _survey(modules, blocksize, declared)
    return {path: reason for path, reason in found.items() if isinstance(reason, str)}


def _survey(modules: Mapping[str, nn.Module], blocksize: int, declared: Iterable[str]) -> dict[str, Experts | str]:
    found: dict[str, Experts | str] = {}
    for path, module in modules.items():
        if not _holds_experts(module):
            continue
        facts: Experts | str
        if _is_decorated(type(module)):
            facts = _described(module, tuple(_arguments(module)), "routed")
        elif _is_llama4(type(module)):
            facts = _described(module, ("hidden_states",), "sorted")
        else:
            facts = f"{type(module).__name__} computes its experts in a way of its own"
        if isinstance(facts, Experts):
            facts = _undivided(facts, blocksize) or facts
        found[path] = facts
    return found


def _holds_experts(module: nn.Module) -> bool:
    """Whether a module is named as experts and holds at least one weight of three dimensions itself."""
    weights = (p for p in module._parameters.values() if p is not None and p.is_floating_point() and p.dim() == 3)
    return "expert" in type(module).__name__.lower() and any(weight.numel() for weight in weights)


def _is_decorated(cls: type[nn.Module]) -> bool:
    """Whether transformers' `use_experts_implementation` wrapped the forward of a class, which no subclass replaced."""
    return getattr(cls.forward, "__globals__", {}).get("__name__") == "transformers.integrations.moe"


def _is_llama4(cls: type[nn.Module]) -> bool:
    return (cls.__module__, cls.__name__) == ("transformers.models.llama4.modeling_llama4", "Llama4TextExperts")


def _described(module: Any, arguments: tuple[str, ...], kind: Literal["routed", "sorted"]) -> Experts | str:
    """Return the facts, or why there are none."""
    own = vars(module)
    has_gate, has_bias = own.get("has_gate", True), own.get("has_bias", False)
    is_transposed = own.get("is_transposed", kind == "sorted")
    up, down = "gate_up_proj" if has_gate else "up_proj", "down_proj"
    names = {up, down, *((f"{up}_bias", f"{down}_bias") if has_bias else ())}
    held = {name for name, parameter in module._parameters.items() if parameter is not None}
    if held != names:
        return f"it holds {', '.join(sorted(held))} where {', '.join(sorted(names))} were expected"
    if "forward" in own:
        return "its forward was replaced"
    shapes = [module._parameters[name].shape for name in (up, down)]
    if is_transposed:
        shapes = [torch.Size((*shape[:1], *shape[:0:-1])) for shape in shapes]
    first, second = map(tuple, shapes)
    if len(first) != 3 or len(second) != 3 or first[0] != second[0] or first[2] != second[1]:
        return f"its weights of {first} and {second} do not fit each other"
    if len(arguments) != (3 if kind == "routed" else 1):
        return f"its forward takes {', '.join(arguments)}"
    return Experts(
        up, down, *first[:1], first[2], second[2], first[1], has_gate, has_bias, is_transposed, arguments, kind
    )


def _arguments(module: nn.Module) -> list[str]:
    """Return the names of what a module's forward takes; a decorated one's are those of the function it wraps."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _undivided(experts: Experts, blocksize: int) -> str | None:
    for weight in experts.weights:
        _, rows, columns = experts.packed_shape(weight)
        if rows * columns % blocksize:
            return f"an expert's {weight}, {rows} x {columns}, is not a whole number of blocks of {blocksize}"
    return None
