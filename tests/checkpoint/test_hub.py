"""A repository of the hub loads from the cache by its name; what is not there is an error that says what to do.

The cache is made by hand and the hub is set to be offline: nothing here touches a network.
"""

import sys
from fnmatch import fnmatch

import huggingface_hub
import pytest
import torch
from checkpoints import empty, empty_like, save_checkpoint
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from models import llama
from torch import nn

from bigload import load_and_quantize_model, quantize_checkpoint, save_quantized_model
from bigload.checkpoint.checkpoint import open_checkpoint
from bigload.checkpoint.hub import hub_folder, is_hub_id
from bigload.errors import CheckpointError

MAIN, OLDER = "a" * 40, "0123456789" * 4


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Return the folder of an empty cache, the only one that the hub's library knows, and work beside it."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def linear(value):
    model = nn.Sequential(nn.Linear(4, 4))
    nn.init.constant_(model[0].weight, value)
    return model


def snapshot(cache, repo, commit=MAIN, branch="main"):
    """Make the folder of a repository's commit, and the branch that names it."""
    storage = cache / f"models--{repo.replace('/', '--')}"
    (storage / "refs").mkdir(parents=True, exist_ok=True)
    (storage / "refs" / branch).write_text(commit)
    folder = storage / "snapshots" / commit
    folder.mkdir(parents=True)
    return folder


def value_in(location):
    """Load a repository into a Linear, and tell the value that its weight is full of."""
    model = empty(linear, 0.0)
    loaded = load_and_quantize_model(model, {"load_in_4bit": True, "skip_modules": ["*"]}, location, device_map="cpu")
    assert loaded[0].weight.unique().numel() == 1
    return loaded[0].weight.unique().item()


def test_name_loads_the_main_branch(cache):
    save_checkpoint(linear(3.0), snapshot(cache, "org/name"))
    assert value_in("org/name") == 3.0


@pytest.mark.parametrize(
    ("revision", "value"), [("", 3.0), ("@main", 3.0), ("@v1.0", 2.0), (f"@{OLDER}", 2.0), (f"@{MAIN}", 3.0)]
)
def test_revision_is_a_branch_a_tag_or_a_commit(cache, revision, value):
    save_checkpoint(linear(3.0), snapshot(cache, "org/name"))
    save_checkpoint(linear(2.0), snapshot(cache, "org/name", OLDER, "v1.0"))
    assert value_in(f"org/name{revision}") == value


def test_sharded_repository_loads_by_its_index(cache):
    save_checkpoint(linear(3.0), snapshot(cache, "org/name"), shards=2)
    assert value_in("org/name") == 3.0


def test_repository_with_pickles_only_loads_them(cache):
    torch.save(linear(5.0).state_dict(), snapshot(cache, "org/name") / "pytorch_model.bin")
    assert value_in("org/name") == 5.0


def test_safetensors_come_before_pickles(cache):
    folder = save_checkpoint(linear(3.0), snapshot(cache, "org/name"))
    torch.save(linear(5.0).state_dict(), folder / "pytorch_model.bin")
    assert value_in("org/name") == 3.0


def test_only_safetensors_are_asked_for_where_there_are_any(cache, monkeypatch):
    folder = save_checkpoint(linear(3.0), snapshot(cache, "org/name"))
    asked = []

    def snapshot_download(repo, *, revision, allow_patterns):
        asked.append((repo, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub_folder("org/name@v1.0") == folder
    ((repo, revision, patterns),) = asked
    assert (repo, revision) == ("org/name", "v1.0")
    assert "*.safetensors" in patterns
    assert "*.bin" not in patterns
    for name in ("tokenizer.json", "merges.txt", "spiece.model", "chat_template.jinja", "README.md"):
        assert any(fnmatch(name, pattern) for pattern in patterns), name


def test_model_of_transformers_quantizes_from_the_hub(cache):
    model = llama(True)
    model.save_pretrained(snapshot(cache, "org/tiny-llama_1.0"))
    assert load_and_quantize_model(empty_like(model), "nf4", "org/tiny-llama_1.0", device_map="cpu").is_loaded_in_4bit


def test_what_is_saved_of_it_names_it_and_has_its_tokenizer(cache, tmp_path):
    model, folder = llama(True), snapshot(cache, "org/tiny-llama_1.0")
    model.save_pretrained(folder)
    (folder / "merges.txt").write_text("a b")
    loaded = load_and_quantize_model(empty_like(model), "nf4", "org/tiny-llama_1.0", device_map="cpu")
    save_quantized_model(loaded, tmp_path / "saved")
    quantize_checkpoint("org/tiny-llama_1.0", tmp_path / "made", "nf4", model=empty_like(model), device="cpu")
    for name in ("saved", "made"):
        said = huggingface_hub.metadata_load(tmp_path / name / "README.md")
        assert (said["base_model"], said["base_model_relation"]) == ("org/tiny-llama_1.0", "quantized")
        assert (tmp_path / name / "merges.txt").read_text() == "a b"


def test_repository_that_is_not_in_the_cache_says_what_to_do():
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("org/absent")
    message = str(caught.value)
    assert "'org/absent'" in message
    assert "cache" in message
    assert message.endswith("hf download org/absent")


@pytest.mark.parametrize("revision", ["v2.0", "f" * 40])
def test_revision_that_is_not_in_the_cache_is_named_with_what_to_do(cache, revision):
    save_checkpoint(linear(3.0), snapshot(cache, "org/name"))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(f"org/name@{revision}")
    message = str(caught.value)
    assert f"revision '{revision}' of 'org/name'" in message
    assert message.endswith(f"hf download org/name --revision {revision}")


def test_repository_that_was_fetched_is_loaded(cache):
    """As by the command that the error names."""
    with pytest.raises(CheckpointError, match="fetch it where there is a network with: hf download org/name"):
        open_checkpoint("org/name")
    save_checkpoint(linear(3.0), snapshot(cache, "org/name"))
    assert value_in("org/name") == 3.0


def test_name_that_the_hub_does_not_allow_is_a_checkpoint_error():
    with pytest.raises(CheckpointError, match=r"org/na--me"):
        open_checkpoint("org/na--me")


def test_repository_without_weights_says_what_it_holds(cache):
    (snapshot(cache, "org/name") / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no weights.*'config\.json'"):
        open_checkpoint("org/name")


@pytest.mark.parametrize("failure", ["ProxyError", "ReadError", "RemoteProtocolError"])
def test_network_that_fails_in_any_way_is_a_checkpoint_error(monkeypatch, failure):
    # The hub's errors derive from its network library's, whichever that is by version.
    network = sys.modules[HfHubHTTPError.__mro__[1].__module__.partition(".")[0]]

    def fails(*args, **kwargs):
        raise getattr(network, failure)("the network is down")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(CheckpointError, match="the network is down"):
        open_checkpoint("org/name")


@pytest.mark.parametrize("path_first", [False, True])
def test_local_folder_of_that_name_comes_first(cache, tmp_path, path_first):
    if path_first:
        save_checkpoint(linear(7.0), tmp_path / "work" / "org" / "name")
    save_checkpoint(linear(3.0), snapshot(cache, "org/name"))
    assert value_in("org/name") == (7.0 if path_first else 3.0)


def test_path_object_is_never_a_hub_id(cache, tmp_path):
    save_checkpoint(linear(3.0), snapshot(cache, "org/name"))
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint((tmp_path / "work" / "org" / "name").relative_to(tmp_path / "work"))


@pytest.mark.parametrize("location", ["org/name", "org/name@main", "Org-1/na.me_2", "org/name@refs/pr/1"])
def test_what_has_the_form_of_a_hub_id(location):
    assert is_hub_id(location)


@pytest.mark.parametrize(
    "location",
    ["name", "a/b/c", "/org/name", "./name", "../name", "~/name", "org/", "/name", "org/name/", "org//name",
     "org/name@", "org/name@a@b", "org/na me", "org/name@a b", "org\\name", "org/name\n", "", "@main"],
)  # fmt: skip
def test_what_is_no_hub_id(location):
    assert not is_hub_id(location)


def test_two_slashes_are_a_path_that_is_not_there():
    with pytest.raises(CheckpointError, match="no such file or folder") as caught:
        open_checkpoint("org/name/file")
    assert "hub" not in str(caught.value)
