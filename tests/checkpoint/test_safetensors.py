"""Headers of safetensors files: described to the byte, and each kind of damage is one clear error."""

import itertools
import json
import math

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bigload.checkpoint.checkpoint import Checkpoint, open_checkpoint
from bigload.checkpoint.safetensors import read_header
from bigload.errors import CheckpointError
from bigload.io.tensors import StoredTensor

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda s: s != "__metadata__")


SHAPES = st.lists(st.integers(0, 4), max_size=3)


def counting(dtype, shape):
    return torch.arange(math.prod(shape)).remainder(7).to(dtype).view(shape)


def raw(tensor):
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def write(path, header, data=b""):
    """Write a file with this header, a dict or the bytes themselves, and these bytes of data."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def entry(begin, end, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


@settings(max_examples=60, deadline=None)
@given(
    contents=st.dictionaries(NAMES, st.tuples(st.sampled_from(DTYPES), SHAPES), max_size=6),
    metadata=st.none()
    | st.dictionaries(NAMES, st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=2),
)
def test_whatever_safetensors_writes_is_described_exactly(tmp_path_factory, contents, metadata):
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    save_file({name: counting(*content) for name, content in contents.items()}, path, metadata)
    stored = open_checkpoint(path).tensors
    content = path.read_bytes()
    with safetensors.safe_open(path, "pt") as theirs:
        assert stored.keys() == set(theirs.keys())
        for name, tensor in stored.items():
            expected = theirs.get_tensor(name)
            assert (tensor.name, tensor.file) == (name, path)
            assert (tensor.dtype, tensor.shape) == (expected.dtype, tuple(expected.shape))
            assert content[tensor.offset : tensor.offset + tensor.nbytes] == raw(expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz], ids=str)
def test_float8_of_other_makers_is_described_too(tmp_path, dtype):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2).to(dtype)}, path)
    assert open_checkpoint(path).tensors["a"].dtype is dtype


def test_tensors_come_in_the_order_of_their_offsets(tmp_path):
    path = write(tmp_path / "x.safetensors", {"b": entry(4, 8), "a": entry(8, 12), "c": entry(0, 4)}, bytes(12))
    assert list(read_header(path)) == ["c", "b", "a"]


def test_empty_tensors_may_lie_between_others(tmp_path):
    header = {"b": entry(4, 8), "empty": entry(4, 4, shape=[0, 3]), "a": entry(0, 4), "last": entry(8, 8)}
    stored = read_header(write(tmp_path / "x.safetensors", header, bytes(8)))
    assert {name: tensor.nbytes for name, tensor in stored.items()} == {"a": 4, "empty": 0, "b": 4, "last": 0}


DAMAGE = {
    "hole between tensors": ({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12), "'b' begins at"),
    "hole before the first": ({"a": entry(4, 8)}, bytes(8), "'a' begins at"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), "'b' begins at"),
    "same bytes twice": ({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4), "'b' begins at"),
    "truncated data": ({"a": entry(0, 8)}, bytes(7), "truncated"),
    "trailing bytes": ({"a": entry(0, 8)}, bytes(9), "longer than its header says"),
    "header is no JSON": (b'{"a": ', b"", "JSON"),
    "header is no UTF-8": (b'{"\xff\xfe": 1}', b"", "JSON"),
    "header nests too deeply": (b"[" * 200_000, b"", "JSON"),
    "header is a list": (b"[]", b"", "list"),
    "header is null": (b"null", b"", "NoneType"),
    "empty header": (b"", b"", "JSON"),
    "unknown dtype": ({"a": entry(0, 4, dtype="F31")}, bytes(4), "'F31'"),
    "dtype is no string": ({"a": entry(0, 4, dtype=["F32"])}, bytes(4), "dtype"),
    "negative size": ({"a": entry(0, 4, shape=[-1, -1])}, bytes(4), "shape"),
    "float size": ({"a": entry(0, 4, shape=[1.0])}, bytes(4), "shape"),
    "boolean size": ({"a": entry(0, 4, shape=[True])}, bytes(4), "shape"),
    "shape is no list": ({"a": entry(0, 4, shape=1)}, bytes(4), "shape"),
    "shape too large for its offsets": ({"a": entry(0, 4, shape=[2])}, bytes(4), "takes 8 bytes"),
    "shape astronomically large": ({"a": entry(0, 4, shape=[2**62, 2**62])}, bytes(4), "takes"),
    "offsets backwards": ({"a": entry(4, 0, shape=[1])}, bytes(4), "data_offsets"),
    "negative offset": ({"a": entry(-4, 0)}, bytes(4), "data_offsets"),
    "one offset": ({"a": {"dtype": "F32", "shape": [0], "data_offsets": [0]}}, b"", "data_offsets"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), "data_offsets"),
    "entry is no object": ({"a": 4}, b"", "'a'"),
    "name twice": (
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        b"",
        "'a' occurs twice",
    ),
}


@pytest.mark.parametrize(("header", "data", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_one_error_that_names_the_file_and_what_is_wrong(tmp_path, header, data, message):
    path = write(tmp_path / "damaged.safetensors", header, data)
    with pytest.raises(CheckpointError, match=r"damaged\.safetensors") as caught:
        open_checkpoint(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x02\0\0\0\0\0\0", (100).to_bytes(8, "little") + b"{}", b"\xff" * 64])
def test_length_of_the_header_beyond_the_file_is_an_error_that_names_the_file(tmp_path, content):
    path = tmp_path / "short.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"short\.safetensors.*truncated"):
        open_checkpoint(path)


def test_git_lfs_pointer_is_told_from_a_damaged_file(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_checkpoint(tmp_path)


def check_consistent(checkpoint: Checkpoint, size: int):
    tensors: list[StoredTensor] = list(checkpoint.tensors.values())
    for tensor in tensors:
        assert tensor.nbytes == math.prod(tensor.shape) * tensor.dtype.itemsize
        assert 8 <= tensor.offset <= tensor.offset + tensor.nbytes <= size
    for tensor, after in itertools.pairwise(tensors):
        assert tensor.offset + tensor.nbytes == after.offset


@settings(max_examples=100, deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=3),
    cut=st.none() | st.integers(0, 400),
)
def test_random_damage_to_the_header_opens_consistently_or_is_a_checkpoint_error(tmp_path_factory, flips, cut):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    save_file({"a": torch.ones(3, 2), "b": torch.ones(0), "c": torch.ones((), dtype=torch.bfloat16)}, path)
    content = bytearray(path.read_bytes())
    end_of_header = 8 + int.from_bytes(content[:8], "little")
    for position, mask in flips:
        content[position % end_of_header] ^= mask
    content = content[:cut]
    path.write_bytes(content)
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError as error:
        checkpoint, message = None, str(error)
    if checkpoint is None:
        assert "fuzzed.safetensors" in message
    else:
        check_consistent(checkpoint, len(content))
