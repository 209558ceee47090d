"""Let atheris choose what is written: bytes that reach new branches of bigload's code are kept, and changed further.

Each target has a process of its own, one after the other, so that one that crashes takes nothing else along. The
readers of bigload are instrumented as they are imported, here and nowhere else.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

MAX_FINDINGS = 20  # of one target that are kept with their bytes
MISSING = "python tests/fuzzing --guided needs atheris, which there is for Python 3.11 to 3.13: pip install atheris"


def import_atheris() -> ModuleType:
    """Return atheris; without it the command ends, and says how to get it."""
    try:
        import atheris
    except ImportError:
        sys.exit(MISSING)
    return atheris


def fuzz_all(seconds: float, seed: int, names: list[str] | None, limited: Callable[[Callable[[], Any]], Any]) -> dict:
    """Drive each target for its share of the time. Returns what came of each.

    Args:
        seconds: for all of them together.
        seed: of the first; the next has the next.
        names: of targets; all, where there are none.
        limited: calls a function that then may not take too long.
    """
    with _instrumented(import_atheris()):
        from hostile_bytes import TARGETS
    chosen, results = names or list(TARGETS), {}
    if unknown := [name for name in chosen if name not in TARGETS]:
        sys.exit(f"no target {unknown[0]!r}: there are {', '.join(TARGETS)}")
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(chosen):
            result = Path(folder, f"{number}.json")
            begun = time.monotonic()
            log = result.with_suffix(".log")
            act = partial(_fuzz, name, seconds / len(chosen), seed + number, result, limited)
            if status := _in_a_process(act, log):
                print(log.read_text(errors="replace")[-3000:], flush=True)
            results[name] = _read(result, status) | {"seconds": round(time.monotonic() - begun)}
            print(json.dumps({"target": name} | results[name]), flush=True)
    return results


@contextlib.contextmanager
def _instrumented(atheris: ModuleType) -> Iterator[None]:
    """Instrument what is imported of bigload; atheris prints each module's name."""
    with contextlib.redirect_stderr(io.StringIO()), atheris.instrument_imports(include=["bigload"]):
        yield


def _in_a_process(act: Callable[[], None], log: Path) -> int:
    """Return the status with which a process ends that does this; what libFuzzer prints goes to a file."""
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
            act()
        except BaseException:
            traceback.print_exc()
        os._exit(3)  # it ends otherwise where all is well
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _read(result: Path, status: int) -> dict:
    found = json.loads(result.read_text()) if result.exists() else {"executions": 0, "failures": []}
    if status:  # what it was at is the last thing it wrote
        last = result.with_suffix(".last")
        raw = base64.b64encode(last.read_bytes()).decode() if last.exists() else None
        found["failures"].append({"error": f"the process ended with status {status}", "bytes": raw})
    return found


def _fuzz(name: str, seconds: float, seed: int, result: Path, limited: Callable[[Callable[[], Any]], Any]) -> None:
    """Drive one target until the time is up, and end the process."""
    atheris = import_atheris()
    from hostile_bytes import attempt_bytes, good_bytes, mutated

    scratch = Path(tempfile.mkdtemp(dir=result.parent))
    with _instrumented(atheris):  # what a load imports when it runs
        good = good_bytes(name, scratch / "good")
        assert attempt_bytes(name, good, scratch / "good") == []
    (scratch / "kept").mkdir()
    (scratch / "kept" / "good").write_bytes(good)
    counts: Counter[str] = Counter()
    failures: dict[str, dict] = {}
    begun = time.monotonic()

    def attempt(raw: bytes) -> None:
        if time.monotonic() - begun > seconds:
            kept = len(list((scratch / "kept").iterdir())) - 1
            found = {"executions": counts.total(), "outcomes": dict(counts), "reached something new": kept}
            result.write_text(json.dumps(found | {"failures": list(failures.values())}))
            os._exit(0)
        result.with_suffix(".last").write_bytes(raw)
        try:
            outcome = "refused" if limited(lambda: attempt_bytes(name, raw, scratch / "case")) else "loaded"
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # one that takes too long is no Exception
            outcome = "failed"
            _keep(failures, error, raw)
        shutil.rmtree(scratch / "case", ignore_errors=True)
        counts[outcome] += 1

    def mutate(raw: bytes, most: int, seed: int) -> bytes:
        return mutated(raw, random.Random(seed), lambda some: atheris.Mutate(some, most))[:most]

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    options = [f"-seed={seed % 2**31 or 1}", f"-max_len={4 * len(good)}", "-len_control=0", "-timeout=0"]
    options += [
        "-rss_limit_mb=0",
        "-mutate_depth=1",
        "-use_value_profile=1",
        "-verbosity=0",
        f"-artifact_prefix={scratch}/",
    ]
    atheris.Setup([sys.argv[0], *options, str(scratch / "kept")], attempt, custom_mutator=mutate)
    atheris.Fuzz()


def _keep(failures: dict[str, dict], error: BaseException, raw: bytes) -> None:
    """Keep the first of the failures that were raised at one place."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{type(error).__name__} {place.filename}:{place.lineno}"
    if where in failures:
        failures[where]["times"] += 1
    elif len(failures) < MAX_FINDINGS:
        print("".join(traceback.format_exception(error)[-8:]), flush=True)
        failures[where] = {"error": repr(error)[:500], "times": 1, "bytes": base64.b64encode(raw).decode()}
