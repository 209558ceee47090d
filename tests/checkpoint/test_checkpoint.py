"""Where a checkpoint's weights are found: in a file, an index or a folder, and what is refused."""

import re

import pytest
import torch
from checkpoints import save, save_shards, write_index
from safetensors.torch import save_file

from bigload.checkpoint.checkpoint import open_checkpoint
from bigload.errors import CheckpointError


@pytest.mark.parametrize("content", [b"{", b"[]", b'"x"', b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}'])
def test_index_without_a_map_of_tensors_to_files_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        open_checkpoint(path)


def test_index_gives_the_tensors_of_all_shards(tmp_path):
    shards = {"2.safetensors": {"b": torch.ones(2)}, "1.safetensors": {"c": torch.ones(3), "a": torch.ones(1)}}
    checkpoint = open_checkpoint(save_shards(shards, tmp_path))
    assert {name: tensor.file.name for name, tensor in checkpoint.tensors.items()} == {
        "a": "1.safetensors",
        "c": "1.safetensors",
        "b": "2.safetensors",
    }
    assert [tensor.file.name for tensor in checkpoint.tensors.values()] == ["1.safetensors"] * 2 + ["2.safetensors"]


def test_index_decides_between_shards_that_hold_the_same_name(tmp_path):
    shards = {"1.safetensors": {"a": torch.ones(1)}, "2.safetensors": {"a": torch.ones(2), "b": torch.ones(2)}}
    index = save_shards(shards, tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    assert open_checkpoint(index).tensors["a"].shape == (1,)


def test_index_naming_missing_shards_lists_all_of_them(tmp_path):
    weight_map = {"a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors"}
    index = save_shards({"1.safetensors": {"a": torch.ones(1)}}, tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json.*'2\.safetensors', '3\.safetensors'"):
        open_checkpoint(index)


def test_index_naming_tensors_that_their_shard_lacks_lists_all_of_them(tmp_path):
    weight_map = {"a": "1.safetensors", "b": "1.safetensors", "c": "1.safetensors"}
    index = save_shards({"1.safetensors": {"a": torch.ones(1)}}, tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json.*'b', 'c'") as caught:
        open_checkpoint(index)
    assert caught.value.missing_keys == ["b", "c"]


@pytest.mark.parametrize("absolute", [True, False])
def test_index_pointing_outside_of_its_folder_is_refused(tmp_path, absolute):
    outside = tmp_path / "secret.safetensors"
    save_file({"a": torch.ones(1)}, outside)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    index = save_shards({}, folder, {"a": str(outside) if absolute else "../secret.safetensors"})
    with pytest.raises(CheckpointError, match=r"secret\.safetensors.*outside its own folder"):
        open_checkpoint(index)


def test_damaged_shard_is_an_error_that_names_the_shard(tmp_path):
    index = save_shards({"1.safetensors": {"a": torch.ones(1)}, "2.safetensors": {"b": torch.ones(1)}}, tmp_path)
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


def test_safetensors_are_preferred_where_both_kinds_of_index_lie(tmp_path):
    torch.save({"pickled": torch.ones(1)}, tmp_path / "pytorch_model-1.bin")
    write_index({"pickled": "pytorch_model-1.bin"}, tmp_path / "pytorch_model.bin.index.json")
    save_shards({"1.safetensors": {"safe": torch.ones(1)}}, tmp_path)
    assert open_checkpoint(tmp_path).tensors.keys() == {"safe"}


def test_adapter_beside_the_base_weights_is_not_taken_for_them(tmp_path):
    save_file({"lora": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    torch.save({"base": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert open_checkpoint(tmp_path).tensors.keys() == {"base"}


def test_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.h5").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"model\.h5.*expected a \.safetensors"):
        open_checkpoint(tmp_path / "model.h5")


def test_the_current_folder_is_a_folder(tmp_path, monkeypatch):
    save({"a": torch.ones(1)}, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint(".").tensors.keys() == {"a"}
    with pytest.raises(CheckpointError, match="say where"):
        open_checkpoint("")


def test_folder_is_searched_for_model_safetensors_then_an_index_then_any_single_file(tmp_path):
    save_file({"single": torch.ones(1)}, tmp_path / "any.safetensors")
    assert open_checkpoint(tmp_path).tensors.keys() == {"single"}
    index = save_shards({"1.safetensors": {"sharded": torch.ones(1)}}, tmp_path)
    assert open_checkpoint(tmp_path).location == index
    assert open_checkpoint(tmp_path).tensors.keys() == {"sharded"}
    save({"whole": torch.ones(1)}, tmp_path)
    assert open_checkpoint(tmp_path).tensors.keys() == {"whole"}


def test_folder_may_hold_an_index_of_any_name(tmp_path):
    index = save_shards(
        {"1.safetensors": {"a": torch.ones(1)}, "2.safetensors": {"b": torch.ones(1)}},
        tmp_path,
        name="diffusion.safetensors.index.json",
    )
    assert open_checkpoint(tmp_path).location == index


def test_location_may_be_a_string(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "any.safetensors")
    assert open_checkpoint(str(tmp_path)) == open_checkpoint(tmp_path)
    assert open_checkpoint(str(tmp_path)).tensors == open_checkpoint(tmp_path / "any.safetensors").tensors


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
    save({**tensors, "weight": torch.zeros(100, dtype=torch.bfloat16)}, tmp_path)
    assert open_checkpoint(tmp_path).dominant_dtype is torch.bfloat16


def test_an_index_may_be_the_map_alone(tmp_path):
    index = save_shards({"a.safetensors": {"x": torch.ones(2)}, "b.safetensors": {"y": torch.ones(3)}}, tmp_path)
    index.write_text('{"x": "a.safetensors", "y": "b.safetensors"}')
    assert open_checkpoint(tmp_path).tensors.keys() == {"x", "y"}


# A folder as diffusers and transformers write it with `variant=`: what is plain -> what is of a variant.
_VARIANTS = {
    "files": (["unet.safetensors"], ["unet.fp16.safetensors", "unet.non_ema.safetensors"]),
    "shards of the variant": (
        ["unet.safetensors"],
        ["unet.fp16-00001-of-00002.safetensors", "unet.fp16-00002-of-00002.safetensors"],
    ),
    "numbers first": (["unet.bin"], ["unet-00001-of-00001.fp16.safetensors", "unet.safetensors.index.fp16.json"]),
    "an index in the variant's name": (
        ["unet.safetensors"],
        ["unet.fp16-00001-of-00001.safetensors", "unet.fp16.safetensors.index.json"],
    ),
    "transformers": (["pytorch_model.bin"], ["pytorch_model.fp16.bin", "model.fp16.safetensors"]),
    "both indexes": (
        ["a-00001-of-00001.safetensors", "a.safetensors.index.json"],
        ["a.fp16-00001-of-00001.safetensors", "a.safetensors.index.fp16.json", "a.fp16.safetensors.index.json"],
    ),
    "an index and a file": (["a-00001-of-00001.bin", "a.bin.index.json"], ["a.fp16.bin", "a.fp16.safetensors"]),
}


def _write_weights(folder, names, key):
    shards = [name for name in names if not name.endswith(".json")]
    for name in shards:
        tensors = {key: torch.ones(1)}
        save_file(tensors, folder / name) if name.endswith(".safetensors") else torch.save(tensors, folder / name)
    for name in set(names) - set(shards):
        write_index({key: shards[0]}, folder / name)


@pytest.mark.parametrize(("plain", "variants"), _VARIANTS.values(), ids=_VARIANTS)
def test_folder_with_plain_weights_and_variants_gives_the_plain_ones(tmp_path, plain, variants):
    _write_weights(tmp_path, plain, "plain")
    _write_weights(tmp_path, variants, "variant")
    assert open_checkpoint(tmp_path).tensors.keys() == {"plain"}


@pytest.mark.parametrize("names", [["a.fp16.safetensors"], ["a.1-00001-of-00001.bin", "a.bin.index.json"],
                                   ["a.fp16-00001-of-00001.safetensors", "b.safetensors.index.fp16.json"]])  # fmt: skip
def test_variant_without_plain_weights_is_what_there_is(tmp_path, names):
    _write_weights(tmp_path, names, "variant")
    assert open_checkpoint(tmp_path).tensors.keys() == {"variant"}


def test_variants_without_plain_weights_are_named(tmp_path):
    _write_weights(tmp_path, ["a.fp16.safetensors", "a.bf16.safetensors"], "variant")
    with pytest.raises(CheckpointError, match=r"'a\.bf16\.safetensors', 'a\.fp16\.safetensors': name the one to load"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path / "a.bf16.safetensors").tensors  # the remedy


def test_usual_name_of_diffusers_comes_before_others(tmp_path):
    _write_weights(tmp_path, ["adapter.safetensors"], "other")
    _write_weights(tmp_path, ["diffusion_pytorch_model.safetensors"], "usual")
    assert open_checkpoint(tmp_path).tensors.keys() == {"usual"}


def test_folder_of_a_pipeline_names_the_folders_with_weights(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    for name in ("scheduler", "transformer", "vae"):
        (tmp_path / name).mkdir()
    for name in ("transformer", "vae"):
        _write_weights(tmp_path / name, ["diffusion_pytorch_model.safetensors"], name)
    with pytest.raises(CheckpointError, match="is a pipeline of diffusers, with the weights of 'transformer', 'vae'"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path / "transformer").tensors.keys() == {"transformer"}  # the remedy
