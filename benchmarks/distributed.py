"""Times how the processes of a torch.distributed job get a model: shares, or all of it, by bigload and by peers."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import bigload

from .checkpoints import build
from .files import shards, total_bytes, warm
from .floors import read_and_copy_s
from .host import watched_host
from .limits import describe_machine
from .offload import begin

_STEPS = 5  # of training after the first
_TOKENS = (1, 512)
_RANK, _SCALE = 16, 32
# What loads and training would import when they first need it.
_IMPORTED = ("torch._dynamo", "torch.distributed.fsdp", "bitsandbytes", "transformers", "peft", "bigload.loading")


def measure_distributed(
    folder: Path,
    ways: Sequence[str],
    mode: str,
    device: torch.device,
    commit: str | None,
    tokens: tuple[int, int] = _TOKENS,
) -> Iterator[dict[str, Any]]:
    """Load in each way in all processes, and take some steps of QLoRA where that can be done.

    Args:
        folder: a Llama's or a mixture's checkpoint in 16 bit.
        ways: names in `WAYS`.
        mode: as `load` takes it.
        device: of this process.
        commit: bigload's; by default what git says.
        tokens: sequences, and tokens in each, that each process trains on.

    Yields:
        The result so far in the first process, as docs/benchmarks.md explains it; in the others it has no rows.
    """
    warm(shards(folder))
    begin(device)
    for library in _IMPORTED:
        import_module(library)
    ranks = dist.get_world_size()
    result: dict[str, Any] = {
        "benchmark": "distributed",
        "checkpoint": folder.name,
        "checkpoint_bytes": total_bytes(shards(folder)),
        **describe_machine(str(device), commit),
        "ranks": ranks,
        "mode": mode,
        "floor_s": _floor_s(folder, device),
        "rows": [],
    }
    for way in ways:
        of_ranks: list[Any] = [None] * ranks
        try:
            own = _measured(folder, way, mode, device, tokens)
        except Exception as error:  # what a peer cannot do is a row too
            own = {"error": f"{type(error).__name__}: {error}".split("\n")[0][:300]}
        dist.all_gather_object(of_ranks, own)
        if dist.get_rank() == 0:
            result["rows"].append({"way": way, "ranks": of_ranks})
        yield result


def _measured(folder: Path, way: str, mode: str, device: torch.device, tokens: tuple[int, int]) -> dict[str, Any]:
    load = WAYS[way]
    row: dict[str, Any] = {}
    model: nn.Module | None
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    for name in ("first_s", "load_s"):
        model = None
        gc.collect()
        before = _read_bytes()
        with watched_host(on_gpu=on_gpu) as host:
            dist.barrier()
            begun = time.perf_counter()
            model = load(folder, mode, device)
            _synchronize(device)
            row[name] = round(time.perf_counter() - begun, 4)
    assert model is not None
    row["read_bytes"] = None if before is None else (_read_bytes() or 0) - before
    row["host_over_start_gib"] = host.over_start_gib and round(host.over_start_gib, 4)
    if on_gpu:
        row["held_gib"] = round(torch.cuda.memory_allocated(device) / 2**30, 4)
        row["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 4)
    row |= _trained(model, device, tokens) if way in TRAINED else {}
    del model
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return row


def _trained(model: nn.Module, device: torch.device, tokens: tuple[int, int]) -> dict[str, Any]:
    ids = torch.randint(10, 1000, tokens, device=device, generator=torch.Generator(device).manual_seed(dist.get_rank()))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()
    seconds, losses = [], []
    for _ in range(_STEPS + 1):
        dist.barrier()
        begun = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 5))
        _synchronize(device)
        seconds.append(time.perf_counter() - begun)
    row = {"step_s": round(sorted(seconds[1:])[_STEPS // 2], 4), "losses": losses}
    if device.type == "cuda":
        row["trained_peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 4)
    return row


def _floor_s(folder: Path, device: torch.device) -> float | None:
    """Return the seconds in which one process reads all files once and copies each byte to one of this host's GPUs."""
    found: dict[str, float] = {}
    if device.type == "cuda" and int(os.environ["LOCAL_RANK"]) == 0:
        found = read_and_copy_s(shards(folder), int(os.environ["LOCAL_WORLD_SIZE"]))
    dist.barrier()
    return round(min(found.values()), 4) if found else None


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _read_bytes() -> int | None:
    """Return what this process has read from files, in bytes; None where the system does not tell."""
    path = Path("/proc/self/io")
    if not path.is_file():
        return None
    return int(dict(line.split(": ") for line in path.read_text().splitlines())["rchar"])


def _adapted(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return get_peft_model(model, LoraConfig(r=_RANK, lora_alpha=_SCALE, target_modules=names))


def _mesh(device: torch.device) -> Any:
    return init_device_mesh(device.type, (dist.get_world_size(),))


def _shares(folder: Path, mode: str, device: torch.device) -> nn.Module:
    return bigload.load_and_quantize_model(build(folder), mode, folder, mesh=_mesh(device), progress=False)


def _shares_with_adapters(folder: Path, mode: str, device: torch.device) -> nn.Module:
    given = {"mesh": _mesh(device), "adapters": _adapted, "progress": False}
    return bigload.load_and_quantize_model(build(folder), mode, folder, **given)


def _replicas(folder: Path, mode: str, device: torch.device) -> nn.Module:
    mesh = _mesh(device)
    return bigload.load_and_quantize_model(build(folder), mode, folder, mesh=mesh, replicate=True, progress=False)


def _each_all(folder: Path, mode: str, device: torch.device) -> nn.Module:
    return bigload.load_and_quantize_model(build(folder), mode, folder, device_map=device, progress=False)


def _transformers(folder: Path, mode: str, device: torch.device, storage: str = "uint8") -> nn.Module:
    from transformers import AutoModelForCausalLM

    config = bigload.BnbQuantizationConfig.from_mode(
        mode, bnb_4bit_compute_dtype="bf16", bnb_4bit_quant_storage=storage
    )
    made: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, device_map={"": str(device)}, dtype=torch.bfloat16, quantization_config=config.to_transformers()
    )
    return made


def _accelerates_recipe(folder: Path, mode: str, device: torch.device) -> nn.Module:
    """What accelerate's guide for FSDP and QLoRA asks for: all of it in each process, packed bytes called bfloat16."""
    from torch.distributed.fsdp import fully_shard

    model = _adapted(_transformers(folder, mode, device, "bfloat16"))
    mesh = _mesh(device)
    for parameter in model.parameters():  # FSDP asks for one dtype of what is trained and what is not
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    for module in list(model.modules()):
        if type(module).__name__.endswith("DecoderLayer"):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


WAYS: dict[str, Callable[[Path, str, torch.device], nn.Module]] = {
    "bigload, shares": _shares,
    "bigload, shares with adapters": _shares_with_adapters,
    "bigload, replicas": _replicas,
    "bigload, each loads all": _each_all,
    "transformers, each loads all": _transformers,
    "accelerate's recipe": _accelerates_recipe,
}
TRAINED = ("bigload, shares with adapters", "accelerate's recipe")


def joined(device: str | None) -> torch.device:
    """Join the processes that torchrun, or what sets the same variables, has started; returns the device of this one.

    Raises:
        SystemExit: nothing has.
    """
    if "RANK" not in os.environ:
        raise SystemExit("start it by torchrun: torchrun --nproc_per_node N -m benchmarks distributed FOLDER")
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    place = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return place
