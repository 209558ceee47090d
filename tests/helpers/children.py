"""Programs in processes that have done nothing yet, without the seconds that each import of the libraries takes.

A process imports the libraries and nothing else. Each program runs in a child that is forked from it. All processes of
the tests share it: they reach it by a socket. Where there is a GPU each program is a process of its own: bitsandbytes
makes a context of CUDA when it is imported, which survives no fork.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import traceback
import types
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).parents[2]
LIBRARIES = (
    "bitsandbytes",
    "torch.distributed.fsdp",
    "transformers.modeling_utils",
    "transformers.models.llama",
    "peft",
    "lightning.fabric",
    "bigload.distributed.joint_load",
)


class ForkServer:
    """The process that imports the libraries, as soon as it is first asked, and forks. `close` ends it.

    Attributes:
        address: what it is asked by; None where programs are processes of their own.
    """

    address: str | None = None

    def __init__(self, left_out: tuple[str, ...] = ()) -> None:
        """Start it.

        Args:
            left_out: variables that no program sees.
        """
        import torch  # here: the process that it starts imports nothing before it is asked

        if torch.cuda.is_available():
            return
        self.address = f"\0bigload-tests-{os.getpid()}"  # no file: the system forgets it with the process
        with socket.socket(socket.AF_UNIX) as asked:
            asked.bind(self.address)
            asked.listen()
            number = asked.fileno()
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(number)],
                stdin=subprocess.PIPE,
                pass_fds=[number],
                env=_environment(left_out),
            )

    def close(self) -> None:
        """End it, and wait for its end."""
        if self.address is not None:
            self._process.communicate()


def _environment(left_out: tuple[str, ...] = ()) -> dict[str, str]:
    # One thread: what OpenMP has started does not survive a fork.
    found = {name: value for name, value in os.environ.items() if name not in left_out}
    path = os.pathsep.join(filter(None, [str(ROOT), found.get("PYTHONPATH")]))
    return found | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


class Programs:
    """Runs programs."""

    def __init__(self, address: str | None) -> None:
        self._address = address

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
        if self._address is None:
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=_environment())
            return Ended(done.returncode, done.stdout, done.stderr)
        with socket.socket(socket.AF_UNIX) as asking:
            asking.connect(self._address)
            with asking.makefile("rw") as stream:
                stream.write(json.dumps([code, str(folder)]) + "\n")
                stream.flush()
                return Ended(*json.loads(stream.readline()))


class Ended(NamedTuple):
    """How a program has ended: its exit status (-9 if a signal 9 has ended it), what it printed, what it said."""

    status: int
    printed: str
    said: str


def _serve(asked: socket.socket) -> None:
    """Answer each request in a process of its own, until the one that has started this closes stdin."""
    answering: list[int] = []
    while sys.stdin not in select.select([asked, sys.stdin], [], [])[0]:
        if not answering:
            _import_all()
        connection, _ = asked.accept()
        answering.append(os.fork())
        if answering[-1] == 0:
            _answer(connection)
            os._exit(0)
        connection.close()
    for each in answering:
        os.waitpid(each, 0)


def _import_all() -> None:
    for library in LIBRARIES:
        if find_spec(library.partition(".")[0]):
            importlib.import_module(library)
    gc.freeze()  # no child looks through what is imported


def _answer(connection: socket.socket) -> None:
    with connection, connection.makefile("rw") as stream:
        code, folder = json.loads(stream.readline())
        with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as said:
            child = os.fork()
            if child == 0:
                os._exit(_run(code, folder, printed, said))
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            printed.seek(0)
            said.seek(0)
            stream.write(json.dumps(Ended(status, printed.read(), said.read())) + "\n")


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
    os.dup2(2, 1)  # what libraries print when they are imported is of no program
    with socket.socket(fileno=int(sys.argv[1])) as asked:
        _serve(asked)
