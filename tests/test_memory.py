"""Budgets: sizes as people write them, and the refusal of what does not fit."""

import pytest
import torch

from bigload.errors import PlacementError
from bigload.memory import check_budgets, parse_size, show

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        (0, 0),
        (123, 123),
        (2**53 + 1, 2**53 + 1),
        ("0", 0),
        ("123", 123),
        ("5B", 5),
        ("2KB", 2_000),
        ("2KiB", 2_048),
        ("500MB", 500_000_000),
        ("3MiB", 3 * 2**20),
        ("10GB", 10 * 10**9),
        ("10GiB", 10 * 2**30),
        ("2TB", 2 * 10**12),
        ("2TiB", 2 * 2**40),
        ("1.5 GiB", 3 * 2**29),
        ("1.GB", 10**9),
        ("0.5KB", 500),
        (" 10gib ", 10 * 2**30),
        ("10 GIB", 10 * 2**30),
    ],
)
def test_sizes_are_read_to_the_byte(size, nbytes):
    assert parse_size(size) == nbytes
    assert type(parse_size(size)) is int


@pytest.mark.parametrize(
    "size",
    [
        -1,
        True,
        None,
        1.5,
        b"10GB",
        [],
        "",
        " ",
        "GiB",
        "-1GB",
        "ten",
        "10 apples",
        "10G",
        "1e9",
        "1,5GB",
        "1.2.3MB",
        "0x10",
        "nan",
        "inf",
        "10GiB/s",
        "9" * 400 + "GB",
    ],
    ids=lambda size: repr(size)[:12],
)
def test_what_is_no_size_is_refused_as_it_was_written(size):
    with pytest.raises(PlacementError, match="max_memory") as caught:
        parse_size(size)
    assert repr(size) in str(caught.value)


def test_plan_that_fits_to_the_byte_is_let_through():
    check_budgets({CPU: 100, GPU: 50}, {CPU: 100, GPU: 51})


def test_device_without_a_budget_is_unbounded():
    check_budgets({CPU: 2**60}, {GPU: 1})
    check_budgets({CPU: 2**60}, {})


def test_plan_one_byte_too_large_is_refused_with_the_device_and_both_sizes():
    with pytest.raises(PlacementError, match="cuda:0") as caught:
        check_budgets({CPU: 5, GPU: 2**30 + 2**20}, {CPU: 5, GPU: 2**30 + 2**20 - 1})
    message = str(caught.value)
    assert show(2**30 + 2**20) in message
    assert "1 B too little" in message
    with pytest.raises(PlacementError, match="max_memory"):
        check_budgets({CPU: 1}, {CPU: 0})


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (2**20, "1.00 MiB"),
        (2**30, "1.00 GiB"),
        (2**41, "2048.00 GiB"),
    ],
)
def test_bytes_are_shown_in_binary_units(nbytes, shown):
    assert show(nbytes) == shown
