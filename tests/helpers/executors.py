"""Chooses what reads: the part in C, or threads of Python's."""

import pytest

from bigload.io import transfer
from bigload.io.native_feed import NativeFeed, library
from bigload.io.threaded_feed import ThreadedFeed

EXECUTORS = {"native": NativeFeed, "threads": ThreadedFeed}


def read_by(monkeypatch, name):
    """Have all be read so from now on; return the class that does it."""
    if name == "threads":
        monkeypatch.setattr(transfer, "library", lambda: None)
    elif library() is None:
        pytest.skip("installed without a compiler")
    return EXECUTORS[name]
