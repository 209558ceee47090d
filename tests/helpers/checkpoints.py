"""Checkpoints that tests write, load and read back."""

import copy
import json
from collections import defaultdict
from pathlib import Path

import torch
from models import Layers
from safetensors.torch import load_file, save_file
from torch import nn

from bigload import BnbQuantizationConfig, init_empty_weights, load_and_quantize_model

# A config that quantizes nothing.
PLAIN = {"load_in_4bit": True, "skip_modules": ["*"], "torch_dtype": "bf16"}
INDEX_NAME = "model.safetensors.index.json"


def save(state: dict[str, torch.Tensor], folder: Path, shards: int = 1) -> Path:
    """Write tensors as safetensors, in `shards` files and an index, or in one file without. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(_writable(state), folder / "model.safetensors")
        return folder
    files = defaultdict(dict)
    for rank, (name, tensor) in enumerate(state.items()):
        files[f"model-{rank % shards + 1:05}-of-{shards:05}.safetensors"][name] = tensor
    save_shards(files, folder)
    return folder


def save_shards(
    shards: dict[str, dict[str, torch.Tensor]],
    folder: Path,
    weight_map: dict[str, str] | None = None,
    name: str = INDEX_NAME,
) -> Path:
    """Write files of tensors, and their index. Returns the index.

    Args:
        weight_map: what the index says, if that is not where the tensors are.
    """
    for file, tensors in shards.items():
        save_file(_writable(tensors), folder / file)
    found = {tensor: file for file, tensors in shards.items() for tensor in tensors}
    return write_index(found if weight_map is None else weight_map, folder / name)


def _writable(state):
    """Copy tensors: safetensors takes no views, and no two of one storage."""
    return {name: tensor.detach().contiguous().clone() for name, tensor in state.items()}


def write_index(weight_map: dict[str, str], path: Path) -> Path:
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def save_checkpoint(model: nn.Module, folder: Path, shards: int = 1, dtype: torch.dtype | None = None) -> Path:
    """Write a model's weights, each shared tensor under its first name only. Returns the folder.

    Args:
        dtype: what floating-point tensors are cast to.
    """
    state, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
    return save(state, folder, shards)


def empty(build=Layers, *arguments, **options):
    """Build a model without weights."""
    with init_empty_weights():
        return build(*arguments, **options)


def empty_like(model):
    """Build a model of transformers without weights, for inference, by a copy of another's config."""
    return empty(type(model), copy.deepcopy(model.config)).eval()


def loaded(folder, device, config=None, build=Layers, **options):
    """Load a checkpoint into an empty model, with nothing left over."""
    return load_and_quantize_model(empty(build), config, folder, device_map=device, strict=True, **options)


def quantized(folder, device, mode="nf4", build=Layers, dtype=torch.bfloat16, **fields):
    """Write the weights of a random model, the same each time, and load them quantized, for inference.

    Args:
        fields: of the config, beside the mode.
    """
    torch.manual_seed(0)
    save_checkpoint(build(), folder, dtype=dtype)
    return loaded(folder, device, BnbQuantizationConfig.from_mode(mode, **fields), build).eval()


def offloaded(build, folder, device, away, cache, config="nf4", home=None, **options):
    """Load a checkpoint into an empty model of which some parts are offloaded.

    Args:
        away: the names of these parts.
        cache: the offload_folder.
        home: where they are; usually host memory for a GPU, and files for the CPU.
    """
    home = home or ("cpu" if device.type == "cuda" else "disk")
    device_map = {"": device} | dict.fromkeys(away, home)
    return load_and_quantize_model(empty(build), config, folder, device_map=device_map, offload_folder=cache, **options)


def contents(folder: Path) -> dict[str, bytes]:
    """Read all files under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Read what was written with safetensors' own reader."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
