"""Something is run in a forked process, whose end is waited for, but not for ever."""

import multiprocessing

import pytest

needs_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system forks no processes"
)

# What runs there takes milliseconds, and minutes where it waits for a thread that stayed in the parent.
_PATIENCE_S = 20


def exit_status(run):
    """Run something in a forked process and give its exit status: 0, or 1 if it raised, which it says on stderr.

    It must not compute what OpenMP divides among threads, such as products: those threads stay in the parent, and torch
    waits for them.
    """
    process = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    process.start()
    try:
        process.join(_PATIENCE_S)
        if process.exitcode is None:
            pytest.fail(f"the forked process is not at its end after {_PATIENCE_S} s")
        return process.exitcode
    finally:
        process.kill()
        process.join()
        process.close()
