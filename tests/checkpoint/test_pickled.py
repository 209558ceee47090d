"""Pickled checkpoints: read exactly, without running anything that is in them."""

import os

import pytest
import torch
from checkpoints import write_index

from bigload.checkpoint.checkpoint import open_checkpoint
from bigload.errors import CheckpointError
from bigload.io.tensors import read_whole

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
    write_index(weight_map, tmp_path / "pytorch_model.bin.index.json")
    values = values_of(open_checkpoint(tmp_path))
    assert torch.equal(values["a"], STATE["a"])
    assert torch.equal(values["b"], STATE["b"])


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
