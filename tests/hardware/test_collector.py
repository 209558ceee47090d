"""The collector of cycles rests as long as one of several blocks needs it to."""

import gc
from contextlib import ExitStack

import pytest

from bigload.hardware.collector import without_collections


@pytest.mark.parametrize("was_on", [True, False])
@pytest.mark.parametrize("ends_first", [0, 1])
def test_blocks_that_overlap_as_those_of_two_threads_do(was_on, ends_first):
    before = gc.isenabled()
    (gc.enable if was_on else gc.disable)()
    try:
        blocks = [ExitStack(), ExitStack()]
        for block in blocks:
            block.enter_context(without_collections())
        blocks[ends_first].close()
        assert not gc.isenabled()
        blocks[1 - ends_first].close()
        assert gc.isenabled() is was_on
    finally:
        (gc.enable if before else gc.disable)()
