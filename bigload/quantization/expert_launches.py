"""What the kernels of `kernels/expert_kernels.py` compute, as functions of tensors; none waits for the GPU."""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType
from typing import Any

import torch

from ..hardware.triton_support import asks_again, runs_on
from .formats import NESTED_BLOCKSIZE
from .packed_experts import PackedExperts

# Shapes of the programs, measured on H100 and H200. Of `grouped`: pairs of an expert, rows of its weight and columns a
# step, warps; for experts with about so many pairs or fewer.
_GEMV = {"block_rows": 8, "block_columns": 2048, "num_warps": 2}
_GROUPED = {4: (16, 64, 128, 4), 32: (32, 64, 128, 4), 2**31: (128, 256, 64, 8)}
# The most pairs that one program sorts.
MAX_ROUTED = 256


@functools.cache
def kernels() -> ModuleType | None:
    """Return the module of the kernels; None without Triton, which torch brings where it supports GPUs."""
    if importlib.util.find_spec("triton") is None:
        return None
    from .kernels import expert_kernels

    return expert_kernels


def suits_kernels(weight: PackedExperts, dtype: torch.dtype) -> bool:
    """Whether there are kernels for a weight: on an NVIDIA GPU, in 16 bit, where rows are whole blocks.

    Args:
        weight: of the experts.
        dtype: that is computed in.
    """
    state = weight.state
    return (
        weight.data.device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and weight.shape[2] % state.blocksize == 0
        and (not state.nested or state.state2.blocksize == NESTED_BLOCKSIZE)
        and runs_kernels(weight.data.device)
    )


@asks_again
@functools.cache
def runs_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels run on a GPU, found out by running one: without a C compiler, for one, they do not."""
    if kernels() is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    slower = "so that fused experts are computed by bitsandbytes alone, which takes several times as long"
    return runs_on(device, functools.partial(route, ids, 1), slower)


def gemv(
    x: torch.Tensor,
    weight: PackedExperts,
    ids: torch.Tensor,
    pairs_per_row: int,
    bias: torch.Tensor | None,
    *,
    gated: bool = False,
) -> torch.Tensor:
    """Multiply one row a pair; for few pairs.

    Args:
        x: (pairs / pairs_per_row, in_features), contiguous.
        weight: of the experts.
        ids: the expert of each pair, contiguous; E and more, or less than 0, for none.
        pairs_per_row: how many pairs in succession have the same row of x.
        bias: (E, out_features) or None.
        gated: the first half of the rows is gates: what is returned is `silu(gate) * up`.

    Returns:
        (pairs, out_features), or half of it if gated, in the dtype of x; 0 for pairs of no expert.
    """
    experts, rows, columns = weight.shape
    out = x.new_empty(ids.numel(), rows // 2 if gated else rows)
    _module().gemv[(-(-rows // _GEMV["block_rows"]), ids.numel())](
        _two_at_a_time(x),
        *_tensors(weight),
        ids,
        out if bias is None else bias,
        out,
        pairs_per_row,
        experts,
        rows,
        columns,
        weight.state.blocksize,
        _GEMV["block_rows"],
        _gemv_columns(weight),
        bias is not None,
        gated,
        weight.state.nested,
        weight.places is not None,
        num_warps=_GEMV["num_warps"],
    )
    return out


def gemv_combined(
    x: torch.Tensor, weight: PackedExperts, ids: torch.Tensor, bias: torch.Tensor | None, weights: torch.Tensor
) -> torch.Tensor:
    """Multiply one row a pair, and add up the products of each token's pairs: `combine` of `gemv` in one launch.

    Args:
        x: (pairs, in_features), contiguous.
        weight: of the experts.
        ids: the expert of each pair, (T, k), contiguous; E and more, or less than 0, for none.
        bias: (E, out_features) or None.
        weights: what each product is multiplied with, (T, k), contiguous.

    Returns:
        (T, out_features), in the dtype of x.
    """
    experts, rows, columns = weight.shape
    tokens, top_k = ids.shape
    out = x.new_empty(tokens, rows)
    choices = next_power_of_2(top_k)
    block_rows = max(1, _GEMV["block_rows"] // choices)
    _module().gemv_combined[(-(-rows // block_rows), tokens)](
        _two_at_a_time(x),
        *_tensors(weight),
        ids,
        out if bias is None else bias,
        weights,
        out,
        top_k,
        experts,
        rows,
        columns,
        weight.state.blocksize,
        choices,
        block_rows,
        _gemv_columns(weight),
        bias is not None,
        weight.state.nested,
        weight.places is not None,
        num_warps=_GEMV["num_warps"],
    )
    return out


def _gemv_columns(weight: PackedExperts) -> int:
    blocksize: int = weight.state.blocksize
    not_wider = next_power_of_2(weight.shape[2] // 2 + 1)  # than the weight, or half of what is computed may be nothing
    return max(blocksize, min(_GEMV["block_columns"], not_wider))


def grouped(
    x: torch.Tensor,
    weight: PackedExperts,
    order: torch.Tensor,
    ends: torch.Tensor,
    pairs_per_row: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Multiply the pairs of each expert, dequantizing its weight in registers; for up to some hundred tokens.

    Args:
        x: (pairs / pairs_per_row, in_features), contiguous.
        weight: of the experts.
        order, ends: as of `Routing`.
        pairs_per_row: how many pairs in succession have the same row of x.
        bias: (E, out_features) or None.

    Returns:
        (pairs, out_features), in the order of the pairs and the dtype of x; any values for pairs of no expert.
    """
    experts, rows, columns = weight.shape
    pairs, state = order.numel(), weight.state
    program = next(shape for most, shape in _GROUPED.items() if pairs <= most * experts)
    block_pairs, block_rows, block_columns, warps = program
    out = x.new_empty(pairs, rows)
    _module().grouped[(-(-rows // block_rows), min(pairs, experts) + pairs // block_pairs)](
        _two_at_a_time(x),
        *_tensors(weight),
        order,
        ends,
        out if bias is None else bias,
        out,
        pairs_per_row,
        experts,
        rows,
        columns,
        state.blocksize,
        next_power_of_2(experts),
        block_pairs,
        block_rows,
        max(state.blocksize, block_columns),
        has_bias=bias is not None,
        nested=state.nested,
        has_places=weight.places is not None,
        num_warps=warps,
        num_stages=1,
    )
    return out


def route(ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort up to `MAX_ROUTED` pairs in one launch: `order` and `ends` as of `Routing`, int32."""
    pairs = ids.numel()
    order = torch.empty(pairs, dtype=torch.int32, device=ids.device)
    ends = torch.empty(num_experts, dtype=torch.int32, device=ids.device)
    padded = next_power_of_2(max(pairs, 16))
    _module().route[(1,)](ids, order, ends, pairs, num_experts, padded, next_power_of_2(num_experts), 16, num_warps=4)
    return order, ends


def dequantize_visited(
    weight: PackedExperts, ends: torch.Tensor, rows: slice, columns: slice, dtype: torch.dtype
) -> torch.Tensor:
    """Dequantize a part of each expert that has pairs.

    Args:
        weight: of the experts.
        ends: as of `Routing`.
        rows, columns: with start and stop, a multiple of 16.
        dtype: of the result.

    Returns:
        (E, rows, columns); the memory of the other experts is not written.
    """
    experts, all_rows, all_columns = weight.shape
    height, width = rows.stop - rows.start, columns.stop - columns.start
    out = torch.empty(experts, height, width, dtype=dtype, device=weight.data.device)
    block = 4096
    _module().dequantize_visited[(-(-height * width // block), experts)](
        *_tensors(weight),
        ends,
        out,
        rows.start,
        columns.start,
        height,
        all_rows,
        all_columns,
        weight.state.blocksize,
        width,
        block,
        nested=weight.state.nested,
        has_places=weight.places is not None,
        num_warps=4,
        enable_fp_fusion=False,  # the scales of double quantization are rounded twice, as by bitsandbytes
    )
    return out


def combine(
    y: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    num_experts: int,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add up the rows of each token's pairs, in fp32.

    Args:
        y: (pairs, H), contiguous.
        ids: the expert of each pair, (T, k), contiguous; rows of those of none are not read.
        weights: what each row is multiplied with, (T, k), contiguous; None for 1.
        num_experts: E.
        places: the row of y of each pair, (pairs,); None where they are in the order of the pairs.

    Returns:
        (T, H), in the dtype of y.
    """
    tokens, top_k = ids.shape
    features, block = y.shape[1], 1024
    out = y.new_empty(tokens, features)
    if tokens:
        _module().combine[(tokens, -(-features // block))](
            y,
            y if places is None else places,
            ids,
            y if weights is None else weights,
            out,
            num_experts,
            features,
            top_k,
            block,
            has_places=places is not None,
            has_weights=weights is not None,
        )
    return out


def combine_backward(
    grad: torch.Tensor,
    y: torch.Tensor,
    order: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    num_experts: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradients of `combine` to y and, unless they are None, the weights.

    Args:
        grad: of what `combine` returned, (T, H), contiguous.
        y, ids, weights, num_experts: as they were given to `combine`, with y in the order of `order`.
        order: as of `Routing`.
    """
    features, block = y.shape[1], 1024
    grad_y = torch.empty_like(y)
    grad_weights = None if weights is None else torch.empty_like(weights)
    _module().combine_backward[(len(order),)](
        grad,
        y,
        order,
        ids,
        y if weights is None else weights,
        grad_y,
        y if grad_weights is None else grad_weights,
        num_experts,
        features,
        ids.shape[1],
        block,
        has_weights=weights is not None,
    )
    return grad_y, grad_weights


def _module() -> Any:
    return kernels()


def _tensors(weight: PackedExperts) -> tuple[torch.Tensor, ...]:
    """Return a weight's tensors in the order of the kernels' arguments; those that it has not are not read."""
    state, places = weight.state, weight.data if weight.places is None else weight.places.table
    if not state.nested:
        return weight.data, weight.scales, state.code, state.code, state.code, state.code, places
    return weight.data, weight.scales, state.code, state.state2.absmax, state.state2.code, state.offset, places


def _two_at_a_time(x: torch.Tensor) -> torch.Tensor:
    """Return pairs of 16-bit values as int32, from a multiple of 16 bytes on, as some kernels read them.

    Memory that another library made, or a view that went through DLPack, may begin anywhere.
    """
    return (x.clone() if x.data_ptr() % 16 else x).view(torch.int32)


def next_power_of_2(number: int) -> int:
    """Return the least power of 2 that is not below a number from 1 on: the size of what one program holds."""
    return 1 << (number - 1).bit_length()
