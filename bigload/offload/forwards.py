"""The forwards of modules with offloaded weights, and their backwards."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from ..errors import OffloadError
from ..hardware.nested_tensors import send_to_device
from ..quantization.bnb import library
from ..quantization.cpu_forwards import input_gradient, streamed_forward
from ..quantization.experts import has_quantized_experts
from ..quantization.formats import part_name
from ..quantization.kernels.outliers import outlier_product, suits
from ..quantization.layers import is_quantized
from ..quantization.own_forwards import on_matrix, own_forward, require_input
from ..quantization.quantized_weight import state_around, state_holders
from .leaves import Leaf, MethodOverride, without_torch_function
from .on_device.slot_views import SlotView, as_slot_view, copied_out_of_slot
from .on_device.slots import Slot
from .residency import Residency

# Modules of these do not write to their weights as they run.
_ONLY_READING = ("torch.nn.modules.", "bitsandbytes.nn.", "transformers.pytorch_utils")


class ForwardOverride(MethodOverride):
    """Overrides the forward of a module.

    Attributes:
        path: the module's path in the model.
        own: the module's own forward.
        is_removed: it was removed, and does nothing but call the own forward.
    """

    def __init__(self, path: str, module: nn.Module, own: Callable[..., Any]) -> None:
        self.path, self.own = path, own
        self.is_removed = False
        self.__wrapped__ = own  # for inspect.signature
        super().__init__(module, "forward")

    def remove(self) -> None:
        """Restore the module's own forward; may be called again."""
        self.is_removed = True  # another override that was put over this one may still call it
        super().remove()


def forward_override_of(module: nn.Module) -> ForwardOverride | None:
    """Return bigload's override of a module's forward; None if it has none."""
    forward = vars(module).get("forward")
    return forward if isinstance(forward, ForwardOverride) else None


def require_readable(module: nn.Module) -> None:
    """Refuse to read the weights at rest of a module whose files have changed: that could end the process.

    Raises:
        OffloadError: a file has changed, or is gone.
    """
    forward = forward_override_of(module)
    if isinstance(forward, StreamedForward):
        forward.weights.group.store.require_unchanged()
    elif isinstance(forward, CpuForward) and forward.require_there is not None:
        forward.require_there()


class StreamedForward(ForwardOverride):
    """Runs a leaf with its weights on the device. Autograd keeps the places of its weights, never the slots' memory."""

    def __init__(self, weights: Residency) -> None:
        """Override the forward of the leaf that the weights belong to."""
        leaf = weights.leaf
        super().__init__(leaf.path, leaf.module, streamed_forward(leaf.module))
        self.weights = weights
        self._is_quantized, self._is_experts = is_quantized(leaf.module), has_quantized_experts(leaf.module)
        self._make_forward = _forward_maker(leaf, self.own, has_quantized_weight=self._is_quantized)
        # Not kept by the slots: the background thread that reads into a slot must not keep the model alive.
        self._forwards: dict[Slot, Forward] = {}
        # The output of these is never a view of their weights.
        self._returns_new_tensors = self._is_quantized or self._is_experts or type(leaf.module) is nn.Linear
        self._only_reads = self._is_experts or type(leaf.module).__module__.startswith(_ONLY_READING)
        self._takes_one_argument = self._is_quantized or self._make_forward is not None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the leaf's own forward."""
        if torch.compiler.is_compiling():
            return _run_uncompiled(self, args, kwargs)
        if torch._C._is_tracing():  # torch.jit.trace
            _refuse_export()
        # The own forward refuses another number of arguments.
        if self.is_removed or (self._takes_one_argument and len(args) + len(kwargs) != 1):
            return self.own(*args, **kwargs)
        if not torch.is_grad_enabled():
            return self.run(*args, **kwargs)
        with without_torch_function():
            is_trained = any(parameter.requires_grad for parameter in self.weights.parameters)
        if is_trained:
            return self._run_without_weight_gradients(*args, **kwargs)
        if self._is_quantized:
            return _Quantized.apply(self, self._only_input(args, kwargs), self.module.bias)  # type: ignore[no-untyped-call]
        return self.run_with_gradients(*args, **kwargs)

    def run_with_gradients(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the leaf's own forward, recorded by autograd."""
        return self._run(functools.partial(self._compute_recorded, args, kwargs))

    def _run(self, compute: Callable[[Slot], Any]) -> Any:
        return self.weights.run(compute, is_only_read=self._only_reads)

    def _compute_recorded(self, args: tuple[Any, ...], kwargs: dict[str, Any], slot: Slot) -> Any:
        args, kwargs = send_to_device((args, kwargs), slot.memory.device)
        with torch.autograd.graph.saved_tensors_hooks(functools.partial(as_slot_view, slot.memory), self._unpack):
            out = self.own(*args, **kwargs)
        return copied_out_of_slot(out, slot.memory)

    def _compute(self, args: tuple[Any, ...], kwargs: dict[str, Any], slot: Slot) -> Any:
        # Some models move the input of a convolution to the device of its weight, the CPU.
        args, kwargs = send_to_device((args, kwargs), slot.memory.device)
        out = self.own(*args, **kwargs)
        return out if self._returns_new_tensors else copied_out_of_slot(out, slot.memory)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the leaf's own forward without gradients."""
        if self._make_forward is None:
            return self._run(functools.partial(self._compute, args, kwargs))
        return self.weights.run_in_slot(functools.partial(self._compute_directly, self._only_input(args, kwargs)))

    def _only_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        (x,) = (*args, *kwargs.values())
        return send_to_device(x, self.weights.device)

    def _compute_directly(self, x: torch.Tensor, slot: Slot) -> torch.Tensor:
        forward = self._forwards.get(slot)
        if forward is None:
            assert self._make_forward is not None  # run() has asked
            forward = self._forwards[slot] = self._make_forward(slot.views(self.weights.group.store))
        return forward(x)

    def forget(self, slot: Slot) -> None:
        """Drop what is kept for a slot that was freed."""
        self._forwards.pop(slot, None)

    def _unpack(self, saved: Any) -> torch.Tensor:
        if not isinstance(saved, SlotView):
            return saved  # type: ignore[no-any-return]
        if self.is_removed:
            raise OffloadError(
                f"backward needs a weight of {self.path!r} in memory that remove() has freed: run forward again"
            )
        # A clone, since the slot may be overwritten before backward uses the tensor.
        return self.weights.run(lambda slot: saved.view_in(slot.memory).clone())

    def _run_without_weight_gradients(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            out = self.run(*args, **kwargs)
        dummy = torch.empty(0, device="cpu", requires_grad=True)  # makes autograd call the backward

        def refuse(tensor: torch.Tensor) -> Any:
            if not tensor.is_floating_point():
                return tensor
            return _NoWeightGradient.apply(self.path, tensor, dummy)  # type: ignore[no-untyped-call]

        return tree_map_only(torch.Tensor, refuse, out)


def _refuse_export() -> NoReturn:
    raise OffloadError(
        "a model with offloaded weights cannot be exported or traced: a graph cannot fetch its weights; call "
        "model.offload.remove() first, or load the model without offloading"
    )


# What torch.compiler.assume_constant_result sets; that would import torch._dynamo here and now, which takes more than a
# second. So torch.export(strict=True) calls the function instead of tracing it, and its error stays what it is.
_refuse_export._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_exporting() -> bool:
    """Whether torch.export runs or traces the model now."""
    # Not torch.compiler.is_exporting(): until torch 2.12, Dynamo took it for true in whatever it traces.
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))  # since torch 2.7


def _run_uncompiled(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if is_exporting():
        _refuse_export()
    return _run_eagerly(forward, args, kwargs)


# torch.compiler.disable would import torch._dynamo too.
@_disable_dynamo
def _run_eagerly(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.compiler.is_compiling():  # torch.export runs it without the compiler
        _refuse_export()
    return forward(*args, **kwargs)


class _Quantized(torch.autograd.Function):
    """A quantized layer. bitsandbytes' own autograd keeps the packed weight; this one fetches it again in backward."""

    @staticmethod
    def forward(ctx: Any, streamed: StreamedForward, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out: torch.Tensor = streamed.run(x)
        ctx.streamed, ctx.dtype, ctx.is_int8 = streamed, x.dtype, hasattr(streamed.module, "state")
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out.detach()  # as no view of what was computed: models add to outputs in place

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor | None, torch.Tensor | None]:
        (grad,) = grads
        _, needs_input, needs_bias = ctx.needs_input_grad
        grad_input = grad_bias = None
        if needs_bias:
            # In the order and the dtype of the resident layer, which casts the bias for the product.
            dtype = ctx.dtype if ctx.is_int8 else ctx.streamed.module.compute_dtype or ctx.dtype
            summed = (grad.reshape(-1, grad.shape[-1]) if ctx.is_int8 else grad).to(dtype)
            summed = summed.sum(0) if summed.dim() > 1 else summed
            grad_bias = summed.sum_to_size(summed.shape[-1]).to(ctx.bias_dtype)
        if needs_input:
            streamed = ctx.streamed

            def computed(slot: Slot | None = None) -> torch.Tensor:
                return input_gradient(streamed.module, streamed.own, grad, ctx.dtype)

            grad_input = computed() if streamed.is_removed else streamed.weights.run(computed)
        return None, grad_input, grad_bias


class _NoWeightGradient(torch.autograd.Function):
    """An output of a layer whose weight requires a gradient, which is refused in backward: forward works as usual."""

    @staticmethod
    def forward(ctx: Any, path: str, out: torch.Tensor, dummy: torch.Tensor) -> torch.Tensor:
        ctx.path = path
        return out.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> NoReturn:
        raise OffloadError(
            f"{ctx.path!r} is streamed, so its weight cannot be trained: freeze it (weight.requires_grad_(False)) "
            "or keep it on the device"
        )


class CpuForward(ForwardOverride):
    """Computes a module on the CPU, where its weights stay: of an embedding only the rows looked up are moved.

    Attributes:
        instead: what is called in its place, while steps that graphs replay are noted and captured.
    """

    def __init__(
        self, path: str, module: nn.Module, device: torch.device, require_there: Callable[[], None] | None = None
    ) -> None:
        """Override a module's forward.

        Args:
            path: the module's path.
            module: the module.
            device: where to move its outputs.
            require_there: raises if its weights can no longer be read: to read a mapping of a truncated file would kill
                the process.
        """
        super().__init__(path, module, module.forward)
        self._device, self.require_there = device, require_there
        self.instead: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Move the inputs to the CPU, compute there, and move the outputs to the device."""
        if torch.compiler.is_compiling():
            return _run_uncompiled(self, args, kwargs)
        return self.computed(*args, **kwargs) if self.instead is None else self.instead(*args, **kwargs)

    def computed(self, *args: Any, **kwargs: Any) -> Any:
        """Compute it, whatever is called in its place."""
        if self.is_removed:
            return self.own(*args, **kwargs)
        if self.require_there is not None:
            self.require_there()
        args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to("cpu"), (args, kwargs))
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(self._device), self.own(*args, **kwargs))


Forward = Callable[[torch.Tensor], torch.Tensor]
# The parts of a group in a slot, by the names of its streamed tensors.
Tensors = Mapping[str, torch.Tensor]


def _forward_maker(
    leaf: Leaf, own: Callable[..., Any], *, has_quantized_weight: bool
) -> Callable[[Tensors], Forward] | None:
    """Return what makes a layer's forward as a function of weights in a slot, without gradients.

    Args:
        leaf: the layer.
        own: its own forward.
        has_quantized_weight: whether it is a layer of bitsandbytes.

    Returns:
        None for a layer that must hold its weights while it runs: one of another kind, or with a forward that is not
        that of its class.
    """
    layer: Any = leaf.module
    forward = getattr(own, "__func__", None) or getattr(own, "func", None)
    usual = (type(layer).forward, own_forward(layer)) if has_quantized_weight else (nn.Linear.forward,)
    if leaf.parameters != ("weight",) or forward not in usual:
        return None
    make: Callable[[Any, str, Tensors], Forward] | None = None
    if not has_quantized_weight:
        make = _linear if type(layer).forward is nn.Linear.forward else None
    elif type(layer).forward is library().nn.Linear8bitLt.forward:
        make = _linear_8bit
    # Until its compute dtype is set, a 4-bit layer chooses it in its first forward.
    elif type(layer).forward is library().nn.Linear4bit.forward and layer.compute_type_is_set and layer.compute_dtype:
        make = _linear_4bit
    name = f"{leaf.path}.weight" if leaf.path else "weight"
    return None if make is None else functools.partial(make, layer, name)


def _linear(layer: nn.Linear, name: str, tensors: Tensors) -> Forward:
    weight = tensors[name]
    return lambda x: functional.linear(x, weight, layer.bias)


def _linear_4bit(layer: Any, name: str, tensors: Tensors) -> Forward:
    state = layer.weight.quant_state
    parts = {part: tensors[part_name(name, part)] for part in state_holders(state)}
    weight, state = tensors[name], state_around(state, parts)
    matmul = library().matmul_4bit

    def forward(x: torch.Tensor) -> torch.Tensor:
        require_input(layer, x, weight)
        dtype, bias = layer.compute_dtype, layer.bias
        out = matmul(x.to(dtype), weight, bias=None if bias is None else bias.to(dtype), quant_state=state)
        return out.to(x.dtype)  # type: ignore[no-any-return]

    return forward


def _linear_8bit(layer: Any, name: str, tensors: Tensors) -> Forward:
    weight, state = tensors[name], copy.copy(layer.state)
    state.CB, state.SCB = weight, tensors[part_name(name, "SCB")]
    matmul = library().matmul

    def compute(x: torch.Tensor) -> torch.Tensor:
        bias, state.is_training, state.threshold = layer.bias, layer.training, layer.state.threshold
        bias = None if bias is None else bias.to(x.dtype)
        if suits(state, x, bias):
            return outlier_product(x, weight, state.SCB, state.threshold, bias)
        return matmul(x, weight, bias=bias, state=state)  # type: ignore[no-any-return]

    def forward(x: torch.Tensor) -> torch.Tensor:
        require_input(layer, x, weight)
        return on_matrix(compute, x)

    return forward
