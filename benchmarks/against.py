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


def compare_checkouts(other: Path, cases: Sequence[Case], device: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Time cases in this checkout and in another.

    Args:
        other: the root of the other checkout.
        cases: what is timed.
        device: "cpu" or "cuda:N".
        rounds: processes for each checkout and case.

    Yields:
        A row for each case: the seconds of all runs of each checkout, their medians, and ours over theirs.
    """
    roots = {"other": other, "ours": HERE}
    for case in cases:
        seconds: dict[str, list[float]] = {"other": [], "ours": []}
        for turn in range(rounds):
            for name in ("other", "ours") if turn % 2 else ("ours", "other"):  # neither is always the first
                seconds[name] += _run(roots[name], case, device)
        medians = {name: statistics.median(each) for name, each in seconds.items()}
        yield {
            "case": case.name,
            **{f"{name}_s": [round(each, 5) for each in seconds[name]] for name in seconds},
            **{f"{name}_median_s": round(median, 5) for name, median in medians.items()},
            "ratio": round(medians["ours"] / medians["other"], 4),
        }


def _run(root: Path, case: Case, device: str) -> list[float]:
    paths = [str(root.absolute()), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, Path(__file__), case.folder.absolute(), case.mode, device, str(case.blocks)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def _time(folder: Path, mode: str, device: str, blocks: int) -> list[float]:
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
        model = build(folder)
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


if __name__ == "__main__":
    print(json.dumps(_time(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))))
