"""What each place can give now: GPUs, the host as the container allows it, and disks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from .errors import PlacementError

# Above this a limit of cgroup v1 means that there is none.
_UNLIMITED = 2**60


def free_bytes(device: torch.device) -> int:
    """Count the bytes of a device that can be had now.

    Of a GPU what the driver has left and what torch's allocator holds unused; of the CPU what the system has available,
    or the container allows, whichever is less.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return min([int(psutil.virtual_memory().available), *cgroup_bytes()])


def free_disk_bytes(folder: str | os.PathLike[str]) -> int:
    """Count the bytes that the disk of a folder has left, which may have yet to be made.

    Raises:
        PlacementError: it cannot be told.
    """
    path = Path(folder).expanduser().absolute()
    existing = next((parent for parent in (path, *path.parents) if parent.exists()), path)
    try:
        return shutil.disk_usage(existing).free
    except OSError as error:
        raise PlacementError(f"offload_folder '{folder}': its disk's free space cannot be told: {error}") from error


def cgroup_bytes(root: Path = Path("/")) -> Iterator[int]:
    """Count the bytes that each control group above this process still allows: its own, and all that hold it.

    Pages of files that the kernel can drop do not count as used. Groups without a limit are left out.

    Args:
        root: of the file system; another in tests.

    Source: the kernel's Documentation/admin-guide/cgroup-v2.rst, "Memory", and cgroup-v1/memory.rst.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            group, base, read = root / "sys/fs/cgroup" / path.lstrip("/"), root / "sys/fs/cgroup", _left_v2
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            group, read = base / path.lstrip("/"), _left_v1
        else:
            continue
        for folder in (group, *group.parents):
            left = read(folder)
            if left is not None:
                yield left
            if folder == base:
                break


def _left_v2(folder: Path) -> int | None:
    limit = _number(folder / "memory.max")
    return None if limit is None else _left(folder, limit, "memory.current", ("inactive_file", "active_file"))


def _left_v1(folder: Path) -> int | None:
    limit = _number(folder / "memory.limit_in_bytes")
    if limit is None or limit >= _UNLIMITED:
        return None
    return _left(folder, limit, "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def _left(folder: Path, limit: int, usage: str, droppable: tuple[str, ...]) -> int:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        lines = []
    stat = dict(line.split(maxsplit=1) for line in lines if " " in line)
    dropped = sum(int(stat.get(name, 0)) for name in droppable)
    return max(0, limit - (_number(folder / usage) or 0) + dropped)


def _number(path: Path) -> int | None:
    """Read a number; None where there is none, as "max" is none."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
