"""Files from strangers: opened right or refused by a CheckpointError, and nothing is allocated, read or run for them.

Those that the tests of each reader have (`tests/checkpoint`, `test_damaged_quantized_weights.py`) are not repeated.
`python tests/fuzzing` goes on for as long as it is told to.
"""

import json
import os
import tracemalloc
from pathlib import Path

import pytest
import torch
from checkpoints import empty, save, save_checkpoint
from failures import raising
from hostile_files import KINDS, Layers, attempt, write_header
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bigload import CheckpointError, load_and_quantize_model, quantize_checkpoint
from bigload.checkpoint.checkpoint import open_checkpoint


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32))
def test_damage_is_refused_or_does_no_harm(kind, tmp_path_factory, seed):
    attempt(kind, seed, tmp_path_factory.mktemp("hostile"))


@pytest.mark.parametrize("shape", [[0, 2**63], [10**30, 0], [2**40, 2**40, 0]])
def test_shapes_that_no_machine_counts_are_refused(tmp_path, shape):
    header = {"a": {"dtype": "U8", "shape": shape, "data_offsets": [0, 0]}}
    write_header(tmp_path / "model.safetensors", header, b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)


def test_tensor_of_so_many_dimensions_is_refused_or_left_over(tmp_path):
    header = {"a": {"dtype": "U8", "shape": [1] * 10_000, "data_offsets": [0, 1]}}
    write_header(tmp_path / "model.safetensors", header, b"1")
    with pytest.raises(CheckpointError):
        load_and_quantize_model(empty(nn.Linear, 1, 1), "nf4", tmp_path, device_map="cpu")


def test_length_of_a_header_is_not_allocated_before_the_file_has_it(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((99_000_000).to_bytes(8, "little") + b"{")
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_expanded_pickle_is_not_filled_out_before_its_shape_is_that_of_the_model(tmp_path):
    """Four bytes in a file that say they are four terabytes."""
    torch.save({"weight": torch.zeros(1).expand(2**20, 2**20)}, tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match="weight"):
        load_and_quantize_model(empty(nn.Linear, 4, 4, bias=False), "nf4", tmp_path / "model.bin", device_map="cpu")


NAMES = ["", ".", "..", "/", "a/../b", "\n", "\0", "\x1b[31m", "'", '"', "\\", "é", "🦙", "a" * 5000, "a..b", " "]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_odd_names_are_left_over_and_change_nothing(tmp_path, name, warned):
    model = Layers()
    state = {n: t.detach().clone() for n, t in model.state_dict().items()}
    save(state | {name: torch.ones(3)}, tmp_path)
    options = {"device_map": "cpu"}
    loaded = load_and_quantize_model(empty(Layers), "nf4", tmp_path, **options)
    assert any("not in the model" in message or ascii(name)[1:-1] in ascii(message) for message in warned())
    assert torch.equal(loaded.head.weight, state["head.weight"])
    with pytest.raises(CheckpointError):
        load_and_quantize_model(empty(Layers), "nf4", tmp_path, strict=True, **options)


def test_link_out_of_the_folder_is_not_copied(tmp_path, warned):
    """A folder from a stranger may hold a link to a file of the owner's, who would publish it with the copy."""
    secret = tmp_path / "secret"
    secret.write_text("the owner's key")
    source = save_checkpoint(Layers(), tmp_path / "source")
    (source / "tokenizer.json").symlink_to(secret)
    (source / "vocab.json").write_text("{}")
    (source / "merges.txt").symlink_to("vocab.json")
    quantize_checkpoint(source, tmp_path / "made", "nf4", model=empty(Layers), device="cpu")
    assert not (tmp_path / "made" / "tokenizer.json").exists()
    assert (tmp_path / "made" / "vocab.json").read_text() == "{}"
    assert (tmp_path / "made" / "merges.txt").read_text() == "{}"
    assert any("tokenizer.json" in message and "link" in message for message in warned())
    # The remedy that the message names.
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").write_text(secret.read_text())
    quantize_checkpoint(source, tmp_path / "made", "nf4", model=empty(Layers), device="cpu", overwrite=True)
    assert (tmp_path / "made" / "tokenizer.json").read_text() == "the owner's key"


def test_links_of_the_hubs_cache_are_copied(tmp_path):
    """It keeps the files in blobs/, and links to them in a folder for each revision."""
    repository = tmp_path / "models--org--name"
    source = save_checkpoint(Layers(), repository / "snapshots" / "abc")
    (repository / "blobs").mkdir()
    for number, (file, text) in enumerate({"tokenizer.json": "{}", "model.safetensors": None}.items()):
        blob = repository / "blobs" / str(number)
        if text is None:
            (source / file).rename(blob)
        else:
            blob.write_text(text)
        (source / file).symlink_to(os.path.relpath(blob, source))
    quantize_checkpoint(source, tmp_path / "made", "nf4", model=empty(Layers), device="cpu")
    assert (tmp_path / "made" / "tokenizer.json").read_text() == "{}"


def test_what_is_no_regular_file_is_refused(tmp_path):
    """What is no regular file has no size, and may have no end."""
    for name in ("model.safetensors", "model.safetensors.index.json", "model.bin"):
        path = tmp_path / name
        os.mkfifo(path)
        with pytest.raises(CheckpointError, match="not a regular file"):
            open_checkpoint(path)


@pytest.mark.parametrize("layers", [10**9, 10**30])
def test_config_with_more_layers_than_anything_has_is_refused(tmp_path, layers):
    pytest.importorskip("transformers")
    save({"weight": torch.ones(2)}, tmp_path)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers}
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 8, "num_attention_heads": 1}))
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        quantize_checkpoint(tmp_path, tmp_path.parent / "made", "nf4", device="cpu")


def test_messages_never_print_weights(tmp_path):
    """Values of tensors may be private; names and shapes are what errors are about."""
    said = []
    for seed in range(40):
        for kind in KINDS:
            said += attempt(kind, seed, tmp_path / f"{kind}{seed}", fill=1234.5) or []
    assert len(said) > 100
    assert not [message for message in said if "1234" in message]


def test_values_that_cannot_be_quantized_are_not_printed(tmp_path):
    model = Layers()
    with torch.no_grad():
        model.first.weight.fill_(1234.5)
        model.first.weight[3, 3] = float("inf")
    with pytest.raises(Exception, match=r"first\.weight") as caught:
        load_and_quantize_model(empty(Layers), "nf4", save_checkpoint(model, tmp_path), device_map="cpu")
    assert "1234" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_files_load_while_nothing_is_damaged(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, kind, (KINDS[kind][0], lambda folder, rng: None))
    assert attempt(kind, 0, tmp_path) == []


def test_an_error_of_another_kind_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("hostile_files.open_checkpoint", raising(KeyError("x")))
    with pytest.raises(KeyError):
        attempt("header", 0, tmp_path)


def test_counts_in_the_docs_are_those_of_the_result():
    root = Path(__file__).parents[2]
    result = json.loads((root / "benchmarks/results/fuzzing.json").read_text())
    page = (root / "docs/reliability.md").read_text()
    assert f"{result['executions']:,} executions in {result['seconds']} seconds" in page
    assert not result["failures"]
    assert {name.partition(":")[0] for name in result["outcomes"]} == set(KINDS)
