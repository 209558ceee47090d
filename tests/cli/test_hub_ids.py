"""Commands take repositories of the hub by their names; the hub here is a stand-in that counts what is asked of it."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from models import llama

from bigload.cli import main

COMMIT = "c" * 40


class Hub:
    """Repositories that are 'downloaded' into the cache's layout, or a network that fails."""

    def __init__(self, cache):
        self.cache, self.there, self.asked, self.error = cache, {}, [], None

    def _snapshot(self, repo, revision):
        if self.error is not None:
            raise self.error
        if repo not in self.there:
            raise ValueError(f"404: {repo}")
        return self.cache / f"models--{repo.replace('/', '--')}" / "snapshots" / (revision or COMMIT)

    def _fetch(self, repo, snapshot, names):
        snapshot.mkdir(parents=True, exist_ok=True)
        for name in names:
            (snapshot / name).write_bytes((self.there[repo] / name).read_bytes())

    def snapshot_download(self, repo, *, revision=None, allow_patterns=None):
        snapshot = self._snapshot(repo, revision)
        held = [path.name for path in self.there[repo].iterdir()]
        self.asked.append((repo, revision, "all"))
        self._fetch(repo, snapshot, [name for name in held if any(Path(name).match(p) for p in allow_patterns)])
        return str(snapshot)

    def hf_hub_download(self, repo, name, *, revision=None):
        snapshot = self._snapshot(repo, revision)
        self.asked.append((repo, revision, name))
        self._fetch(repo, snapshot, [name])
        return str(snapshot / name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = Hub(tmp_path / "cache")
    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(made, name))
    torch.manual_seed(0)
    llama(False, eos_token_id=None).save_pretrained(tmp_path / "source")
    made.there["org/tiny"] = tmp_path / "source"
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return made


def test_plan_fetches_the_config_alone(hub, capsys):
    assert main(["plan", "org/tiny", "--max-memory", "0=1GiB"]) == 0
    assert hub.asked == [("org/tiny", None, "config.json")]
    first = capsys.readouterr().out
    assert first.startswith("In nf4 the model fits")
    hub.asked.clear()
    assert main(["plan", "org/tiny@v1", "--max-memory", "0=1GiB"]) == 0
    assert hub.asked == [("org/tiny", "v1", "config.json")]
    assert capsys.readouterr().out == first


def test_load_show_and_quantize_take_a_repository(hub, capsys):
    assert main(["load", "org/tiny", "--device-map", "cpu"]) == 0
    assert "on cpu as nf4" in capsys.readouterr().out
    assert main(["show", "org/tiny"]) == 0
    assert "org/tiny" in capsys.readouterr().out
    assert main(["quantize", "org/tiny", "made", "--device", "cpu"]) == 0
    assert main(["load", "made", "--device-map", "cpu"]) == 0
    assert {what for _, _, what in hub.asked} == {"all"}


def test_plan_of_what_is_here_is_of_its_weights(hub, capsys):
    """So that a checkpoint that is quantized is planned as it is."""
    assert main(["quantize", "org/tiny", "made", "--quant", "int8", "--device", "cpu"]) == 0
    hub.there["org/int8"] = Path("made")
    assert main(["load", "org/int8", "--device-map", "cpu"]) == 0
    capsys.readouterr()
    assert main(["plan", "org/int8", "--max-memory", "0=1GiB"]) == 0
    assert capsys.readouterr().out.startswith("In int8 the model fits")


def test_plan_of_a_quantized_repository_takes_its_config_at_its_word(hub, capsys):
    assert main(["quantize", "org/tiny", "made", "--quant", "int8", "--device", "cpu"]) == 0
    hub.there["org/int8"] = Path("made")
    capsys.readouterr()
    assert main(["plan", "org/int8", "--max-memory", "0=1GiB"]) == 0
    assert hub.asked[-1] == ("org/int8", None, "config.json")
    assert capsys.readouterr().out.startswith("In int8 the model fits")


@pytest.mark.parametrize(("method", "is_read"), [("fp8", True), ("fbgemm_fp8", True), ("mxfp4", True), ("gptq", False)])
def test_plan_of_a_config_alone_warns_of_methods_that_are_not_read(tmp_path, capsys, method, is_read):
    llama(False).config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    said = {"quantization_config": {"quant_method": method}}
    (tmp_path / "config.json").write_text(json.dumps(config | said))
    assert main(["plan", str(tmp_path / "config.json"), "--max-memory", "0=1GiB"]) == 0
    assert ("plans them as if they were not" in capsys.readouterr().err) != is_read


def test_weights_that_are_not_all_here_yet_do_not_hinder_a_plan(hub, capsys):
    snapshot = hub._snapshot("org/tiny", None)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert main(["plan", "org/tiny", "--max-memory", "0=1GiB"]) == 0


@pytest.mark.parametrize("command", [["load"], ["plan"], ["show"], ["quantize"]], ids=lambda command: command[0])
@pytest.mark.parametrize("failure", ["offline", "no network", "no such repository"])
def test_what_cannot_be_fetched_says_the_command_that_fetches_it(hub, capsys, command, failure):
    capsys.readouterr()
    name = "org/tiny"
    if failure == "offline":
        hub.error = huggingface_hub.errors.LocalEntryNotFoundError("outgoing traffic has been disabled (offline)")
    elif failure == "no network":
        hub.error = ConnectionError("Name or service not known\nand more")
    else:
        name = "org/tyni"
    arguments = [*command, name, *(["made"] if command == ["quantize"] else [])]
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.rstrip().endswith(f"hf download {name}" + (" config.json" if command == ["plan"] else ""))
    hub.error = None
    if failure != "no such repository":  # fetched, as the command does
        assert main(arguments) == 0


def test_without_a_network_set_to_offline_it_is_told_at_once(tmp_path, monkeypatch, capsys):
    """With the hub's own library."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert main(["plan", "org/absent@v3"]) == 1
    assert capsys.readouterr().err.rstrip().endswith("hf download org/absent config.json --revision v3")


def test_messages_name_the_repository_not_the_cache(hub, capsys):
    (hub.there["org/tiny"] / "config.json").write_text('{"model_type": "no_such_model"}')
    assert main(["load", "org/tiny"]) == 1
    said = capsys.readouterr().err
    assert "'org/tiny'" in said
    assert "snapshots" not in said


def test_a_folder_of_that_name_comes_first(hub, capsys):
    folder = Path("org/tiny")
    folder.parent.mkdir()
    folder.symlink_to(hub.there["org/tiny"])
    assert main(["plan", "org/tiny", "--max-memory", "0=1GiB"]) == 0
    assert hub.asked == []


def test_a_folder_with_a_config_is_named(hub, capsys):
    assert main(["plan", "tiny"]) == 1
    assert "name a folder with a config.json" in capsys.readouterr().err
    assert main(["plan", str(hub.there["org/tiny"]), "--max-memory", "0=1GiB"]) == 0
