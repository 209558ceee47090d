"""Models built in the tests, their checkpoints, and references made with bitsandbytes' own calls."""

import copy
import itertools
import json
import os
from pathlib import Path

import bitsandbytes.functional as kernels
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bigload import init_empty_weights, load_and_quantize_model


class Attention(nn.Module):
    """Causal self-attention as minGPT writes it, with its mask as a persistent buffer."""

    def __init__(self, width: int, heads: int, block_size: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.register_buffer("bias", torch.tril(torch.ones(block_size, block_size)).view(1, 1, block_size, block_size))
        self.heads = heads

    def forward(self, x):
        batch, time, width = x.shape
        q, k, v = (
            part.view(batch, time, self.heads, -1).transpose(1, 2) for part in self.c_attn(x).split(width, dim=2)
        )
        scores = (q @ k.transpose(-2, -1)) * k.shape[-1] ** -0.5
        scores = scores.masked_fill(self.bias[:, :, :time, :time] == 0, float("-inf"))
        mixed = scores.softmax(dim=-1) @ v
        return self.c_proj(mixed.transpose(1, 2).reshape(batch, time, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, block_size: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, block_size)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class GPT(nn.Module):
    """A plain module in minGPT's shape and names."""

    def __init__(self, vocab=96, width=64, heads=2, layers=2, block_size=16, tied=False) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab, width),
                "wpe": nn.Embedding(block_size, width),
                "h": nn.ModuleList(Block(width, heads, block_size) for _ in range(layers)),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, tokens):
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.transformer["wte"](tokens) + self.transformer["wpe"](positions)
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


class Layers(nn.Module):
    """Sizes that fill blocks and that do not, an odd number of values, and a name that ends in another's."""

    def __init__(self):
        super().__init__()
        self.c_proj = nn.Linear(160, 128)  # 320 blocks: their nested scales take more than one
        self.norm = nn.LayerNorm(128)
        self.proj = nn.Linear(128, 35, bias=False)
        self.odd = nn.Linear(35, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.odd(torch.relu(self.proj(self.norm(self.c_proj(x))))))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 128)
        self.norm = nn.LayerNorm(128)
        self.fc2 = nn.Linear(128, 64, bias=False)


class Blocks(nn.Module):
    """Two blocks between an embedding and a head, and three buffers of the model's own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.layers = nn.ModuleList([Pair(), Pair()])
        self.register_buffer("positions", torch.arange(7))
        self.register_buffer("scale", torch.ones(3, dtype=torch.float64))
        self.register_buffer("running_mean", torch.ones(5))
        self.head = nn.Linear(64, 10)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer.fc2(layer.norm(layer.fc1(x)))
        return self.head(x)


class Attended(nn.Module):
    """Holds nn.MultiheadAttention, whose out_proj is a subclass of Linear that it reads past its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(64, 64)
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)
        self.leave = nn.Linear(64, 64)
        self.head = nn.Linear(64, 8)

    def forward(self, x):
        x = self.enter(x)
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.head(self.leave(mixed))


def llama(tied: bool, **sizes):
    """A Llama of transformers, random, without weights from anywhere."""
    from transformers import LlamaConfig, LlamaForCausalLM

    options = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    options |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=tied, **(options | sizes)))


def save_checkpoint(model: nn.Module, folder: Path, shards: int = 1, dtype: torch.dtype | None = None) -> Path:
    """Write a model's weights as safetensors, each shared tensor under its first name only, in `shards` files."""
    folder.mkdir(parents=True, exist_ok=True)
    state, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kept = tensor.detach().contiguous().clone()
            state[name] = kept.to(dtype) if dtype and kept.is_floating_point() else kept
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(state)}
    for shard in set(weight_map.values()):
        save_file({name: state[name] for name in state if weight_map[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


FOUR_BIT = ("nf4", "nf4-dq", "fp4", "fp4-dq")


def quantize_as_bitsandbytes(weight: torch.Tensor, mode: str, blocksize: int = 64, storage=torch.uint8):
    """bitsandbytes' own call. Returns its tensors by name."""
    if mode == "int8":
        rows, row_scales, _ = kernels.int8_vectorwise_quant(weight.half().contiguous())
        return {"weight": rows, "SCB": row_scales}
    data, state = kernels.quantize_4bit(
        weight.contiguous(),
        blocksize=blocksize,
        quant_type=mode[:3],
        compress_statistics=mode.endswith("-dq"),
        quant_storage=storage,
    )
    parts = {"weight": data, "absmax": state.absmax, "code": state.code}
    if state.nested:
        parts |= {"offset": state.offset, "nested_absmax": state.state2.absmax, "nested_code": state.state2.code}
    return parts


def stored_by_bitsandbytes(name: str, weight: torch.Tensor, mode: str, blocksize: int = 64, storage=torch.uint8):
    """bitsandbytes' own call. Returns the tensors by the names that it gives them in a state_dict."""
    if mode == "int8":
        rows, row_scales, _ = kernels.int8_vectorwise_quant(weight.half().contiguous())
        prefix = name.removesuffix("weight")
        return {name: rows, f"{prefix}SCB": row_scales, f"{prefix}weight_format": torch.tensor(0, dtype=torch.uint8)}
    packed, state = kernels.quantize_4bit(
        weight.contiguous(),
        blocksize=blocksize,
        quant_type=mode[:3],
        compress_statistics=mode.endswith("-dq"),
        quant_storage=storage,
    )
    return {name: packed, **{f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}}


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


def equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bits, not values: a bfloat16 storage holds patterns that are NaN."""
    return (
        found.dtype == expected.dtype
        and found.shape == expected.shape
        and torch.equal(found.detach().reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
    )


def assert_same_bits(found, expected):
    """Compare two state dicts; bitsandbytes' own writes all that it knows of a quantized weight."""
    assert found.keys() == expected.keys()
    different = [name for name in expected if not equal(found[name].cpu(), expected[name].cpu())]
    assert not different


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().float().cpu(), expected.detach().float().cpu()
    return ((found - expected).norm() / expected.norm()).item()


def save(state, folder):
    """Write tensors as a checkpoint of one file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors")
    return folder


def empty(build=Layers):
    """Build a model without weights."""
    with init_empty_weights():
        return build()


def loaded(folder, device, config=None, build=Layers, **options):
    """Load a checkpoint into an empty model, with nothing left over."""
    return load_and_quantize_model(empty(build), config, folder, device_map=device, strict=True, **options)


def contents(folder: Path) -> dict[str, bytes]:
    """Read all files under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Read what was written with safetensors' own reader."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def failing_at(call: int, error: BaseException):
    """Give an `os.pwrite` that raises at its n-th call."""
    write, calls = os.pwrite, itertools.count(1)

    def pwrite(*arguments):
        if next(calls) == call:
            raise error
        return write(*arguments)

    return pwrite


def lora_losses(model, tokens, steps):
    """Train adapters on a model of transformers, the same each time. Returns the losses."""
    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], lora_dropout=0.0))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(steps):
        loss = model.train()(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
