"""Where the tensors of a group lie in one piece of memory."""

import torch
from streaming import PARTS

from bigload.hardware.layout import ALIGNMENT, Layout, TensorSpec


def test_parts_begin_at_multiples_of_the_alignment_and_do_not_overlap():
    layout = Layout(PARTS)
    end = 0
    for name, part in PARTS.items():
        assert layout.offsets[name] % ALIGNMENT == 0
        assert 0 <= layout.offsets[name] - end < ALIGNMENT
        end = layout.offsets[name] + part.nbytes
    assert layout.nbytes == end


def test_size_is_that_of_the_parts():
    parts = {str(index): TensorSpec(torch.uint8, (300_000 + index, 1)) for index in range(20)}
    nbytes = sum(part.nbytes for part in parts.values())
    assert nbytes <= Layout(parts).nbytes < 1.001 * nbytes
