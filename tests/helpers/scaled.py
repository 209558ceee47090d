"""Checkpoints whose weights are small numbers with scales, made as the models' publishers make them."""

import json

import torch
from safetensors.torch import load_file, save_file

FP8 = torch.float8_e4m3fn
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
# Linears that such checkpoints keep in 16 bit.
KEPT = ("embed_tokens", "lm_head", "norm", ".gate.", "router")


def in_blocks(weight, size=(128, 128)):
    """Return numbers in fp8 and the scales of their blocks, (rows, columns) rounded up."""
    rows, columns = weight.shape
    down, across = -(-rows // size[0]), -(-columns // size[1])
    padded = torch.zeros(down * size[0], across * size[1])
    padded[:rows, :columns] = weight.float()
    tiles = padded.view(down, size[0], across, size[1])
    scales = tiles.abs().amax(dim=(1, 3)).clamp(min=1e-9) / 448
    numbers = (tiles / scales[:, None, :, None]).reshape(padded.shape)[:rows, :columns]
    return numbers.contiguous().to(FP8), scales


def by_hand(numbers, scales, size=(128, 128), dtype=torch.bfloat16):
    """Return the values of a matrix, element by element of the formula."""
    rows, columns = torch.arange(numbers.shape[0]), torch.arange(numbers.shape[1])
    return (numbers.float() * scales.float()[rows // size[0]][:, columns // size[1]]).to(dtype)


def in_fp8(folder, end="weight_scale_inv", convert=lambda scales: scales, size=(128, 128), fp4="none", **quantization):
    """Rewrite a saved model in place: each matrix but those kept is stored in fp8 by blocks.

    Args:
        end: what the scales are called, in the place of "weight".
        convert: makes the scales that are stored.
        size: of a block.
        fp4: part of the names that are stored in fp4 instead, in blocks of 1 x 32, with any numbers.
        quantization: what else the config says.
    """
    path = folder / "model.safetensors"
    state = {}
    for name, tensor in load_file(path).items():
        scales_name = f"{name.removesuffix('weight')}{end}"
        if tensor.dim() != 2 or any(part in name for part in KEPT):
            state[name] = tensor
        elif fp4 in name:
            rows, columns = tensor.shape
            state[name] = torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8)
            bits = torch.randint(117, 124, (rows, columns // 32), dtype=torch.uint8)
            state[scales_name] = bits.view(torch.float8_e8m0fnu)
        else:
            state[name], scales = in_blocks(tensor, size)
            state[scales_name] = convert(scales)
    save_file(state, path, metadata={"format": "pt"})
    says(folder, **(BLOCKS | {"weight_block_size": list(size)} | quantization))
    return state


def in_rows(folder, number=FP8, most=448):
    """Rewrite a saved model in place as compressed-tensors does: a scale for each row of a Linear, in bfloat16.

    Returns:
        The values, element by element of the formula.
    """
    path, state, values = folder / "model.safetensors", {}, {}
    for name, tensor in load_file(path).items():
        if tensor.dim() != 2 or any(part in name for part in KEPT):
            state[name] = values[name] = tensor
            continue
        scales = (tensor.float().abs().amax(1, keepdim=True) / most).bfloat16()
        numbers = (tensor.float() / scales.float()).clamp(-most, most)
        state[name] = (numbers if number.is_floating_point else numbers.round()).to(number)
        state[f"{name}_scale"] = scales
        values[name] = (state[name].float() * scales.float()).bfloat16()
    save_file(state, path, metadata={"format": "pt"})
    weights = {"num_bits": 8, "type": "float" if number.is_floating_point else "int", "strategy": "channel"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights | {"symmetric": True, "dynamic": False}}}
    form = "float-quantized" if number.is_floating_point else "int-quantized"
    says(folder, quant_method="compressed-tensors", format=form, config_groups=groups, ignore=["lm_head"])
    return values


def as_exponents(scales):
    """Return the next powers of two, as bytes that hold their exponents."""
    return (scales.log2().round() + 127).to(torch.uint8)


def says(folder, **quantization):
    """Let the config.json of a folder say how the weights are quantized."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(config | {"quantization_config": quantization}))


def in_mxfp4(folder):
    """Rewrite a saved GPT-OSS in place: its experts are stored in mxfp4, with any numbers and scales."""
    path = folder / "model.safetensors"
    state = {}
    for name, tensor in load_file(path).items():
        if tensor.dim() == 3:
            count, columns, rows = tensor.shape
            shape = (count, rows, columns // 32, 16)
            state[f"{name}_blocks"] = torch.randint(0, 256, shape, dtype=torch.uint8)
            state[f"{name}_scales"] = torch.randint(117, 124, shape[:-1], dtype=torch.uint8)
        else:
            state[name] = tensor
    save_file(state, path, metadata={"format": "pt"})
    says(folder, quant_method="mxfp4")
    return state
