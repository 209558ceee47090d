"""What the processes of a world find when not all of them make the same calls."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist
from world_faults import Net, attempt, files

import bigload


def once(folder: Path, name: str, rank: int, act) -> dict | None:
    """Let one process act alone; the others wait until it is over, without a word to it. Returns what it found."""
    over = folder / f"{name} is over"
    if dist.get_rank() == rank:
        found = act()
        over.touch()
        return found
    while not over.exists():
        time.sleep(0.05)
    return None


def refused(act) -> dict:
    """Return what a call raised."""
    try:
        act()
    except bigload.BigloadError as error:
        return {"error": type(error).__name__, "ranks": getattr(error, "ranks", []), "said": str(error)}
    return {"error": None, "ranks": [], "said": ""}


def loaded(path: Path, mesh, mode: str = "nf4"):
    with bigload.init_empty_weights():
        model = Net()
    return bigload.load_and_quantize_model(model, mode, path, mesh=mesh, progress=False)


def calls_of_some(mesh, folder: Path) -> dict:
    """Let one process make calls that the others do not make; after each, all of them make one."""
    own, found = files(folder), {}
    for name, rank in (("the first loads", 0), ("the second loads", 1)):
        found[name] = once(folder, name, rank, lambda: attempt(own / "net", mesh))
        found[f"{name}, then all"] = attempt(own / "net", mesh)
    model = loaded(own / "net", mesh)
    for name, rank in (("the first saves", 0), ("the second saves", 1)):
        target = folder / name
        found[name] = once(
            folder, name, rank, lambda to=target: refused(lambda: bigload.save_quantized_model(model, to))
        )
        bigload.save_quantized_model(model, target)
        again, x = loaded(target, mesh, None), torch.ones(1, 64, device=mesh.device_type)
        found[f"{name}, then all"] = torch.equal(again(x), model(x))
    return found


def wrong_at_once(mesh, folder: Path) -> dict:
    """Let processes make different calls, and the first fail. The timeout is longer than the world exists."""
    own, is_first, found = files(folder), dist.get_rank() == 0, {}
    model = loaded(own / "net", mesh)

    def save(name, size="5GB"):
        bigload.save_quantized_model(model, folder / name, size)

    found["first fails"] = refused(lambda: loaded(own / ("nowhere" if is_first else "net"), mesh))
    found["first saves"] = refused(lambda: save("one") if is_first else loaded(own / "net", mesh))
    found["first loads"] = refused(lambda: loaded(own / "net", mesh) if is_first else save("one"))
    found["other folders"] = refused(lambda: save("one" if is_first else "other"))
    found["other sizes"] = refused(lambda: save("one", "5GB" if is_first else "4KB"))
    given = {"replicate": True} if is_first else {}
    found["other ways"] = attempt(own / "net", mesh, **given)
    found["nothing is written"] = not (folder / "one").exists() and not (folder / "other").exists()
    found["then all"] = attempt(own / "net", mesh)
    save("together")
    return found
