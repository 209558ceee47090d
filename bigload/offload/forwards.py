"""The forward of a module whose weights are streamed: they are there while it computes, and for its gradients."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from ..errors import OffloadError
from ..quantization.bnb import library
from ..quantization.cpu_forwards import input_gradient, streamed_forward
from ..quantization.formats import part_name
from ..quantization.layers import is_quantized
from ..quantization.quantized_weight import state_around, state_holders
from .device_hooks import send_to_device
from .leaves import Leaf, MethodOverride
from .residency import Residency
from .slots import Slot


class ForwardOverride(MethodOverride):
    """A forward of ours in place of a module's own.

    Attributes:
        own: the forward that it calls.
        is_removed: it was removed, and does nothing else any more.
    """

    def __init__(self, path: str, module: nn.Module, own: Callable[..., Any]) -> None:
        self.path, self.own = path, own
        self.is_removed = False
        self.__wrapped__ = own  # for inspect.signature
        super().__init__(module, "forward")

    def remove(self) -> None:
        """Return the module its own forward back; once more does no harm."""
        self.is_removed = True  # for whoever has put a forward there since that calls this one
        super().remove()


def forward_override_of(module: nn.Module) -> ForwardOverride | None:
    """Return the forward of ours that a module has; None if it has none."""
    forward = vars(module).get("forward")
    return forward if isinstance(forward, ForwardOverride) else None


class StreamedForward(ForwardOverride):
    """Runs a leaf with its weights on the device. What autograd keeps is where they come from, never they."""

    def __init__(self, weights: Residency) -> None:
        """Take the place of the own forward of the leaf whose weights they are; its module is changed."""
        leaf = weights.leaf
        super().__init__(leaf.path, leaf.module, streamed_forward(leaf.module))
        self.weights = weights
        self._is_quantized = is_quantized(leaf.module)
        self._make_forward = _forward_maker(leaf, self.own, has_quantized_weight=self._is_quantized)
        # Here, not with the slots: what reads into a slot must not keep the model.
        self._forwards: dict[Slot, Forward] = {}
        # What these give is never a part of their weights.
        self._returns_new_tensors = self._is_quantized or type(leaf.module) is nn.Linear
        self._takes_one_argument = self._is_quantized or self._make_forward is not None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the leaf's own forward does."""
        if torch.compiler.is_compiling():
            return _run_eagerly(self, args, kwargs)
        if self.is_removed or (
            self._takes_one_argument and len(args) + len(kwargs) != 1
        ):  # which its own forward refuses
            return self.own(*args, **kwargs)
        if not torch.is_grad_enabled():
            return self.run(*args, **kwargs)
        if any(parameter.requires_grad for parameter in self.weights.parameters):
            return self._run_without_weight_gradients(*args, **kwargs)
        if self._is_quantized:
            (x,) = (*args, *kwargs.values())
            return _Quantized.apply(self, x, self.module.bias)  # type: ignore[no-untyped-call]
        return self.weights.run(functools.partial(self._compute_recorded, args, kwargs))

    def _compute_recorded(self, args: tuple[Any, ...], kwargs: dict[str, Any], slot: Slot) -> Any:
        args, kwargs = send_to_device((args, kwargs), slot.memory.device)
        with torch.autograd.graph.saved_tensors_hooks(functools.partial(_pack, slot.memory), self._unpack):
            out = self.own(*args, **kwargs)
        return _copied_out_of_slot(out, slot.memory)

    def _compute(self, args: tuple[Any, ...], kwargs: dict[str, Any], slot: Slot) -> Any:
        # Some models send what goes into a convolution to where its weight says that it is.
        args, kwargs = send_to_device((args, kwargs), slot.memory.device)
        out = self.own(*args, **kwargs)
        return out if self._returns_new_tensors else _copied_out_of_slot(out, slot.memory)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the module's own forward does, without gradients."""
        if self._make_forward is None:
            return self.weights.run(functools.partial(self._compute, args, kwargs))
        (x,) = (*args, *kwargs.values())
        return self.weights.run_in_slot(functools.partial(self._compute_directly, x))

    def _compute_directly(self, x: torch.Tensor, slot: Slot) -> torch.Tensor:
        forward = self._forwards.get(slot)
        if forward is None:
            assert self._make_forward is not None  # run() has asked
            forward = self._forwards[slot] = self._make_forward(slot.views(self.weights.group.store))
        return forward(x)

    def forget(self, slot: Slot) -> None:
        """Let go of a slot that is no more."""
        self._forwards.pop(slot, None)

    def _unpack(self, saved: Any) -> torch.Tensor:
        if not isinstance(saved, _SlotView):
            return saved  # type: ignore[no-any-return]
        if self.is_removed:
            raise OffloadError(
                f"backward wants a weight of {self.path!r} from memory that remove() has freed: run forward again"
            )
        # A clone: the slot may be another group's before it is used.
        return self.weights.run(lambda slot: saved.view_in(slot.memory).clone())

    def _run_without_weight_gradients(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            out = self.run(*args, **kwargs)
        dummy = torch.empty(0, requires_grad=True)

        def refuse(tensor: torch.Tensor) -> Any:
            if not tensor.is_floating_point():
                return tensor
            return _NoWeightGradient.apply(self.path, tensor, dummy)  # type: ignore[no-untyped-call]

        return tree_map_only(torch.Tensor, refuse, out)


# torch.compiler.disable would import torch._dynamo here and now, which takes more than a second.
@_disable_dynamo
def _run_eagerly(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run outside of what is compiled, where nothing knows that weights come and go."""
    return forward(*args, **kwargs)


class _SlotView(NamedTuple):
    """A tensor that autograd would have kept, by where it lies in the memory of its group."""

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def view_in(self, memory: torch.Tensor) -> torch.Tensor:
        """Return the tensor in a slot that the group is in, (n,), uint8."""
        return memory.view(self.dtype).as_strided(self.shape, self.stride, self.offset)


def _pack(memory: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor | _SlotView:
    if not _lies_in(tensor, memory):
        return tensor
    return _SlotView(tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def _lies_in(tensor: torch.Tensor, memory: torch.Tensor) -> bool:
    if tensor.layout is not torch.strided:
        return False
    return tensor.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()


def _copied_out_of_slot(out: Any, memory: torch.Tensor) -> Any:
    """Copy what a module gives out of its weights themselves, which the next group will overwrite."""

    def apart(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone() if _lies_in(tensor, memory) else tensor

    return apart(out) if isinstance(out, torch.Tensor) else tree_map_only(torch.Tensor, apart, out)


class _Quantized(torch.autograd.Function):
    """A layer of bitsandbytes, whose own autograd keeps the packed weight: here it is fetched again."""

    @staticmethod
    def forward(ctx: Any, streamed: StreamedForward, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out: torch.Tensor = streamed.run(x)
        ctx.streamed, ctx.dtype = streamed, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor | None, torch.Tensor | None]:
        (grad,) = grads
        _, needs_input, needs_bias = ctx.needs_input_grad
        grad_input = grad_bias = None
        if needs_bias:  # autograd sums over what dimensions are left
            grad_bias = grad.sum(0, dtype=ctx.bias_dtype) if grad.dim() > 1 else grad.to(ctx.bias_dtype)
        if needs_input:
            streamed = ctx.streamed

            def computed(slot: Slot | None = None) -> torch.Tensor:
                return input_gradient(streamed.module, streamed.own, grad, ctx.dtype)

            grad_input = computed() if streamed.is_removed else streamed.weights.run(computed)
        return None, grad_input, grad_bias


class _NoWeightGradient(torch.autograd.Function):
    """An output without a gradient, said when it is asked for: until then it is as good as any."""

    @staticmethod
    def forward(ctx: Any, path: str, out: torch.Tensor, dummy: torch.Tensor) -> torch.Tensor:
        ctx.path = path
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> NoReturn:
        raise OffloadError(
            f"{ctx.path!r} is streamed, so its weight cannot be trained: freeze it (weight.requires_grad_(False)) "
            "or keep it on the device"
        )


class CpuForward(ForwardOverride):
    """Runs a module on the host, where its weights are: an embedding sends the rows that were looked up."""

    def __init__(
        self, path: str, module: nn.Module, device: torch.device, require_there: Callable[[], None] | None = None
    ) -> None:
        """Take the place of the module's own forward.

        Args:
            path: of the module.
            module: is changed.
            device: that its results go to.
            require_there: raises where its weights can no longer be read: what maps a file that was cut short would
                end the process.
        """
        super().__init__(path, module, module.forward)
        self._device, self._require_there = device, require_there

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute on the host; tensors go there and their results come back."""
        if torch.compiler.is_compiling():
            return _run_eagerly(self, args, kwargs)
        if self.is_removed:
            return self.own(*args, **kwargs)
        if self._require_there is not None:
            self._require_there()
        args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to("cpu"), (args, kwargs))
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(self._device), self.own(*args, **kwargs))


Forward = Callable[[torch.Tensor], torch.Tensor]
# What is streamed of a layer, where it lies now, by the names of its streamed tensors.
Tensors = Mapping[str, torch.Tensor]


def _forward_maker(
    leaf: Leaf, own: Callable[..., Any], *, has_quantized_weight: bool
) -> Callable[[Tensors], Forward] | None:
    """Return what makes a layer's forward, but for its gradients, around weights that lie elsewhere.

    Args:
        leaf: the layer, and what of it is streamed.
        own: its own forward.
        has_quantized_weight: it is a layer of bitsandbytes.

    Returns:
        None for a layer that must be given its weights: of another kind, or with a forward that is not its class's.
    """
    layer: Any = leaf.module
    forward = getattr(own, "__func__", None) or getattr(own, "func", None)
    if leaf.parameters != ("weight",) or forward is not type(layer).forward:
        return None
    make: Callable[[Any, str, Tensors], Forward] | None = None
    if not has_quantized_weight:
        make = _linear if forward is nn.Linear.forward else None
    elif forward is library().nn.Linear8bitLt.forward:
        make = _linear_8bit
    # Until its compute dtype is set, a 4-bit layer's first forward decides in what it computes.
    elif forward is library().nn.Linear4bit.forward and layer.compute_type_is_set and layer.compute_dtype:
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
        dtype, bias = layer.compute_dtype, layer.bias
        out = matmul(x.to(dtype), weight, bias=None if bias is None else bias.to(dtype), quant_state=state)
        return out.to(x.dtype)  # type: ignore[no-any-return]

    return forward


def _linear_8bit(layer: Any, name: str, tensors: Tensors) -> Forward:
    weight, state = tensors[name], copy.copy(layer.state)
    state.CB, state.SCB = weight, tensors[part_name(name, "SCB")]
    matmul = library().matmul

    def forward(x: torch.Tensor) -> torch.Tensor:
        bias, state.is_training, state.threshold = layer.bias, layer.training, layer.state.threshold
        bias = None if bias is None else bias.to(x.dtype)
        return matmul(x, weight, bias=bias, state=state)  # type: ignore[no-any-return]

    return forward
