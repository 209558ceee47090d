"""Damage checkpoints at random, for as long as it is told to: `python tests/fuzzing --seconds 600 --out FILE`.

Each must be opened and loaded, or be refused by an error of bigload's, within ten seconds and a few GB of memory.
`--case KIND SEED` runs one alone, with its traceback.

`--guided` lets atheris choose the damage instead (`pip install atheris`), which sees what code of bigload's it reaches.
There `--case TARGET BYTES` runs one, of a finding's bytes in base64.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PATIENCE_S = 10
MOST_BYTES = 12 * 2**30  # of addresses, of which torch itself takes most


class HangsError(BaseException):
    """An attempt takes too long; no `except Exception` of a reader takes it for a damaged file."""


def main() -> None:
    """Run the command line; ends with status 1 if anything but a refusal was met."""
    parser = argparse.ArgumentParser(prog="python tests/fuzzing", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, help="of the first attempt (default: a new one each time)")
    parser.add_argument("--case", nargs=2, metavar=("KIND", "SEED"), help="run this one alone")
    parser.add_argument("--guided", action="store_true", help="by the code that is reached, with atheris")
    parser.add_argument("--target", action="append", help="of --guided, this one alone; may be repeated")
    parser.add_argument("--out", type=Path, help="where counts and findings go, as JSON")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    signal.signal(signal.SIGALRM, _hangs)
    if arguments.case:
        print(_case(arguments.guided, *arguments.case))
    else:
        sys.exit(_be_guided(arguments) if arguments.guided else _go_on(arguments))


def _hangs(*_: object) -> None:
    raise HangsError(f"no answer after {PATIENCE_S} s")


def _limited(act: Callable[[], Any]) -> Any:
    signal.alarm(PATIENCE_S)
    try:
        return act()
    finally:
        signal.alarm(0)


def _attempt(kind: str, seed: int) -> list[str]:
    from hostile_files import attempt

    with tempfile.TemporaryDirectory() as folder:
        return _limited(lambda: attempt(kind, seed, Path(folder)))


def _case(is_guided: bool, kind: str, given: str) -> list[str]:
    if not is_guided:
        return _attempt(kind, int(given))
    from hostile_bytes import attempt_bytes

    with tempfile.TemporaryDirectory() as folder:
        return _limited(lambda: attempt_bytes(kind, base64.b64decode(given), Path(folder)))


def _go_on(arguments: argparse.Namespace) -> int:
    from hostile_files import KINDS

    seed = first = _first_seed(arguments)
    begun = time.monotonic()
    counts: Counter[str] = Counter()
    findings = []
    while time.monotonic() - begun < arguments.seconds:
        for kind in KINDS:
            try:
                outcome = "refused" if _attempt(kind, seed) else "loaded"
            except (Exception, HangsError) as error:
                outcome = "failed"
                findings.append({"kind": kind, "seed": seed, "error": repr(error)[:500]})
                print(f"\n--case '{kind}' {seed}\n{''.join(traceback.format_exception(error)[-6:])}", flush=True)
            counts[f"{kind}: {outcome}"] += 1
        seed += 1
    summary = {"first_seed": first, "seconds": round(time.monotonic() - begun), "executions": sum(counts.values())}
    print(json.dumps(summary | {"failures": len(findings)}))
    if arguments.out:
        text = json.dumps(summary | {"outcomes": dict(sorted(counts.items())), "failures": findings}, indent=1)
        arguments.out.write_text(text + "\n")
    return 1 if findings else 0


def _be_guided(arguments: argparse.Namespace) -> int:
    from guided import fuzz_all

    first, begun = _first_seed(arguments), time.monotonic()
    targets = fuzz_all(arguments.seconds, first, arguments.target, _limited)
    executions = sum(found["executions"] for found in targets.values())
    failures = sum(len(found["failures"]) for found in targets.values())
    summary = {"first_seed": first, "seconds": round(time.monotonic() - begun), "executions": executions}
    print(json.dumps(summary | {"failures": failures}))
    if arguments.out:
        arguments.out.write_text(json.dumps(summary | {"targets": targets}, indent=1) + "\n")
    return 1 if failures else 0


def _first_seed(arguments: argparse.Namespace) -> int:
    return random.SystemRandom().randrange(10**9) if arguments.seed is None else int(arguments.seed)


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent / "helpers")]
    from by_hand import be_quiet

    be_quiet()
    main()
