"""Let each call of each edge fail, one after the other: `python tests/faults --out benchmarks/results/faults.json`.

`--long` does the same things again and again instead, and writes what the process held before and after:
`python tests/faults --long --out benchmarks/results/long-use.json`.

`--table FILE` prints the table of docs/reliability.md of such a file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
MOST_CALLS = 60  # of one edge: how often a device is asked whether it is done is a matter of time


def main() -> None:
    """Run the command line; ends with status 1 if a fault left anything behind."""
    parser = argparse.ArgumentParser(prog="python tests/faults", description=__doc__)
    parser.add_argument("--job", action="append", help="this job alone; may be repeated")
    parser.add_argument("--gpu", action="store_true", help="the jobs that need a GPU, instead of the others")
    parser.add_argument("--most", type=int, default=MOST_CALLS, help="calls of one edge (default: %(default)s)")
    parser.add_argument("--long", action="store_true", help="long use, instead of faults")
    parser.add_argument("--out", type=Path, help="where the counts go, as JSON")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of such a file")
    arguments = parser.parse_args()
    if arguments.table:
        print("\n".join(table(json.loads(arguments.table.read_text()))))
        return
    summary = long_use(arguments.gpu) if arguments.long else faults(arguments.job, arguments.gpu, arguments.most)
    print(json.dumps({name: value for name, value in summary.items() if name != "rows"}))
    if arguments.out:
        arguments.out.write_text(json.dumps(summary, indent=1) + "\n")
    sys.exit(1 if summary["failures"] else 0)


def faults(jobs: list[str] | None, on_gpu: bool, most: int) -> dict:
    """Inject the faults. Returns the counts of what came of them."""
    from injected_faults import GPU_JOBS, JOBS, every_try

    begun = time.monotonic()
    names = jobs or tuple(GPU_JOBS if on_gpu else JOBS)
    found = every_try(names, lambda calls: chosen(calls, most), lambda text: print(text, flush=True))
    rows = [
        {"job": job, "edge": edge, "error": error, "outcomes": dict(counts)}
        for (job, edge, error), counts in found.counts.items()
    ]
    seconds = round(time.monotonic() - begun)
    return where(on_gpu) | {"tries": found.tries, "seconds": seconds, "failures": found.failures, "rows": rows}


def where(on_gpu: bool) -> dict:
    """Say what ran it."""
    import torch

    return {"device": torch.cuda.get_device_name(0) if on_gpu else "cpu", "torch": torch.__version__}


def long_use(on_gpu: bool) -> dict:
    """Do all that is done again and again, as often as by hand. Returns what was held before and after."""
    import torch
    from long_use import GPU_USES, USES, grown, repeated

    torch.set_num_threads(1)  # threads of OpenMP come and go with those that compute
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    rows, failures = [], []
    for name, (_, times, _) in (GPU_USES if on_gpu else USES).items():
        rows.append(repeated(name, times, device))
        print(json.dumps(rows[-1]), flush=True)
        if more := grown(rows[-1]):
            failures.append(f"{name}: {more}")
    return where(on_gpu) | {"failures": failures, "rows": rows}


def chosen(calls: int, most: int) -> list[int]:
    """Return the calls to fail."""
    step = max(1, -(-calls // most))
    return sorted({*range(1, calls + 1, step), calls} - {0})


def table(results: dict) -> list[str]:
    """Return a table in Markdown: a line for each job and edge, or for each thing that is repeated."""
    from injected_faults import HOW
    from long_use import table as table_of_long_use

    if "tries" not in results:
        return table_of_long_use(results["rows"])

    lines = ["| while | what fails | how | tries | refused, right | survived / tried |", "|---|---|---|---|---|---|"]
    merged: dict[tuple[str, str], dict[str, int]] = {}
    errors: dict[tuple[str, str], list[str]] = {}
    for row in results["rows"]:
        key = row["job"], f"{row['edge']} of a device" if row["error"] == "device" else row["edge"]
        counts = merged.setdefault(key, {})
        errors.setdefault(key, []).append(row["error"])
        for outcome, count in row["outcomes"].items():
            counts[outcome] = counts.get(outcome, 0) + count
    for (job, edge), counts in merged.items():
        tried = sum(counts.values())
        how = HOW if errors[job, edge] == ["device"] else ", ".join(errors[job, edge])
        said = f"{counts.get('refused', 0)}, {counts.get('right', 0) + counts.get('not met', 0)}"
        lines.append(f"| {job} | {edge} | {how} | {tried} | {said} | {tried - counts.get('failed', 0)} / {tried} |")
    tried, failed = results["tries"], len(results["failures"])
    lines.append(f"| **all** | | | **{tried}** | | **{tried - failed} / {tried}** |")
    return lines


if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parent / "helpers")]
    from by_hand import be_quiet

    be_quiet()
    main()
