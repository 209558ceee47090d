"""Synthetic checkpoints of a named size, quantized or not, and the empty model that belongs to each."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import bigload
from bigload import BnbQuantizationConfig, init_empty_weights

from .files import config_of
from .forms import Entry, noise, quantization_config, stored

INDEX = "model.safetensors.index.json"


class Sizes(NamedTuple):
    """The shape of a Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


# 1b and 8b are Llama 3's shapes, 30b the first Llama's.
LLAMAS = {
    "tiny": Sizes(256, 688, 4, 4, 2, 4096),
    "1b": Sizes(2048, 8192, 16, 32, 8, 128256),
    "8b": Sizes(4096, 14336, 32, 32, 8, 128256),
    "30b": Sizes(6656, 17920, 60, 52, 52, 32000),
}


class MixtureSizes(NamedTuple):
    """The shape of a Qwen3-MoE."""

    hidden: int
    expert: int  # the intermediate size of each
    layers: int
    heads: int
    kv_heads: int
    experts: int
    chosen: int
    vocabulary: int


# Qwen3-30B-A3B's shape with half of its 48 layers.
MIXTURES = {
    "tiny-moe": MixtureSizes(256, 64, 2, 4, 2, 8, 2, 4096),
    "half-30b-a3b": MixtureSizes(2048, 768, 24, 32, 4, 128, 8, 151936),
}


# GPT-OSS 20B's shape, whose experts are stored as the model holds them, fused.
GPT_OSS = {
    "tiny-gpt-oss": MixtureSizes(256, 64, 2, 4, 2, 8, 2, 4096),
    "gpt-oss-20b": MixtureSizes(2880, 2880, 24, 64, 8, 32, 4, 201088),
}


class Many(nn.Module):
    """As many tensors as asked for, each 4 KB in 16 bit: blocks of ten small Linears. It computes nothing."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        starts = range(0, tensors, 10)
        self.blocks = nn.ModuleList(_block(min(10, tensors - start)) for start in starts)


def _block(linears: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(64, 32, bias=False) for _ in range(linears))


def _many(size: str) -> int:
    """Count the tensors of "many-N" ("many-20k"), 0 for any other name."""
    found = re.fullmatch(r"many-([1-9]\d*)(k?)", size)
    return int(found[1]) * (1000 if found[2] else 1) if found else 0


def build(folder: Path) -> nn.Module:
    """Build the empty model that a folder's config.json describes."""
    config = config_of(folder)
    if "many" in config:
        with init_empty_weights():
            return Many(config["many"])
    from bigload.model.transformers_facts import empty_model

    return empty_model(folder)


def make_checkpoint(size: str, folder: Path, shards: int = 4, form: str = "bf16") -> Path:
    """Write a checkpoint of random weights, or leave one that is there.

    Args:
        size: a name in `LLAMAS`, `MIXTURES` or `GPT_OSS`, or "many-N".
        folder: where to; made if need be.
        shards: number of files, filled in the order of the model's layers.
        form: "bf16"; "fp8", by blocks as Qwen3's FP8 checkpoints have it; or "mxfp4", which only GPT-OSS has.

    Raises:
        SystemExit: no such size, or not in this form.
    """
    named = [*LLAMAS, *MIXTURES, *GPT_OSS]
    if size not in named and not _many(size):
        raise SystemExit(f"no size is called '{size}'; there are {', '.join(named)} and many-N, as in many-20k")
    if form != "bf16" and (form == "mxfp4") != (size in GPT_OSS):
        raise SystemExit(f"'{size}' is not made in {form}: {', '.join(GPT_OSS)} are made in mxfp4, the others in fp8")
    if (folder / INDEX).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _write_config(size, folder)
    state = {name: tuple(tensor.shape) for name, tensor in build(folder).state_dict().items()}
    if size in MIXTURES:
        state = dict(each for name, shape in state.items() for each in _one_by_one(name, shape))
    entries = dict(each for name, shape in state.items() for each in stored(name, shape, form))
    groups = list(_grouped({name: entry.nbytes for name, entry in entries.items()}, shards))
    if size in {*MIXTURES, *GPT_OSS}:  # the order in files of transformers, in which the weights of experts alternate
        groups = [sorted(group) for group in groups]
    paths = [folder / _shard_name(number, len(groups)) for number in range(1, len(groups) + 1)]
    drawn = {kind: noise(kind) for kind in {entry.kind for entry in entries.values()}}
    with ThreadPoolExecutor(len(groups)) as pool:  # a file a thread: a file takes one writer at a time
        writing = [
            pool.submit(_write_noise, path, {name: entries[name] for name in group}, drawn)
            for path, group in zip(paths, groups, strict=True)
        ]
        for done in writing:
            done.result()
    if form != "bf16":
        config = config_of(folder) | {"quantization_config": quantization_config(form, state)}
        (folder / "config.json").write_text(json.dumps(config, indent=1))
    _write_index(folder, groups)
    return folder


def _one_by_one(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Give name and shape of what a checkpoint holds for a tensor: the experts of transformers each for itself."""
    layer, _, weight = name.rpartition("experts.")
    if weight == "gate_up_proj":
        experts, rows, columns = shape
        for number in range(experts):
            yield f"{layer}experts.{number}.gate_proj.weight", (rows // 2, columns)
            yield f"{layer}experts.{number}.up_proj.weight", (rows // 2, columns)
    elif weight == "down_proj":
        yield from ((f"{layer}experts.{number}.down_proj.weight", shape[1:]) for number in range(shape[0]))
    else:
        yield name, shape


def _write_config(size: str, folder: Path) -> None:
    if _many(size):
        (folder / "config.json").write_text(json.dumps({"many": _many(size)}))
        return
    from transformers import GptOssConfig, LlamaConfig, Qwen3MoeConfig

    config: Any
    sizes: Sizes | MixtureSizes
    if size in MIXTURES:
        sizes = mixture = MIXTURES[size]
        config, name = Qwen3MoeConfig, "Qwen3MoeForCausalLM"
        own = {"moe_intermediate_size": mixture.expert, "num_experts": mixture.experts}
        own |= {"num_experts_per_tok": mixture.chosen, "head_dim": 128}
    elif size in GPT_OSS:
        sizes = mixture = GPT_OSS[size]
        config, name = GptOssConfig, "GptOssForCausalLM"
        own = {"intermediate_size": mixture.expert, "num_local_experts": mixture.experts}
        own |= {"num_experts_per_tok": mixture.chosen, "head_dim": 64}
    else:
        sizes = llama = LLAMAS[size]
        config, name, own = LlamaConfig, "LlamaForCausalLM", {"intermediate_size": llama.intermediate}
    config(
        **own,
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        vocab_size=sizes.vocabulary,
        tie_word_embeddings=False,
        architectures=[name],
        dtype="bfloat16",
    ).save_pretrained(folder)


def _grouped(nbytes: Mapping[str, int], shards: int) -> Iterator[list[str]]:
    """Divide tensors, in their order, into at most `shards` groups of about as many bytes."""
    bound, group, filled, count = sum(nbytes.values()) / shards, [], 0, 1
    for name, size in nbytes.items():
        group.append(name)
        filled += size
        if filled >= bound * count and count < shards:
            yield group
            group, count = [], count + 1
    if group:
        yield group


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05}-of-{count:05}.safetensors"


def _write_noise(path: Path, entries: Mapping[str, Entry], drawn: Mapping[str, memoryview]) -> None:
    """Write one safetensors file whose values are the noise over and over, without a copy of it in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in entries.items():
        begin, end = end, end + entry.nbytes
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for kind, run in groupby(entries.values(), key=lambda entry: entry.kind):
            nbytes, values = sum(entry.nbytes for entry in run), drawn[kind]
            for at in range(0, nbytes, len(values)):
                file.write(values[: nbytes - at])


def _write_index(folder: Path, groups: list[list[str]]) -> None:
    """Write the index, last of all: a folder that has one is whole."""
    names = {name: _shard_name(number, len(groups)) for number, group in enumerate(groups, 1) for name in group}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def make_quantized(source: Path, folder: Path, mode: str, shards: int = 4) -> Path:
    """Write a checkpoint again as bitsandbytes' layers save themselves, or leave one that is there.

    Args:
        source: the checkpoint in 16 bit.
        folder: where to; made if need be.
        mode: as `BnbQuantizationConfig.from_mode` takes it.
        shards: number of files.
    """
    from safetensors.torch import save_file

    if (folder / INDEX).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    model = bigload.load_and_quantize_model(build(source), mode, source, device_map=device, progress=False)
    state = model.state_dict()
    groups = list(_grouped({name: tensor.nbytes for name, tensor in state.items()}, shards))
    for number, group in enumerate(groups, 1):
        # Copied: layers share bitsandbytes' code tables, and safetensors refuses shared storage.
        shard = {name: state[name].detach().to("cpu", copy=True).contiguous() for name in group}
        save_file(shard, folder / _shard_name(number, len(groups)), metadata={"format": "pt"})
    config = config_of(source) | {"quantization_config": _quantization_config(model, mode)}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _write_index(folder, groups)
    return folder


def _quantization_config(model: nn.Module, mode: str) -> dict[str, Any]:
    """Say in transformers' words how a model was quantized, and which of its layers were not."""
    kept = [path for path, module in model.named_modules() if type(module) is nn.Linear]
    config = BnbQuantizationConfig.from_mode(mode, skip_modules=kept, bnb_4bit_compute_dtype="bf16")
    return dict(config.to_transformers().to_dict())
