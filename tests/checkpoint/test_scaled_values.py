"""The values of weights that are stored as small numbers with scales, whichever way they are computed."""

import kernels_by_torch
import pytest
import torch
from comparisons import equal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigload.checkpoint.scaled import values
from bigload.checkpoint.scaled.fp8 import FLOAT8
from bigload.checkpoint.scaled.values import RowValues, runs_kernel

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", FLOAT8)
def test_each_number_of_fp8_is_what_torch_converts_it_to(number, dtype, device):
    numbers = torch.arange(256, dtype=torch.uint8).view(number)
    found = RowValues(torch.ones(4, device=device), (4, 64), (1, 64)).of(numbers.to(device), 0, dtype)
    assert same(found, numbers.view(4, 64).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_number_of_4_bits_is_that_of_the_standard(dtype, device):
    numbers = torch.arange(256, dtype=torch.uint8, device=device)
    table = torch.tensor([*E2M1, *(-value for value in E2M1)]).to(dtype)
    found = RowValues(torch.full((16,), 127, dtype=torch.uint8, device=device), (16, 32), (1, 32)).of(numbers, 0, dtype)
    lower, higher = found.view(256, 2).unbind(1)
    assert same(lower, table.repeat(16))  # the lower bits are the first
    assert same(higher, table.repeat_interleave(16))


@given(st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("number", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
def test_rows_are_numbers_times_the_scales_of_their_blocks(number, device, data):
    """Whatever the rows, blocks, matrices and dtypes: beside loops over all blocks."""
    count = data.draw(st.integers(1, 3), "matrices")
    rows, columns = data.draw(st.integers(1, 40), "rows"), 2 * data.draw(st.integers(1, 40), "pairs of columns")
    block = data.draw(st.integers(1, rows + 3), "height"), data.draw(st.integers(1, columns + 3), "width")
    kind = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.uint8]), "scales")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    begin = data.draw(st.integers(0, count * rows - 1), "begin")
    end = data.draw(st.integers(begin + 1, count * rows), "end")
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    down, across = -(-rows // block[0]), -(-columns // block[1])

    per_item = 2 if number == torch.uint8 else 1
    numbers = torch.randint(256, (count, rows, columns // per_item), dtype=torch.uint8, generator=draw).view(number)
    stored = torch.randn(count, down, across, generator=draw).to(kind)
    if kind == torch.uint8:
        stored = torch.randint(100, 140, (count, down, across), dtype=torch.uint8, generator=draw)
    factors = (
        torch.tensor([2.0 ** (byte - 127) for byte in range(140)])[stored.int()] if kind == torch.uint8 else stored
    )

    whole = _numbers(numbers).to(dtype)
    for matrix in range(count):
        for i in range(down):
            for j in range(across):
                part = whole[matrix, i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
                part.copy_((part.float() * factors[matrix, i, j].float()).to(dtype))

    flat = numbers.view(count * rows, -1)[begin:end].reshape(-1).to(device)
    found = RowValues(stored.view(-1).to(device), (count, rows, columns), block).of(flat, begin, dtype)
    assert same(found, whole.view(count * rows, columns)[begin:end])


def same(found, expected):
    """Whether all bits are equal, but for those of what is no number."""
    found = found.cpu().contiguous()
    places = found.isnan()
    return torch.equal(places, expected.isnan()) and equal(
        found.masked_fill(places, 0.0), expected.masked_fill(places, 0.0)
    )


def _numbers(stored):
    if stored.dtype != torch.uint8:
        return stored.float()
    table = torch.tensor([*E2M1, *(-value for value in E2M1)])
    return torch.stack([table[(stored & 15).int()], table[(stored >> 4).int()]], -1).flatten(-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e8m0fnu])
def test_the_kernel_is_given_what_torch_computes_with(kind, dtype, monkeypatch):
    """The kernel is stood in for; itself it is tested on a GPU."""
    draw = torch.Generator().manual_seed(0)
    numbers = torch.randint(256, (29 * 600,), dtype=torch.uint8, generator=draw)
    stored = torch.randint(100, 140, (3 * 2 * 38,), dtype=torch.uint8, generator=draw)
    scales = stored.view(kind) if kind.itemsize == 1 else torch.randn(3 * 2 * 38, generator=draw).to(kind)
    rows = RowValues(scales, (3, 20, 1200), (15, 32))
    launched = kernels_by_torch.install_in(
        monkeypatch, values, "checkpoint/scaled/kernels.py", kernels_by_torch.multiply
    )
    for first in (0, 17):  # in the second and third matrix
        assert same(rows._by_kernel(numbers, first, 29, dtype), rows.of(numbers, first, dtype))
    assert launched == ["multiply"] * 2


@pytest.mark.parametrize("runs", [True, False])
def test_whether_the_kernel_runs_is_found_out_by_running_it(runs, monkeypatch, logged):
    launched = kernels_by_torch.install_in(
        monkeypatch, values, "checkpoint/scaled/kernels.py", kernels_by_torch.multiply
    )
    if not runs:
        monkeypatch.setattr(values, "_kernels", lambda: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.version, "hip", None)
    assert runs_kernel.__wrapped__.__wrapped__(torch.device("cpu")) == runs
    assert bool(launched) == runs
    assert ("so that torch computes the values of weights in 4 bits" in logged.text) != runs


@pytest.mark.cuda
def test_torch_computes_on_a_gpu_what_the_kernel_does(monkeypatch):
    draw, device = torch.Generator().manual_seed(0), torch.device("cuda", 0)
    numbers = torch.randint(256, (70 * 96,), dtype=torch.uint8, generator=draw).to(device)
    rows = RowValues(torch.randn(3 * 5 * 6, generator=draw).to(device), (3, 70, 192), (15, 32))
    expected = rows.of(numbers, 41, torch.bfloat16)
    monkeypatch.setattr(values, "runs_kernel", lambda device: False)
    assert same(rows.of(numbers, 41, torch.bfloat16), expected.cpu())


@pytest.mark.cuda
def test_the_kernel_runs_here():
    """Else the tests above would compare torch with torch."""
    assert runs_kernel(torch.device("cuda", 0))
