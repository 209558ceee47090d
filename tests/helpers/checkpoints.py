"""Checkpoints that tests write, load and read back."""

import json
from pathlib import Path

import torch
from models import Layers
from safetensors.torch import load_file, save_file
from torch import nn

from bigload import init_empty_weights, load_and_quantize_model


def empty(build=Layers):
    """Build a model without weights."""
    with init_empty_weights():
        return build()


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


def save(state, folder):
    """Write tensors as a checkpoint of one file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors")
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Read what was written with safetensors' own reader."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def contents(folder: Path) -> dict[str, bytes]:
    """Read all files under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def loaded(folder, device, config=None, build=Layers, **options):
    """Load a checkpoint into an empty model, with nothing left over."""
    return load_and_quantize_model(empty(build), config, folder, device_map=device, strict=True, **options)
