"""Sizes as people write them."""

import pytest

from bigload.errors import PlacementError
from bigload.notation import parse_size, show


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
