"""Try random ways to load a model against the plain way: `python tests/differential --seconds 60 --workers 2`.

Each seed makes one case (`--case SEED` runs that one alone, with its traceback). Workers are processes of their own, so
that one that is killed, as CUDA's faults do, takes no other case along: it counts as an error of the case it was at.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def main() -> None:
    """Run the command line; ends with status 1 if any case is wrong or ends in an error that is not bigload's."""
    parser = argparse.ArgumentParser(prog="python tests/differential", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--cases", type=int, help="end after as many for each worker, also before the time is up")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="'cpu', 'cuda:0' or 'cuda:0,cuda:1', the plain one first")
    parser.add_argument("--seed", type=int, help="of the first case (default: a new one each time)")
    parser.add_argument("--case", type=int, metavar="SEED", help="run this one alone")
    parser.add_argument("--out", type=Path, help="where counts and failures go, as JSON")
    parser.add_argument("--worker", nargs=2, metavar=("STEP", "LOG"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(_described(arguments.case, arguments.device))
        print(_run(arguments.case, arguments.device))
    elif arguments.worker:
        _work(arguments)
    else:
        sys.exit(_supervise(arguments))


def _supervise(arguments: argparse.Namespace) -> int:
    first = random.SystemRandom().randrange(10**9) if arguments.seed is None else arguments.seed
    print(f"cases from seed {first} on, {arguments.device}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"{worker}.jsonl") for worker in range(arguments.workers)]
        _keep_running(arguments, first, logs)
        results = [result for log in logs for result in _read(log)]
    counts = Counter(result["outcome"].partition("\n")[0] for result in results if not _is_failure(result))
    failures = [result for result in results if _is_failure(result)]
    refused = [result for result in results if result["outcome"].startswith("refused")]
    for failure in failures:
        print(f"\n--case {failure['seed']} --device {arguments.device}: {failure['case']}\n{failure['outcome']}")
    summary = {"first_seed": first, "device": arguments.device, "cases": len(results), "outcomes": dict(counts)}
    print(json.dumps(summary | {"failures": len(failures)}))
    if arguments.out:
        arguments.out.write_text(json.dumps(summary | {"failures": failures, "refused": refused}, indent=1) + "\n")
    return 1 if failures or not results else 0


def _is_failure(result: dict[str, Any]) -> bool:
    return not result["outcome"].startswith(("right", "refused"))


def _keep_running(arguments: argparse.Namespace, first: int, logs: list[Path]) -> None:
    """Run a worker for each log until the time is up, and another one after each that ended before."""
    until = time.monotonic() + arguments.seconds

    def begin(worker: int) -> subprocess.Popen[bytes]:
        done = len(_read(logs[worker]))
        command = [sys.executable, str(HERE), "--seconds", str(until - time.monotonic()), "--device", arguments.device]
        command += ["--seed", str(first + worker + done * len(logs)), "--worker", str(len(logs)), str(logs[worker])]
        command += [] if arguments.cases is None else ["--cases", str(arguments.cases - done)]
        return subprocess.Popen(command)

    running = [begin(worker) for worker in range(len(logs))]
    try:
        while any(each.poll() is None for each in running):
            time.sleep(0.2)
            for worker, each in enumerate(running):
                if each.poll() not in (None, 0) and time.monotonic() < until:
                    running[worker] = begin(worker)
    finally:
        for each in running:
            each.kill()
            each.wait()


def _read(log: Path) -> list[dict[str, Any]]:
    """What came of each case that was begun; of one that has no end the worker died."""
    results: dict[int, dict[str, Any]] = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        entry = json.loads(line)
        results[entry["seed"]] = {"outcome": "the process died"} | results.get(entry["seed"], {}) | entry
    return list(results.values())


def _work(arguments: argparse.Namespace) -> None:
    """Run cases until the time is up, and write each into the log when it begins and when it ends."""
    import traceback

    import bitsandbytes  # noqa: F401
    import checking  # noqa: F401

    until = time.monotonic() + arguments.seconds
    step, log, device = int(arguments.worker[0]), Path(arguments.worker[1]), arguments.device
    seeds = itertools.count(arguments.seed, step)
    gc.freeze()  # what is imported is not looked through at each collection of cycles
    with log.open("a", buffering=1) as out:
        for seed in itertools.islice(seeds, arguments.cases):
            if time.monotonic() > until:
                break
            out.write(json.dumps({"seed": seed, "case": _described(seed, device)}) + "\n")
            try:
                outcome = _run(seed, device)
            except Exception as error:
                outcome = "".join(traceback.format_exception(error)[-12:])
            out.write(json.dumps({"seed": seed, "outcome": outcome}) + "\n")
            if device != "cpu" and "CUDA error" in outcome:
                sys.exit(1)  # the process can do no more with the GPU


def _described(seed: int, device: str) -> str:
    from drawing import described, draw

    return described(draw(seed, _devices(device)))


def _run(seed: int, device: str) -> str:
    from checking import check
    from drawing import draw

    devices = _devices(device)
    with tempfile.TemporaryDirectory() as folder:
        return check(draw(seed, devices), devices, Path(folder))


def _devices(names: str) -> list[Any]:
    import torch

    return [torch.device(name) for name in names.split(",")]


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent / "helpers")]
    from by_hand import be_quiet

    be_quiet()
    main()
