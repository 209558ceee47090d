"""Numbers of Python in a captured step, as `torch.tensor` takes them to the device."""

import pytest
import torch
from torch import nn

from bigload import capture_decode
from bigload.decoding.constants import ConstantsInGraph

NUMBERS = {
    "one": (2.5, None),
    "an index": ([-1], torch.int64),
    "a truth": (True, None),
    "several": ([[1, 2, 3], [4, 5, 6]], None),
    "the same": ([0.1, 0.1], torch.float64),
    "16 bit": ([0.1, -65504.0], torch.bfloat16),
    "not finite": ([float("inf"), float("-inf"), float("nan")], None),
    "none": ([], None),
    "complex": (1 + 2j, None),
    "large": ([2**53 + 1], None),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_constants_have_the_same_values(name, device):
    numbers, dtype = NUMBERS[name]
    expected = torch.tensor(numbers, dtype=dtype, device=device)
    with ConstantsInGraph(device):
        found = torch.tensor(numbers, dtype=dtype, device=device)
    assert (found.dtype, found.shape, found.device) == (expected.dtype, expected.shape, expected.device)
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(found.isnan(), expected.isnan())


def test_what_is_no_constant_is_left_to_torch(device):
    with ConstantsInGraph(device):
        assert torch.tensor(3.0).device.type == "cpu"
        assert torch.tensor(list(range(100)), device=device).tolist() == list(range(100))
        assert torch.tensor([torch.ones(()), 2.0], device=device).tolist() == [1.0, 2.0]


class Weighing(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def step(self, x):
        return self.linear(x) * torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device)


class Attending(Weighing):
    """Takes another way where functions of torch are watched."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

    def step(self, x):
        return self.layer(x.unsqueeze(1))


class Signed(Weighing):
    """Has a constant of two zeros, whose signs show in what is divided by them."""

    def step(self, x):
        return self.linear(x) / torch.tensor([0.0, -0.0, 0.0, -0.0], device=x.device)


@pytest.mark.parametrize("build", [Weighing, Attending, Signed])
@torch.no_grad()
def test_a_step_with_constants(build, device, captures, warned):
    model = build().to(device).eval()
    rows = [torch.full((2, 4), float(number), device=device) for number in range(5)]
    expected = [model.step(x) for x in rows]
    capture = capture_decode(model, step="step")
    assert all(map(torch.equal, map(model.step, rows), expected))
    assert (capture.stats().replayed, warned()) == (4, [])
