"""What bitsandbytes' own calls make of a weight, and what the formats' definition makes of that."""

import copy

import bitsandbytes.functional as kernels
import torch
from torch import nn

FOUR_BIT = ("nf4", "nf4-dq", "fp4", "fp4-dq")


def quantize_as_bitsandbytes(weight: torch.Tensor, mode: str, blocksize: int = 64, storage=torch.uint8):
    """Return bitsandbytes' tensors by the names that they have in its own functions."""
    if mode == "int8":
        return _int8(weight)
    return parts_of_4bit(*_4bit(weight, mode, blocksize, storage))


def stored_by_bitsandbytes(name: str, weight: torch.Tensor, mode: str, blocksize: int = 64, storage=torch.uint8):
    """Return bitsandbytes' tensors by the names that it gives them in a state_dict."""
    if mode == "int8":
        prefix, parts = name.removesuffix("weight"), _int8(weight)
        row_format = torch.tensor(0, dtype=torch.uint8)
        return {name: parts["weight"], f"{prefix}SCB": parts["SCB"], f"{prefix}weight_format": row_format}
    packed, state = _4bit(weight, mode, blocksize, storage)
    return {name: packed, **{f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}}


def parts_of_4bit(packed: torch.Tensor, state) -> dict[str, torch.Tensor]:
    """Return the tensors of a 4-bit weight and of its quant_state."""
    parts = {"weight": packed, "absmax": state.absmax, "code": state.code}
    if state.nested:
        parts |= {"offset": state.offset, "nested_absmax": state.state2.absmax, "nested_code": state.state2.code}
    return parts


def _int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, row_scales, _ = kernels.int8_vectorwise_quant(weight.half().contiguous())
    return {"weight": rows, "SCB": row_scales}


def _4bit(weight: torch.Tensor, mode: str, blocksize: int, storage: torch.dtype):
    return kernels.quantize_4bit(
        weight.contiguous(),
        blocksize=blocksize,
        quant_type=mode[:3],
        compress_statistics=mode.endswith("-dq"),
        quant_storage=storage,
    )


def quantized_state(full, mode, device, blocksize=64, storage=torch.uint8, skip=("head",)):
    """The state_dict of a model whose Linears bitsandbytes has quantized on a device, those in `skip` left out."""
    modules = full.named_modules(remove_duplicate=False)
    linears = {path for path, module in modules if isinstance(module, nn.Linear) and path not in skip}
    state = {}
    for name, tensor in full.state_dict().items():
        is_quantized = name.endswith("weight") and name.removesuffix("weight").removesuffix(".") in linears
        made = stored_by_bitsandbytes(name, tensor.to(device), mode, blocksize, storage) if is_quantized else {}
        state |= made or {name: tensor}
    return {name: tensor.cpu().clone() for name, tensor in state.items()}


def dequantize_by_hand(parts, shape, blocksize: int = 64) -> torch.Tensor:
    """Undo `quantize_as_bitsandbytes` from the formats' definition alone, in float32."""
    if "SCB" in parts:
        return parts["weight"].float() * parts["SCB"].unsqueeze(1) / 127
    packed = parts["weight"].view(torch.uint8).view(-1).long()
    indices = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)
    scales = parts["absmax"]
    if "offset" in parts:
        nested = parts["nested_absmax"].repeat_interleave(256)[: len(scales)]
        scales = parts["nested_code"][scales.long()] * nested + parts["offset"]
    count = shape[0] * shape[1]
    values = parts["code"][indices[:count]] * scales.repeat_interleave(blocksize)[:count]
    return values.view(shape)


def dequantized_reference(model: nn.Module, mode: str, skip: set[str], dtype: torch.dtype, blocksize: int = 64):
    """The full model, cast to dtype, with each Linear's weight put through bitsandbytes' quantization and back.

    Args:
        model: real weights; not changed.
        skip: paths of the Linears that stay as they are.
    """
    reference = copy.deepcopy(model).to(dtype)
    for path, module in reference.named_modules():
        if type(module) is nn.Linear and path not in skip:
            parts = quantize_as_bitsandbytes(module.weight.detach(), mode, blocksize)
            module.weight = nn.Parameter(dequantize_by_hand(parts, module.weight.shape, blocksize).to(dtype))
    return reference.float()
