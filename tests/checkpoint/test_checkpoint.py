"""Reading headers: what safetensors wrote is described to the byte, and each kind of damage is one clear error."""

import itertools
import json
import math
import os
import re

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bigload.checkpoint.checkpoint import Checkpoint, open_checkpoint
from bigload.checkpoint.safetensors import read_header
from bigload.errors import CheckpointError
from bigload.io.tensors import StoredTensor, read_whole

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


def save_sharded(folder, shards, weight_map=None, name="model.safetensors.index.json"):
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard)
    if weight_map is None:
        weight_map = {key: shard for shard, tensors in shards.items() for key in tensors}
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))
    return folder / name


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


@pytest.mark.parametrize("content", [b"{", b"[]", b'"x"', b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}'])
def test_index_without_a_map_of_tensors_to_files_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        open_checkpoint(path)


def test_index_gives_the_tensors_of_all_shards(tmp_path):
    shards = {"2.safetensors": {"b": torch.ones(2)}, "1.safetensors": {"c": torch.ones(3), "a": torch.ones(1)}}
    checkpoint = open_checkpoint(save_sharded(tmp_path, shards))
    assert {name: tensor.file.name for name, tensor in checkpoint.tensors.items()} == {
        "a": "1.safetensors",
        "c": "1.safetensors",
        "b": "2.safetensors",
    }
    assert [tensor.file.name for tensor in checkpoint.tensors.values()] == ["1.safetensors"] * 2 + ["2.safetensors"]


def test_index_decides_between_shards_that_hold_the_same_name(tmp_path):
    shards = {"1.safetensors": {"a": torch.ones(1)}, "2.safetensors": {"a": torch.ones(2), "b": torch.ones(2)}}
    index = save_sharded(tmp_path, shards, {"a": "1.safetensors", "b": "2.safetensors"})
    assert open_checkpoint(index).tensors["a"].shape == (1,)


def test_index_naming_missing_shards_lists_all_of_them(tmp_path):
    weight_map = {"a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors"}
    index = save_sharded(tmp_path, {"1.safetensors": {"a": torch.ones(1)}}, weight_map)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json.*'2\.safetensors', '3\.safetensors'"):
        open_checkpoint(index)


def test_index_naming_tensors_that_their_shard_lacks_lists_all_of_them(tmp_path):
    weight_map = {"a": "1.safetensors", "b": "1.safetensors", "c": "1.safetensors"}
    index = save_sharded(tmp_path, {"1.safetensors": {"a": torch.ones(1)}}, weight_map)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json.*'b', 'c'") as caught:
        open_checkpoint(index)
    assert caught.value.missing_keys == ["b", "c"]


@pytest.mark.parametrize("absolute", [True, False])
def test_index_pointing_outside_of_its_folder_is_refused(tmp_path, absolute):
    outside = tmp_path / "secret.safetensors"
    save_file({"a": torch.ones(1)}, outside)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    index = save_sharded(folder, {}, {"a": str(outside) if absolute else "../secret.safetensors"})
    with pytest.raises(CheckpointError, match=r"secret\.safetensors.*outside its own folder"):
        open_checkpoint(index)


def test_damaged_shard_is_an_error_that_names_the_shard(tmp_path):
    index = save_sharded(tmp_path, {"1.safetensors": {"a": torch.ones(1)}, "2.safetensors": {"b": torch.ones(1)}})
    shard = tmp_path / "2.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"2\.safetensors"):
        open_checkpoint(index)


def test_no_such_path_is_an_error_that_names_it(tmp_path):
    with pytest.raises(CheckpointError, match=r"no such file or folder.*absent\.safetensors"):
        open_checkpoint(tmp_path / "absent.safetensors")


def test_home_of_nobody_is_an_error_that_names_it():
    with pytest.raises(CheckpointError, match="~nobody-of-this-name"):
        open_checkpoint("~nobody-of-this-name/model.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors"])
def test_link_to_a_file_that_is_gone_is_an_error_that_names_it(tmp_path, name):
    (tmp_path / name).symlink_to(tmp_path / "blob")
    with pytest.raises(CheckpointError, match=re.escape(name)):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["x.safetensors", "x.index.json"])
def test_folder_in_the_place_of_a_file_is_an_error_that_names_it(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=re.escape(name)):
        open_checkpoint(tmp_path)


def test_empty_folder_is_an_error_that_names_it(tmp_path):
    with pytest.raises(CheckpointError, match=re.escape(tmp_path.name)) as caught:
        open_checkpoint(tmp_path)
    assert "found nothing" in str(caught.value)


def test_folder_without_weights_is_an_error_that_says_what_it_holds(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": torch.ones(1)}, tmp_path / "optimizer.pt")  # pickled, and no weights
    with pytest.raises(CheckpointError, match=r"'config\.json', 'optimizer\.pt'") as caught:
        open_checkpoint(tmp_path)
    assert tmp_path.name in str(caught.value)


def test_folder_with_several_files_and_no_index_is_an_error_that_names_them(tmp_path):
    for name in ("1.safetensors", "2.safetensors"):
        save_file({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"'1\.safetensors', '2\.safetensors'") as caught:
        open_checkpoint(tmp_path)
    assert tmp_path.name in str(caught.value)


STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.int64), "c": torch.zeros(0, 3)}


def values_of(checkpoint):
    return {name: read_whole(tensor) for name, tensor in checkpoint.tensors.items()}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickled_file_is_described_and_read_exactly(tmp_path, name, zipped):
    state = {**STATE, "strided": STATE["a"].T, "shared": STATE["a"]}
    torch.save(state, tmp_path / name, _use_new_zipfile_serialization=zipped)
    for location in (tmp_path, tmp_path / name):
        checkpoint = open_checkpoint(location)
        assert {n: (t.dtype, t.shape) for n, t in checkpoint.tensors.items()} == {
            n: (t.dtype, tuple(t.shape)) for n, t in state.items()
        }
        assert all(torch.equal(value, state[name]) for name, value in values_of(checkpoint).items())


def test_pickled_shards_of_an_index_are_read(tmp_path):
    torch.save({"a": STATE["a"]}, tmp_path / "pytorch_model-1.bin")
    torch.save({"b": STATE["b"]}, tmp_path / "pytorch_model-2.bin")
    weight_map = {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    values = values_of(open_checkpoint(tmp_path))
    assert torch.equal(values["a"], STATE["a"])
    assert torch.equal(values["b"], STATE["b"])


def test_safetensors_are_preferred_where_both_kinds_of_index_lie(tmp_path):
    torch.save({"pickled": STATE["a"]}, tmp_path / "pytorch_model-1.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": {"pickled": "pytorch_model-1.bin"}})
    )
    save_sharded(tmp_path, {"1.safetensors": {"safe": torch.ones(1)}})
    assert open_checkpoint(tmp_path).tensors.keys() == {"safe"}


class Mischief:
    """Unpickled, it would make a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickle_with_code_in_it_is_refused_and_runs_nothing(tmp_path, zipped):
    made = tmp_path / "made_by_the_pickle"
    torch.save({"a": STATE["a"], "b": Mischief(made)}, tmp_path / "m.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"m\.bin.*mkdir.*nothing of it was run"):
        open_checkpoint(tmp_path)
    assert not made.exists()


@pytest.mark.parametrize(
    ("held", "word"),
    [
        ([STATE["a"]], "list"),
        ({"state_dict": STATE, "epoch": 3}, "'state_dict', 'epoch'"),
        ({0: STATE["a"]}, "'0'"),
        ({"s": torch.eye(3).to_sparse()}, "'s'"),
        ({"m": torch.empty(3, device="meta")}, "'m'"),
    ],
)
def test_pickle_that_is_no_state_dict_is_refused_and_says_what_it_holds(tmp_path, held, word):
    torch.save(held, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=word):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("kept", [1, 10, 100, 600])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickle_that_is_cut_is_an_error_that_names_it(tmp_path, kept, zipped):
    path = tmp_path / "m.bin"
    torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"m\.bin"):
        open_checkpoint(path)


def test_adapter_beside_the_base_weights_is_not_taken_for_them(tmp_path):
    save_file({"lora": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    torch.save({"base": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert open_checkpoint(tmp_path).tensors.keys() == {"base"}


def test_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"model\.gguf.*expected a \.safetensors"):
        open_checkpoint(tmp_path / "model.gguf")


def test_git_lfs_pointer_is_told_from_a_damaged_file(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_checkpoint(tmp_path)


def test_the_current_folder_is_a_folder(tmp_path, monkeypatch):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint(".").tensors.keys() == {"a"}
    with pytest.raises(CheckpointError, match="say where"):
        open_checkpoint("")


def test_folder_is_searched_for_model_safetensors_then_an_index_then_any_single_file(tmp_path):
    save_file({"single": torch.ones(1)}, tmp_path / "any.safetensors")
    assert open_checkpoint(tmp_path).tensors.keys() == {"single"}
    index = save_sharded(tmp_path, {"1.safetensors": {"sharded": torch.ones(1)}})
    assert open_checkpoint(tmp_path).location == index
    assert open_checkpoint(tmp_path).tensors.keys() == {"sharded"}
    save_file({"whole": torch.ones(1)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).tensors.keys() == {"whole"}


def test_folder_may_hold_an_index_of_any_name(tmp_path):
    index = save_sharded(
        tmp_path,
        {"1.safetensors": {"a": torch.ones(1)}, "2.safetensors": {"b": torch.ones(1)}},
        name="diffusion.safetensors.index.json",
    )
    assert open_checkpoint(tmp_path).location == index


def test_location_may_be_a_string(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "any.safetensors")
    assert open_checkpoint(str(tmp_path)) == open_checkpoint(tmp_path / "any.safetensors")


@pytest.mark.parametrize(
    ("numel_of", "expected"),
    [
        ({torch.float32: 1, torch.float16: 3}, torch.float16),
        ({torch.float32: 2, torch.bfloat16: 3}, torch.float32),
        ({torch.bfloat16: 1, torch.int64: 100, torch.uint8: 100}, torch.bfloat16),
        ({torch.int8: 5}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_dominant_dtype_is_the_floating_one_with_most_bytes(tmp_path, numel_of, expected):
    path = tmp_path / "model.safetensors"
    save_file({str(dtype): torch.zeros(numel, dtype=dtype) for dtype, numel in numel_of.items()}, path)
    assert open_checkpoint(path).dominant_dtype is expected


def test_dominant_dtype_counts_bytes_not_tensors(tmp_path):
    tensors = {f"norm{n}": torch.zeros(1) for n in range(5)}
    save_file({**tensors, "weight": torch.zeros(100, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).dominant_dtype is torch.bfloat16


def check_consistent(checkpoint: Checkpoint, size: int):
    tensors: list[StoredTensor] = list(checkpoint.tensors.values())
    for tensor in tensors:
        assert tensor.nbytes == math.prod(tensor.shape) * tensor.dtype.itemsize
        assert 8 <= tensor.offset <= tensor.offset + tensor.nbytes <= size
    for tensor, after in itertools.pairwise(tensors):
        assert tensor.offset + tensor.nbytes == after.offset


@settings(max_examples=300, deadline=None)
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
