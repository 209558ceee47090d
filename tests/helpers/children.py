"""Programs in processes that have done nothing yet, without the seconds that each import of the libraries takes.

A process imports the libraries and nothing else. Each program runs in a child that is forked from it. Where there is a
GPU each is a process of its own: bitsandbytes makes a context of CUDA when it is imported, which survives no fork.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
import types
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

ROOT = Path(__file__).parents[2]


class Forking:
    """A process that has imported libraries, and forks. A context manager, which ends it."""

    def __init__(self, *libraries: str) -> None:
        # One thread: what OpenMP has started does not survive a fork.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._environment, self._process = environment, None
        if not torch.cuda.is_available():
            command = [sys.executable, __file__, *libraries]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )

    def __enter__(self) -> Forking:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._process is not None:
            self._process.communicate()

    def run(self, code: str, folder: Path) -> str:
        """Run a program in a folder. Returns what it prints.

        Raises:
            AssertionError: it has failed; the message is what it said.
        """
        ended = self.ended(code, folder)
        assert ended.status == 0, ended.said
        return ended.printed

    def ended(self, code: str, folder: Path) -> Ended:
        """Run a program in a folder, however it ends."""
        if self._process is None:
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=self._environment)
            return Ended(done.returncode, done.stdout, done.stderr)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([code, str(folder)]) + "\n")
        self._process.stdin.flush()
        return Ended(*json.loads(self._process.stdout.readline()))


class Ended(NamedTuple):
    """How a program has ended: its exit status (-9 if a signal 9 has ended it), what it printed, what it said."""

    status: int
    printed: str
    said: str


def _serve(answers: IO[str]) -> None:
    for line in sys.stdin:
        code, folder = json.loads(line)
        with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as said:
            child = os.fork()
            if child == 0:
                os._exit(_run(code, folder, printed, said))
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            printed.seek(0)
            said.seek(0)
            answer = Ended(status, printed.read(), said.read())
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _run(code: str, folder: str, printed: IO[Any], said: IO[Any]) -> int:
    os.dup2(printed.fileno(), 1)
    os.dup2(said.fileno(), 2)
    os.chdir(folder)
    sys.argv = ["program"]
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main  # where pickle looks for its classes
    try:
        exec(compile(code, "program", "exec"), vars(main))
        return 0
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print when they are imported is no answer
    for library in sys.argv[1:]:
        importlib.import_module(library)
    gc.freeze()  # no child looks through what is imported
    _serve(own)
