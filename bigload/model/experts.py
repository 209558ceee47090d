"""Fused experts: modules that hold the weights of all experts of a layer as 3-D parameters."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..errors import ConfigError, listed
from .quantizable import matches


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

    Examples:
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
        """Return what `down` takes, (pairs, I), of what `up` made, (pairs, up_features), by the module's own code.

        It is of the dtype that is computed in: autocast makes float32 of what a power is part of, as in "gelu_new".
        """
        return self._activated(module, h).to(h.dtype)

    def _activated(self, module: Any, h: torch.Tensor) -> torch.Tensor:
        if not self.has_gate:
            return module.act_fn(h)  # type: ignore[no-any-return]
        if hasattr(module, "_apply_gate"):  # of each decorated class; GPT-OSS's takes gates and ups in turns
            return module._apply_gate(h)  # type: ignore[no-any-return]
        gate, up = h.chunk(2, dim=-1)
        return module.act_fn(gate) * up  # type: ignore[no-any-return]

    def is_swiglu(self, module: Any) -> bool:
        """Whether `activate` gives `silu(h[:, :I]) * h[:, I:]` and runs no code of somebody else, as hooks are."""
        act = module._modules.get("act_fn")
        return (
            self.has_gate
            and _is_silu(act.__class__)
            and "forward" not in act.__dict__
            and not (act._forward_hooks or act._forward_pre_hooks)
            and _is_usual_gate(getattr(module, "_apply_gate", None))
        )

    def has_norm(self, module: Any) -> bool:
        """Whether there is a norm behind each expert, as some classes have."""
        return bool(getattr(module, "has_post_expert_norm", False))

    def normalize(self, module: Any, y: torch.Tensor) -> torch.Tensor:
        """Return what `down` made, (pairs, H), through the norm behind each expert, if there is one."""
        return module.post_expert_norm(y) if self.has_norm(module) else y


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


@functools.cache
def _is_silu(cls: type) -> bool:
    return cls is nn.SiLU or (cls.__module__, cls.__name__) == ("transformers.activations", "SiLUActivation")


def _is_usual_gate(method: Any) -> bool:
    """Whether `_apply_gate` is what transformers gives to classes that have none."""
    if method is None:
        return True
    function = getattr(method, "__func__", method)
    name = (getattr(function, "__module__", ""), getattr(function, "__qualname__", ""))
    return name == ("transformers.integrations.moe", "_default_apply_gate")


def _survey(modules: Mapping[str, nn.Module], blocksize: int, declared: Iterable[str]) -> dict[str, Experts | str]:
    names = list(declared)
    found: dict[str, Experts | str] = {}
    for path, module in modules.items():
        if not _holds_experts(module) and not (names and matches(path, names) and _weights(module)):
            continue
        facts: Experts | str
        if _is_decorated(type(module)):
            facts = _described(module, _arguments(type(module).forward), "routed")
        elif _is_llama4(type(module)):
            facts = _described(module, ("hidden_states",), "sorted")
        elif matches(path, names):
            facts = _declared(path, module)
        else:
            facts = f"{type(module).__name__} computes its experts in a way of its own"
        if isinstance(facts, Experts):
            facts = _undivided(facts, blocksize) or facts
        found[path] = facts
    unused = [name for name in names if not any(matches(path, [name]) for path in found)]
    if unused:
        raise ConfigError(f"experts_modules names {listed(unused)}, where the model has no module with 3-D weights")
    return found


def _holds_experts(module: nn.Module) -> bool:
    """Whether a module is named as experts and holds at least one weight of three dimensions itself."""
    return "expert" in type(module).__name__.lower() and bool(_weights(module))


def _weights(module: nn.Module) -> list[torch.Tensor]:
    held = [parameter for parameter in module._parameters.values() if parameter is not None]
    return [weight for weight in held if weight.dim() == 3 and weight.is_floating_point() and weight.numel()]


def _is_decorated(cls: type[nn.Module]) -> bool:
    """Whether transformers' `use_experts_implementation` wrapped the forward of a class, which no subclass replaced."""
    return getattr(cls.forward, "__globals__", {}).get("__name__") == "transformers.integrations.moe"


def _is_llama4(cls: type[nn.Module]) -> bool:
    return (cls.__module__, cls.__name__) == ("transformers.models.llama4.modeling_llama4", "Llama4TextExperts")


def _declared(path: str, module: Any) -> Experts:
    """Return the facts of a module that the config names, found out by running it: a wrong guess would be silent.

    Raises:
        ConfigError: it does not compute what transformers' experts do.
    """
    reason = ""
    for is_transposed in (False, True):
        facts = _described(module, _arguments(type(module).forward), "routed", is_transposed)
        if isinstance(facts, Experts):
            reason = computes_otherwise(module, facts)
            if not reason:
                return facts
        reason = reason or str(facts)
    raise ConfigError(
        f"experts_modules names {path!r}, but {reason}: give it the parameters and the forward of transformers' "
        "experts, or remove it from experts_modules, so that it stays in 16 bit"
    )


def computes_otherwise(module: Any, experts: Experts) -> str:
    """Return how a module's forward differs from what its facts say, tried on stand-ins of its weights; "" if not.

    Tried are both modes, as dropout shows in training alone, and what clamps and capacities change: large tokens,
    weights beyond 0 and 1, and an expert that most tokens choose.

    A stand-in has the shape of a weight and the memory of a few rows: its elements overlap.
    """
    noise = torch.Generator().manual_seed(0)
    tokens = torch.randn(8, experts.hidden_size, generator=noise)
    tokens[3:6] *= 30
    weights = torch.rand(8, 2, generator=noise)
    weights[6:] = torch.tensor([[3.0, -2.0], [-1.0, 5.0]])
    last = experts.num_experts - 1
    ids = torch.tensor([[0, last], [last, last // 2], [last // 2, 0], *[[0, last]] * 5])
    beyond = torch.where(ids == last, experts.num_experts, ids)
    for training in (False, True):
        try:
            twin = _twin(module, training, noise)
            if not _computes(twin, experts, tokens, ids, weights):
                return "its forward computes something else" + (" in training" if training else "")
        except Exception as error:
            return f"it cannot be tried: {error}"
        try:
            if not _computes(twin, experts, tokens, beyond, weights):
                return f"numbers beyond the last expert mean something to {type(module).__name__}"
        except Exception:
            continue  # it never gets such numbers
    return ""


def _twin(module: nn.Module, training: bool, noise: torch.Generator) -> Any:
    """Return a module with stand-ins of a module's parameters, in a mode; the children are copies."""
    twin: Any = object.__new__(type(module))
    twin.__dict__ = {**vars(module), "_parameters": dict(module._parameters)}
    twin.__dict__["_modules"] = copy.deepcopy(module._modules)
    for each in twin.modules():
        each.training = training
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        strides = (1, 7, 3)[: parameter.dim()]
        size = 1 + sum((length - 1) * stride for length, stride in zip(parameter.shape, strides, strict=True))
        values = torch.randn(size, generator=noise) / parameter.shape[-1] ** 0.5
        twin._parameters[name] = nn.Parameter(values.as_strided(parameter.shape, strides), requires_grad=False)
    return twin


def _computes(twin: Any, experts: Experts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> bool:
    """Whether a module's own forward gives what its facts say; an element may be wrong by 1e-4 of its row's largest."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        found = type(twin).forward(twin, x, ids, weights)
        expected = output_in_16_bit(twin, experts, x, ids, weights)
    if found.shape != expected.shape:
        return False
    limit = 1e-4 * (1 + expected.abs().amax(-1, keepdim=True))
    return bool(((found - expected).abs() <= limit).all())


def output_in_16_bit(
    module: Any, experts: Experts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Compute experts that are not quantized, one after the other, as the facts say.

    Args:
        module: the experts.
        experts: what is known of it.
        x: (T, H).
        ids: (T, k); E and more for no expert.
        weights: of the experts, (T, k).

    Returns:
        (T, H).
    """
    out = torch.zeros_like(x)
    up, down = (module._parameters[name] for name in experts.weights)
    up_bias, down_bias = (module._parameters.get(f"{name}_bias") for name in experts.weights)

    def linear(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        values = weight[expert].mT if experts.is_transposed else weight[expert]
        return nn.functional.linear(h, values, None if bias is None else bias[expert])

    for expert in range(experts.num_experts):
        token, choice = (ids == expert).nonzero(as_tuple=True)
        if len(token):
            h = experts.activate(module, linear(x[token], up, up_bias))
            y = experts.normalize(module, linear(h, down, down_bias))
            out.index_add_(0, token, (y * weights[token, choice, None]).to(out.dtype))
    return out


def _described(
    module: Any, arguments: tuple[str, ...], kind: Literal["routed", "sorted"], is_transposed: bool | None = None
) -> Experts | str:
    """Return the facts, or why there are none. What a module does not say of itself is seen in its parameters."""
    held = {name for name, parameter in module._parameters.items() if parameter is not None}
    has_gate = getattr(module, "has_gate", "up_proj" not in held)
    up, down = "gate_up_proj" if has_gate else "up_proj", "down_proj"
    has_bias = getattr(module, "has_bias", f"{down}_bias" in held)
    names = {up, down, *((f"{up}_bias", f"{down}_bias") if has_bias else ())}
    if held != names:
        return f"it holds {', '.join(sorted(held))} where {', '.join(sorted(names))} were expected"
    if "forward" in vars(module):
        return "its forward was replaced"
    if len(arguments) != (3 if kind == "routed" else 1):
        return f"its forward takes {', '.join(arguments)}"
    if is_transposed is None:
        is_transposed = getattr(module, "is_transposed", kind == "sorted")
    first, second = (_packed(module._parameters[name].shape, is_transposed) for name in (up, down))
    fits = len(first) == len(second) == 3 and first[0] == second[0] and first[2] == second[1]
    if not fits or (has_gate and first[1] % 2):
        return f"its weights of {first} and {second} do not fit each other"
    return Experts(
        up, down, first[0], first[2], second[2], first[1], has_gate, has_bias, is_transposed, arguments, kind
    )


def _packed(shape: torch.Size, is_transposed: bool) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2]) if is_transposed and len(shape) > 1 else tuple(shape)


@functools.cache
def _arguments(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of what a class's forward takes; a decorated one's are those of the function it wraps."""
    return tuple(inspect.signature(forward).parameters)[1:]


def _undivided(experts: Experts, blocksize: int) -> str | None:
    for weight in experts.weights:
        _, rows, columns = experts.packed_shape(weight)
        if rows * columns % blocksize:
            return f"an expert's {weight}, {rows} x {columns}, is not a whole number of blocks of {blocksize}"
    return None
