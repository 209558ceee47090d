"""How many bytes of memory, and of disk space, are free now."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil
import torch

from ..errors import PlacementError, reason

# A version 1 cgroup without a limit shows a number larger than any machine's memory.
_UNLIMITED = 2**60

# The kernel's names, by the type of the mount: the file of the limit, that of the usage, and the entries of memory.stat
# that count the page cache, which the kernel frees before it refuses memory. memory.high only slows: it is no limit.
_FILES = {
    "cgroup2": ("memory.max", "memory.current", ("inactive_file", "active_file")),
    "cgroup": ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
}


def free_bytes(device: torch.device) -> int:
    """Return how many bytes this process can still allocate on a device.

    On a GPU: what the driver has free, plus what torch's caching allocator holds unused; an upper bound, since the
    latter may be fragmented. On the CPU: the machine's available memory, or less where a cgroup limits it.

    Raises:
        PlacementError: the system does not tell, as where the process may open no more files.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    try:
        available, allowed = int(psutil.virtual_memory().available), cgroup_free_bytes()
    except OSError as error:
        raise PlacementError(f"the system does not tell how much host memory is free: {reason(error)}") from error
    return available if allowed is None else min(available, allowed)


def cgroup_free_bytes(root: Path = Path("/")) -> int | None:
    """Return how many bytes the process's cgroup and its ancestors still allow it; None where none has a limit.

    Files that cannot be read count as no limit. Swap is not counted.

    Args:
        root: the folder that contains proc and the mount points.

    Source: the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
    """
    found = [_free_in(folder, kind) for kind, folder in _cgroups(root)]
    return min((free for free in found if free is not None), default=None)


def _cgroups(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield the type and folder of each cgroup that may limit the process, from its own up to the mount point."""
    own = _own_paths(_read(root / "proc/self/cgroup"))
    for kind, top, mount_point in _mounts(_read(root / "proc/self/mountinfo")):
        if kind in own:
            below = _below(own[kind], top)
            for level in (below, *below.parents):
                yield kind, root / mount_point.lstrip("/") / level


def _own_paths(text: str) -> dict[str, str]:
    """Parse /proc/self/cgroup: lines of "hierarchy:controllers:path"; version 2 is "0::path"."""
    paths = {}
    for line in text.splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            paths["cgroup2"] = path
        elif "memory" in controllers.split(","):
            paths["cgroup"] = path
    return paths


def _mounts(text: str) -> Iterator[tuple[str, str, str]]:
    """Parse /proc/self/mountinfo: yield the type, the cgroup at the top, and the mount point of each cgroup mount."""
    for line in text.splitlines():
        mount, _, source = line.partition(" - ")
        fields, described = mount.split(), source.split()
        if len(fields) < 5 or not described:
            continue
        if described[0] == "cgroup2" or (described[0] == "cgroup" and "memory" in described[-1].split(",")):
            yield described[0], fields[3], fields[4]


def _below(path: str, top: str) -> PurePosixPath:
    """Return a cgroup's path relative to the cgroup at the top of its mount.

    In a container, the mount often begins at the container's own cgroup, while the path is the host's or "/". Where the
    path is not below the mount's top, or is outside the container's namespace ("/.."), the mount's top is used.
    """
    try:
        below = PurePosixPath(path).relative_to(top)
    except ValueError:
        return PurePosixPath()
    return PurePosixPath() if ".." in below.parts else below


def _free_in(folder: Path, kind: str) -> int | None:
    limit_file, usage_file, reclaimable = _FILES[kind]
    limit = _number(_read(folder / limit_file))
    if limit is None or limit >= _UNLIMITED:
        return None
    usage = _number(_read(folder / usage_file))
    if usage is None:
        return None
    pages = dict(line.split(maxsplit=1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
    return max(0, limit - usage + sum(_number(pages.get(name, "")) or 0 for name in reclaimable))


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isdecimal() else None


def free_disk_bytes(folder: str | os.PathLike[str]) -> int:
    """Return how many bytes are free on the file system of a folder, which need not exist yet.

    Raises:
        PlacementError: the file system does not tell.
    """
    path = Path(folder).absolute()
    try:
        return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free
    except OSError as error:
        raise PlacementError(f"cannot tell how much fits into '{path}': {error}; choose another folder") from error
