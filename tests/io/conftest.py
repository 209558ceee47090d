"""What the tests of reading share."""

import pytest
import torch
from resources import open_and_running

from bigload.io import async_reads


@pytest.fixture
def nothing_left():
    """No file is open and no thread of Python's is running afterwards that was not before."""
    async_reads._library()  # what is loaded once for the whole process
    torch.zeros(1).view(torch.uint8).numpy()
    before = open_and_running()
    yield
    assert not open_and_running() - before
