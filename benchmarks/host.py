"""The host memory that a load takes, watched from outside so that the watching costs it nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30

# Run by an interpreter of its own: a thread that samples would hold the lock that the load needs. It ends with its
# standard input, so also when the process that it watches is killed.
_WATCH = """
import select, sys
most, told = 0, False
while True:
    with open(f"/proc/{sys.argv[1]}/status") as status:
        most = max(most, sum(int(line.split()[1]) for line in status if line.startswith(("RssAnon", "RssShmem"))))
    if not told:
        print("begun", flush=True)
        told = True
    if select.select([sys.stdin], [], [], 0.005)[0]:
        break
print(most * 1024)
"""


@dataclass
class HostMemory:
    """What was seen.

    Attributes:
        over_start_gib: the highest that the process had at once, over what it had at the start; None: not known.
        kept_gib: what it had at the end, over the start.
    """

    over_start_gib: float | None = None
    kept_gib: float | None = None


@contextmanager
def watched_host(*, on_gpu: bool) -> Iterator[HostMemory]:
    """Watch this process's memory for the length of a `with` block; what was seen stands in the object afterwards.

    Counted are pages of its own and shared ones, looked at every 5 ms, and what torch has pinned. Pages of files are
    not: they are the page cache's.
    """
    seen = HostMemory()
    start = _own_bytes()
    if start is None:
        yield seen
        return
    start += _pinned_bytes("current", on_gpu)
    command = [sys.executable, "-S", "-c", _WATCH, str(os.getpid())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        watcher.stdout.readline()  # it has begun
        yield seen
        end = (_own_bytes() or 0) + _pinned_bytes("current", on_gpu)
        most = int(watcher.communicate()[0] or 0) + _pinned_bytes("peak", on_gpu)
    seen.over_start_gib = (max(most, end) - start) / GIB
    seen.kept_gib = (end - start) / GIB


def _own_bytes() -> int | None:
    """Give the bytes of this process's pages that are not a file's; None where the system does not tell."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.is_file() else []
    sizes = [int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))]
    return sum(sizes) * 1024 if sizes else None


def _pinned_bytes(when: str, on_gpu: bool) -> int:
    """Give the bytes that torch has pinned, which are the driver's pages: "current" ones or their "peak"."""
    import torch

    if not on_gpu or not hasattr(torch.cuda, "host_memory_stats"):  # older than torch 2.7
        return 0
    stats = torch.cuda.host_memory_stats()
    # The name of what the allocator holds, used or not, has changed between versions; where both are, it is the larger.
    return int(max(stats.get(f"{name}.{when}", 0) for name in ("reserved_bytes", "allocated_bytes")))
