"""Bytes that are read at once: all of them, also where the system gives less, and an error where the file ends."""

import os

import pytest
import torch
from comparisons import equal

from bigload.errors import CheckpointError
from bigload.io.tensors import StoredTensor, read_bytes, read_whole

VALUES = torch.arange(1000, dtype=torch.int32)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "values"
    path.write_bytes(b"head" + VALUES.numpy().tobytes())
    return path


@pytest.fixture(params=[None, 1, 999], ids=["all at once", "a byte at a time", "999 bytes at a time"])
def given_at_once(request, monkeypatch):
    """Let the system give no more than so many bytes at once; it never gives more than 2 GiB."""
    own = os.pread
    if request.param:
        monkeypatch.setattr(os, "pread", lambda file, nbytes, offset: own(file, min(nbytes, request.param), offset))


def stored(file, **changes):
    fields = {"dtype": VALUES.dtype, "shape": (10, 100), "offset": 4, "nbytes": VALUES.nbytes}
    return StoredTensor("values", file, **(fields | changes))


@pytest.mark.usefixtures("given_at_once")
def test_values_are_those_of_the_file(file):
    assert equal(read_whole(stored(file)), VALUES.view(10, 100))
    assert equal(read_whole(stored(file, shape=(), offset=8, nbytes=4)), VALUES[1])


def test_tensor_without_values_has_its_shape_and_dtype(file):
    empty = read_whole(stored(file, shape=(0, 7), nbytes=0, dtype=torch.bfloat16))
    assert (empty.shape, empty.dtype) == ((0, 7), torch.bfloat16)


@pytest.mark.usefixtures("given_at_once")
def test_file_that_ends_before_the_tensor_is_an_error_that_names_both(file):
    os.truncate(file, 1500)
    with pytest.raises(CheckpointError, match="values' ended while 'values' was read"):
        read_whole(stored(file))


@pytest.mark.usefixtures("given_at_once")
def test_bytes_end_where_the_file_does(file):
    content = file.read_bytes()
    assert read_bytes(file, 10, 2000) == content[10:2010]
    assert read_bytes(file, 3000, 2000) == content[3000:]
    assert read_bytes(file, len(content), 5) == read_bytes(file, 7, 0) == b""


def test_file_that_is_gone_is_an_error_of_the_system(file):
    file.unlink()
    with pytest.raises(FileNotFoundError):
        read_whole(stored(file))
