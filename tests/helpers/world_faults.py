"""What the processes of a world find when one of them fails in a load."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from checkpoints import save
from comparisons import identity_of
from safetensors.torch import load_file
from torch import nn

import bigload
from bigload.distributed import joint_load, parts


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(64, 8)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def files(folder: Path) -> Path:
    """Write the checkpoint, and one of the same names and shapes with other values. All processes may."""
    own = folder / f"of-{dist.get_rank()}"
    torch.manual_seed(0)
    save(Net().state_dict(), own / "net")
    save(Net().state_dict(), own / "other")
    return own


def attempt(path: Path, mesh, mode: str = "nf4-dq", **given) -> dict:
    """Load, and return what was raised, and whether the model is as it was."""
    with bigload.init_empty_weights():
        model = Net()
    before = identity_of(model)
    found = {"error": None, "ranks": [], "said": ""}
    try:
        model = bigload.load_and_quantize_model(model, mode, path, mesh=mesh, progress=False, **given)
        return {**found, "output": model(torch.ones(1, 64, device=mesh.device_type)).sum().item()}
    except bigload.BigloadError as error:
        found = {"error": type(error).__name__, "ranks": getattr(error, "ranks", []), "said": str(error)}
    found["as it was"] = identity_of(model) == before and type(model) is Net
    bigload.load_and_quantize_model(model, mode, path, mesh.device_type, progress=False)  # by this process alone
    return found


def failing(original, act):
    """Return a function that acts in rank 1 before it calls the original."""

    def failed(*args, **kwargs):
        if dist.get_rank() == 1:
            act()
        return original(*args, **kwargs)

    return failed


def faults(mesh, folder: Path, slow_s: float) -> dict:
    """Let rank 1 fail in one way after the other; in the last it dies while it loads."""
    own, rank, found = files(folder), dist.get_rank(), {}
    found["differs"] = attempt(own / ("other" if rank == 1 else "net"), mesh)
    found["other mode"] = attempt(own / "net", mesh, "nf4" if rank == 1 else "nf4-dq")
    found["no file"] = attempt(own / ("net" if rank != 1 else "nowhere"), mesh) if rank != 1 else _absent(own, mesh)
    found["argument"] = attempt(own / "net", mesh) if rank != 1 else _wrong_argument(own, mesh)
    execute = joint_load.execute
    joint_load.execute = failing(execute, _damaged)
    found["fails"] = attempt(own / "net", mesh)
    joint_load.execute = execute
    given = {"adapters": failing(lambda model: model, _wrong_adapters)}
    found["at the end"] = attempt(own / "net", mesh, **given) if rank != 1 else _at_the_end(own, mesh, given)
    joint_load.execute = failing(execute, lambda: time.sleep(slow_s))
    found["slow"] = attempt(own / "net", mesh)
    joint_load.execute = execute
    found["afterwards"] = attempt(own / "net", mesh)
    assert torch.isfinite(torch.tensor(found["afterwards"]["output"]))
    assert set(load_file(own / "net" / "model.safetensors")) == set(Net().state_dict())
    joint_load.execute = failing(execute, _die)
    found["dies"] = attempt(own / "net", mesh)
    return found


def _damaged():
    raise bigload.CheckpointError("the file ended too early")


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _absent(own: Path, mesh) -> dict:
    try:
        bigload.load_and_quantize_model(Net(), "nf4-dq", own / "nowhere", mesh=mesh, progress=False)
    except bigload.CheckpointError as error:
        return {"error": "CheckpointError", "ranks": [], "said": str(error), "as it was": True}
    raise AssertionError("not refused")


def _wrong_argument(own: Path, mesh) -> dict:
    try:
        bigload.load_and_quantize_model(Net(), "nf4-dq", own / "net", "cpu", mesh=mesh, progress=False)
    except bigload.ConfigError as error:
        return {"error": "ConfigError", "ranks": [], "said": str(error), "as it was": True}
    raise AssertionError("not refused")


def _wrong_adapters():
    raise TypeError("of one process alone")


def _at_the_end(own: Path, mesh, given) -> dict:
    with bigload.init_empty_weights():
        model = Net()
    before = identity_of(model)
    try:
        bigload.load_and_quantize_model(model, "nf4-dq", own / "net", mesh=mesh, progress=False, **given)
    except TypeError as error:
        is_same = identity_of(model) == before and type(model) is Net
        return {"error": "TypeError", "ranks": [], "said": str(error), "as it was": is_same}
    raise AssertionError("not refused")


def dies_in_a_collective(mesh, folder: Path) -> dict:
    """Let rank 1 die while the processes exchange the scales of their weights."""
    own = files(folder)
    parts.quantize_scales = failing(parts.quantize_scales, _die)
    return attempt(own / "net", mesh)
