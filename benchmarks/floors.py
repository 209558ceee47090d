"""Runs `floor.c`: what no load can beat, where files are in the page cache and bytes go to GPUs."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .files import cores

TRIES = 3


def read_and_copy_s(files: Sequence[Path], gpus: int) -> dict[str, float]:
    """Time reads of all files into pinned memory, and the copies from there to GPUs.

    Args:
        files: in the page cache.
        gpus: how many; 0 only reads.

    Returns:
        By setting (threads, MiB that are read at once, MiB of the ring): the best seconds of three. Empty where there
        is no compiler.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return {}
    settings = [(threads, 4, ring) for threads in sorted({min(cores(), n) for n in (8, 12, 16)}) for ring in (96, 128)]
    settings += [(min(cores(), 12), 8, 96), *([(min(cores(), 16 * gpus), 4, 64 * gpus + 64)] if gpus > 1 else [])]
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "floor"
        source = Path(__file__).with_name("floor.c")
        subprocess.run([compiler, "-std=gnu11", "-O2", source, "-o", program, "-lpthread", "-ldl"], check=True)
        asked = ",".join(f"{threads}:{mib * 1024}:{ring}" for threads, mib, ring in dict.fromkeys(settings))
        done = subprocess.run(
            [program, str(TRIES), str(gpus), asked, *files], check=True, stdout=subprocess.PIPE, text=True
        )
    found: dict[str, float] = {}
    for line in done.stdout.splitlines():
        setting, seconds = line.split()
        threads, kib, ring = map(int, setting.split(":"))
        name = f"{threads} threads, {kib // 1024} MiB, {ring} MiB"
        found[name] = min(found.get(name, float("inf")), float(seconds))
    return found
