"""Worlds: the processes of a torch.distributed job, which end by themselves, and find each other by a file.

A check is a function of this folder's `world_*.py`. Every process of a world calls it with its mesh and a folder; what
it returns is what the process has found, as JSON can hold it.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest

HELPERS = Path(__file__).parent
# A world of small models takes seconds; its processes are ended when they take this long.
_PATIENCE_S = 120
TIMEOUTS_S = {"cpu": 4, "cuda": 20}  # of worlds in which one is waited for in vain; NCCL takes seconds to begin
# What torchrun --nproc_per_node 1 sets for its process.
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.multi_gpu])]


def run_world(programs, check: str, ranks: int, folder: Path, device: str = "cpu", timeout_s: float = 30, **given):
    """Run a check in each process of a world. Returns what they have found, by rank; None of one that was killed.

    Args:
        programs: the fixture.
        check: "module.function".
        ranks: the number of processes.
        folder: where they run.
        device: "cpu", with gloo, or "cuda", with NCCL, a GPU for each.
        timeout_s: of the process group.
        given: further arguments of the check.
    """
    code = f"import sys; sys.path.insert(0, {str(HELPERS)!r}); import worlds\n"
    code += f"worlds.start({check!r}, {ranks}, {str(folder)!r}, {device!r}, {timeout_s}, {given!r})"
    folder.mkdir(parents=True, exist_ok=True)
    programs.run(code, folder)
    found = [folder / f"found-{rank}.json" for rank in range(ranks)]
    results = [json.loads(path.read_text()) if path.exists() else None for path in found]
    failed = [result["raised"] for result in results if result is not None and "raised" in result]
    assert not failed, "\n".join(failed)
    return [None if result is None else result["found"] for result in results]


def start(check: str, ranks: int, folder: str, device: str, timeout_s: float, given: dict) -> None:
    """Start the processes and wait for their end."""
    # What every process would import by itself.
    for library in (
        "torch._dynamo",
        "torch.distributed.fsdp",
        "bigload.distributed.joint_load",
        "transformers",
        "peft",
    ):
        importlib.import_module(library)
    how = multiprocessing.get_context("spawn" if device == "cuda" else "fork")
    arguments = (check, ranks, folder, device, timeout_s, given)
    processes = [how.Process(target=_member, args=(rank, *arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    end = time.monotonic() + _PATIENCE_S
    try:
        while any(process.is_alive() for process in processes) and time.monotonic() < end:
            # One that has found something wrong need not be waited for by the others.
            if any("raised" in path.read_text() for path in Path(folder).glob("found-*.json")):
                time.sleep(1)
                break
            processes[0].join(0.05)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _member(rank: int, check: str, ranks: int, folder: str, device: str, timeout_s: float, given: dict) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    os.environ["LOCAL_RANK"] = str(rank)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # where the name of the host is that of no address
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    method, timeout = f"file://{folder}/store", timedelta(seconds=timeout_s)
    try:
        dist.init_process_group(backend, init_method=method, rank=rank, world_size=ranks, timeout=timeout)
        module, _, function = check.partition(".")
        call = getattr(importlib.import_module(module), function)
        result = {"found": call(init_device_mesh(device, (ranks,)), Path(folder), **given)}
    except BaseException:
        result = {"raised": f"rank {rank}: {traceback.format_exc()}"}
    part = Path(folder) / f"part-{rank}.json"
    part.write_text(json.dumps(result))
    part.rename(Path(folder) / f"found-{rank}.json")
    sys.stdout.flush()
    os._exit(0)  # a process group whose other members have ended may hang when it is destroyed
