"""Times loads of a checkpoint, peer by peer and mode by mode, against what the machine can do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import config_of, shards, tensor_count, total_bytes, warm
from .limits import describe_machine, floor
from .peers import PEERS, can_load, modes_of

ROOT = Path(__file__).absolute().parent.parent
# What two runs must have in common to stand in one result.
SAME = ("benchmark", "checkpoint", "checkpoint_bytes", "cold", "device", "cores", "versions", "python", "commit")


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        folder: the checkpoint.
        device: "cpu" or "cuda:N".
        peers: names in `PEERS`.
        modes: of `peers.MODES`; None is nf4 and int8, or "stored" for a checkpoint that is quantized.
        cold: drop the files from the page cache before each load.
        limits: measure the machine's limits first.
        out: where the result goes, as JSON.
        append: add to the result that is there.
        timeout_s: what a row may take.
        commit: bigload's; by default what git says.
        beside: checkpoints of the same model in other formats, each loaded after the first one by the same peer.
    """

    folder: Path
    device: str
    peers: tuple[str, ...] = tuple(PEERS)
    modes: tuple[str, ...] | None = None
    cold: bool = False
    limits: bool = True
    out: Path | None = None
    append: bool = False
    timeout_s: float = 300.0
    commit: str | None = None
    beside: tuple[Path, ...] = ()


def compare(job: Job) -> dict[str, Any]:
    """Measure every peer in every mode that it can do, each in a process of its own.

    The result is written after each row, so that a run that is cut keeps what it has.

    Raises:
        SystemExit: no peer can do what is asked, or the result to add to is of something else.
    """
    modes = job.modes or [mode for mode in ("nf4", "int8", "stored") if mode in modes_of(config_of(job.folder))]
    folders = {folder: config_of(folder) for folder in (job.folder, *job.beside)}
    cells = [
        (peer, mode, folder)
        for mode in modes
        for peer in job.peers
        for folder, config in folders.items()
        if can_load(peer, mode, config, job.device)
    ]
    if not cells:
        raise SystemExit(
            f"none of {', '.join(job.peers)} can do {', '.join(modes)} for this checkpoint on {job.device}"
        )
    result = _begun(job)
    if job.limits and not result["limits"]:
        result["limits"] = _limits(job)
    for peer, mode, folder in cells:
        other = {} if folder == job.folder else _described(folder)
        row = {"peer": peer, "mode": mode, **other, **_row(job, folder, peer, mode)}
        _hold_against_the_floor(row, result)
        result["rows"] = [old for old in result["rows"] if _cell(old) != _cell(row)]
        _hold_against_the_first(row, result["rows"])
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
        _write(result, job.out)
    return result


def _cell(row: Mapping[str, Any]) -> tuple[str, str, str | None]:
    return row["peer"], row["mode"], row.get("checkpoint")


def _described(folder: Path) -> dict[str, Any]:
    return {
        "checkpoint": folder.name,
        "checkpoint_bytes": total_bytes(shards(folder)),
        "tensors": tensor_count(folder),
    }


def _begun(job: Job) -> dict[str, Any]:
    """Begin a result, or go on with the one that is there."""
    result = {
        "benchmark": "load",
        **_described(job.folder),
        "cold": job.cold,
        **describe_machine(job.device, job.commit),
        "limits": {},
        "rows": [],
    }
    if not job.append or job.out is None or not job.out.exists():
        return result
    old: dict[str, Any] = json.loads(job.out.read_text())
    other = [name for name in SAME if old.get(name) != result[name]]
    if other:
        raise SystemExit(f"'{job.out}' cannot be added to: of another {', '.join(other)}")
    return old


def _write(result: Mapping[str, Any], out: Path | None) -> None:
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")


def _limits(job: Job) -> dict[str, Any]:
    """Measure the limits in a process of its own, so that what it pins and allocates is gone before the loads."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "limits.json"
        arguments = ["limits", str(job.folder.absolute()), "--device", job.device, "--out", str(out)]
        failed = _run([*arguments, *(["--cold"] if job.cold else [])], job)
        if failed:
            raise SystemExit(f"the limits could not be measured: {failed}; --no-limits leaves them out")
        return dict(json.loads(out.read_text())["limits"])


def _row(job: Job, folder: Path, peer: str, mode: str) -> dict[str, Any]:
    missing = PEERS[peer].missing
    if missing:
        return {"skipped": f"{missing} is not installed"}
    if not job.cold:
        warm(shards(folder))  # the row before may have pushed files out of the page cache
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "row.json"
        arguments = ["one", str(folder.absolute()), peer, mode, job.device, str(out)]
        failed = _run([*arguments, *(["--cold"] if job.cold else [])], job)
        # A row that was written counts, whatever became of the process as it ended.
        return dict(json.loads(out.read_text())) if out.exists() else {"error": failed}


def _run(arguments: list[str], job: Job) -> str | None:
    """Run a command of the benchmarks in a new process. Returns what went wrong, if anything did."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}  # nothing here is on the hub, and asking takes seconds
    if not job.cold:
        environment["FASTSAFETENSORS_ODIRECT"] = "0"  # else it reads past the page cache
    command = [sys.executable, "-m", "benchmarks", *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=job.timeout_s)
    except subprocess.TimeoutExpired:
        return f"took longer than {job.timeout_s:g} s"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"ended by signal {-done.returncode}"
    # Of a traceback the line that names the exception; those that are indented say where, and more of what.
    named = [line for line in done.stderr.splitlines() if line and not line.startswith(" ")]
    return named[-1][:300] if named else f"ended with status {done.returncode}"


def _hold_against_the_floor(row: dict[str, Any], result: Mapping[str, Any]) -> None:
    if "first_s" not in row:
        return
    nbytes = row.get("checkpoint_bytes", result["checkpoint_bytes"])
    best = floor(nbytes, result["limits"], row["mode"], cold=result["cold"])
    row["gb_per_s"] = round(nbytes / 1e9 / (row["second_s"] or row["first_s"]), 4)
    row["floor_s"] = best and round(best, 4)
    row["ratio_first"] = best and round(row["first_s"] / best, 3)
    row["ratio_second"] = best and row["second_s"] and round(row["second_s"] / best, 3)


def _hold_against_the_first(row: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Divide the seconds of a checkpoint beside the first one by those of the first, loaded likewise."""
    first = next((old for old in rows if _cell(old) == (row["peer"], row["mode"], None)), {})
    if row.get("checkpoint") and first.get("first_s") and row.get("first_s"):
        pairs = {"first_s": "share_first", "second_s": "share_second"}
        row |= {name: round(row[key] / first[key], 3) for key, name in pairs.items() if row[key] and first[key]}
