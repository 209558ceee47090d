"""The forward of fused experts in 4 bit whose weights are offloaded, and its gradients.

A call computes with the experts that stay on the device, and those that it lacks are copied by themselves. If it wants
more experts than have room there, those that it wants are copied into a slot; if it wants more than half of all, the
whole module is, as other layers are, and the next one is prefetched. All ways compute what resident experts do, in the
same order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from ..hardware.nested_tensors import send_to_device
from ..quantization.experts import arguments_of, compute_experts, experts_forward, routed
from ..quantization.packed_experts import PackedExperts
from .forwards import StreamedForward
from .on_device.slots import Slot
from .residency import Residency

_T = TypeVar("_T")


class ExpertsForward(StreamedForward):
    """Runs fused experts with those that are wanted on the device.

    Attributes:
        is_usual: the module's own forward is the one that bigload gave it, which computes with a cache too.
    """

    def __init__(self, weights: Residency) -> None:
        """Override the forward of the module that the weights belong to."""
        super().__init__(weights)
        self.is_usual = getattr(self.own, "func", None) is experts_forward

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the experts without gradients."""
        return self.compute(args, kwargs, lambda out: out)

    def run_with_gradients(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the experts; backward computes them once more, with their weights on the device again."""
        args, kwargs = send_to_device((args, kwargs), self.weights.device)
        return _Experts.apply(self, *arguments_of(self.module, args, kwargs), *self.biases())  # type: ignore[no-untyped-call]

    def compute(self, args: Sequence[Any], kwargs: dict[str, Any], then: Callable[[torch.Tensor], _T]) -> _T:
        """Compute the experts.

        Args:
            args, kwargs: as the module's own forward takes them.
            then: called with its output, with the weights still on the device.

        Returns:
            What `then` returns.
        """
        args, kwargs = send_to_device((args, kwargs), self.weights.device)
        if self.is_usual and not self.is_removed:
            out = self._compute_cached(arguments_of(self.module, args, kwargs), then)
            if out is not None:
                return out

        def compute(slot: Slot | None = None) -> _T:
            return then(self.own(*args, **kwargs))

        return compute() if self.is_removed else self.weights.run(compute, is_only_read=True)

    def _compute_cached(self, given: Sequence[Any], then: Callable[[torch.Tensor], _T]) -> _T | None:
        cache = self.weights.cache()
        if cache is None:
            return None
        call = routed(self.module, given, given[0].new_empty(0, device=self.weights.device))
        self.weights.note_pairs(call.ids.numel())
        wanted = cache.wanted(call.ids)
        if wanted is None:
            return None

        def compute(packed: Sequence[PackedExperts]) -> _T:
            return then(compute_experts(self.module, call, packed))

        def compute_in_slot(slot: Slot) -> _T:
            return compute(cache.packed_in(slot.views(self.weights.group.store)))

        out = cache.run(wanted, compute)
        if out is not None:
            return out
        return self.weights.run_with_some(functools.partial(cache.slices, wanted), compute_in_slot)

    def biases(self) -> list[Any]:
        """List the experts' biases that stay on the device; the others are streamed, and so are not trained."""
        module: Any = self.module
        names = module.quantized_experts.biases
        return [module._parameters[name] for name in names if name not in self.weights.leaf.parameters]


class _Experts(torch.autograd.Function):
    """Fused experts in 4 bit. Backward computes them once more, with their weights on the device again.

    Its inputs are what their forward takes, and their biases, which are on the device at all times.
    """

    @staticmethod
    def forward(ctx: Any, streamed: ExpertsForward, *given: torch.Tensor) -> torch.Tensor:
        ctx.streamed, kind = streamed, streamed.weights.device.type
        state = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        ctx.autocast = functools.partial(torch.autocast, kind, *state)
        ctx.save_for_backward(*given)
        inputs = _detached(given, ctx.needs_input_grad[1:])
        with torch.enable_grad():  # by the same kernels as the resident experts
            out: torch.Tensor = streamed.run(*inputs[: len(given) - len(streamed.biases())])
        return out.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        streamed, needed, biases = ctx.streamed, ctx.needs_input_grad[1:], ctx.streamed.biases()
        inputs = _detached(ctx.saved_tensors, needed)  # this refuses biases that were written to meanwhile
        inputs[len(inputs) - len(biases) :] = biases
        wanted = [x for x, needs in zip(inputs, needed, strict=True) if needs]

        def differentiate(out: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(out, wanted, grads)

        with torch.enable_grad(), ctx.autocast():
            found = iter(streamed.compute(inputs[: len(inputs) - len(biases)], {}, differentiate))
        return None, *(next(found) if needs else None for needs in needed)


def _detached(tensors: Sequence[torch.Tensor], needed: Sequence[bool]) -> list[torch.Tensor]:
    return [x.detach().requires_grad_(needs) for x, needs in zip(tensors, needed, strict=True)]
