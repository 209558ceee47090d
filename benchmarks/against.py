"""This checkout against another one, such as the last release: the same loads and forwards, in turn, in one run.

Machines, and one machine from hour to hour, differ by more than most changes do. So each round runs a process for each
checkout, one after the other, and the medians over all rounds are compared.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent.parent
# In one process.
_LOADS, _TOKENS = 6, 15


class Case(NamedTuple):
    """What is timed.

    Attributes:
        folder: the checkpoint.
        mode: of `bigload`, or "none" for an unquantized load.
        blocks: how many decoder layers are offloaded to the CPU; then forwards of one token are timed, not loads.
    """

    folder: Path
    mode: str
    blocks: int = 0

    @property
    def name(self) -> str:
        """The case in words."""
        what = f"a token with {self.blocks} blocks offloaded" if self.blocks else "a load"
        return f"{self.folder.name} {self.mode}: {what}"


def compare_checkouts(other: Path, cases: Sequence[Case], device: str, rounds: int) -> Iterator[list[dict[str, Any]]]:
    """Time cases in this checkout and in another.

    Args:
        other: the root of the other checkout.
        cases: what is timed, one after the other in each process: imports can take longer than they do.
        device: "cpu" or "cuda:N".
        rounds: processes for each checkout.

    Yields:
        After each round a row for each case: the seconds of all runs of each checkout so far, their medians, and ours
        over theirs.
    """
    roots = {"other": other, "ours": HERE}
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in cases] for name in roots}
    for turn in range(rounds):
        for name in ("other", "ours") if turn % 2 else ("ours", "other"):  # neither is always the first
            for known, found in zip(seconds[name], _run(roots[name], cases, device), strict=True):
                known += found
        yield [_row(case, other_s, ours_s) for case, other_s, ours_s in zip(cases, *seconds.values(), strict=True)]


def _row(case: Case, other_s: Sequence[float], ours_s: Sequence[float]) -> dict[str, Any]:
    other_median_s, ours_median_s = statistics.median(other_s), statistics.median(ours_s)
    return {
        "case": case.name,
        "other_s": [round(each, 5) for each in other_s],
        "ours_s": [round(each, 5) for each in ours_s],
        "other_median_s": round(other_median_s, 5),
        "ours_median_s": round(ours_median_s, 5),
        "ratio": round(ours_median_s / other_median_s, 4),
    }


def _run(root: Path, cases: Sequence[Case], device: str) -> list[list[float]]:
    paths = [str(root.absolute()), *filter(None, [os.environ.get("PYTHONPATH")])]
    asked = json.dumps([(str(case.folder.absolute()), case.mode, device, case.blocks) for case in cases])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, Path(__file__), asked]
    done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    seconds: list[list[float]] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def _time(folder: str, mode: str, device: str, blocks: int) -> list[float]:
    """Time loads, or forwards of one token, in the checkout that is imported; the first ones do not count."""
    import gc
    import time

    import torch

    from benchmarks.checkpoints import build
    from bigload import BnbQuantizationConfig, load_and_quantize_model  # of whichever checkout

    config: Any = mode
    if mode == "none":
        config = BnbQuantizationConfig(load_in_4bit=True, skip_modules=["*"], torch_dtype="auto")
    device_map = {"": device} | {f"model.layers.{index}": "cpu" for index in range(blocks)}

    def load() -> tuple[Any, float]:
        model = build(Path(folder))
        gc.collect()  # the last model goes before the clock runs
        begun = time.perf_counter()
        model = load_and_quantize_model(model, config, folder, device_map=device_map, progress=False)
        return model, ended(begun)

    def ended(begun: float) -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    if not blocks:
        return [load()[1] for _ in range(1 + _LOADS)][1:]
    model, tokens, seconds = load()[0].eval(), torch.tensor([[1]], device=device), []
    with torch.no_grad():
        for _ in range(2 + _TOKENS):
            begun = time.perf_counter()
            model(tokens, use_cache=False)
            seconds.append(ended(begun))
    return seconds[2:]


def _time_all(cases: Sequence[Sequence[Any]]) -> list[list[float]]:
    """Time each case in turn, and say so: where a run is cut, one sees what took the time."""
    import time

    found: list[list[float]] = []
    for folder, mode, device, blocks in cases:
        begun = time.perf_counter()
        found.append(_time(folder, mode, device, blocks))
        name = Case(Path(folder), mode, blocks).name
        took = ", ".join(f"{seconds:.3f}" for seconds in found[-1][:_LOADS])
        spent_s = time.perf_counter() - begun
        print(f"{Path.cwd().name}: {name}: {took} ({spent_s:.0f} s in all)", file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    print(json.dumps(_time_all(json.loads(sys.argv[1]))))
