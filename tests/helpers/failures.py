"""Functions that fail at their n-th call."""

import itertools
import os


def failing_at(call: int, error: BaseException):
    """Give an `os.pwrite` that raises at its n-th call."""
    write, calls = os.pwrite, itertools.count(1)

    def pwrite(*arguments):
        if next(calls) == call:
            raise error
        return write(*arguments)

    return pwrite
