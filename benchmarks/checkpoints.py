"""Synthetic Llama checkpoints of a named size: random bfloat16 weights, sharded, with a config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from bigload import init_empty_weights

# Hidden size, intermediate size, layers, heads, key-value heads, vocabulary. 1b and 8b are Llama 3's shapes.
SIZES = {
    "tiny": (256, 688, 4, 4, 2, 4096),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}


def make_checkpoint(size: str, folder: Path, shards: int = 4) -> Path:
    """Write a checkpoint, or leave one that is there.

    Args:
        size: a name in `SIZES`.
        folder: where to; made if need be.
        shards: number of files, filled in the order of the model's layers.
    """
    if (folder / "model.safetensors.index.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    with init_empty_weights():
        model = LlamaForCausalLM(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    _write_shards(folder, shapes, shards)
    return folder


def _write_shards(folder: Path, shapes: dict[str, Any], shards: int) -> None:
    weight_map: dict[str, str] = {}
    bound = sum(shape.numel() for shape in shapes.values()) / shards
    shard: dict[str, torch.Tensor] = {}
    noise = torch.randn(2**24).mul_(0.02).bfloat16()  # repeated: drawing eight billion numbers takes minutes
    written = 0

    def flush() -> None:
        nonlocal written
        written += 1
        name = f"model-{written:05}-of-{shards:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes.items():
        shard[name] = noise.repeat(-(-shape.numel() // len(noise)))[: shape.numel()].view(shape).clone()
        if sum(tensor.numel() for tensor in shard.values()) >= bound and written < shards - 1:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
