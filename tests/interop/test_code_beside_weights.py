"""Folders whose model is made by code that lies beside the weights: never run by us, and saved with them."""

import importlib
import json
import sys

import pytest
import torch
import transformers
from checkpoints import empty
from comparisons import assert_same_bits, outputs
from transformers import AutoConfig, AutoModelForCausalLM, dynamic_module_utils

from bigload import CheckpointError, load_and_quantize_model, quantize_checkpoint, save_quantized_model
from bigload.cli import main

_PARTS = """
from torch import nn

class Tower(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(self.up(x).relu())
"""
_CONFIGURATION = """
from transformers import PretrainedConfig

class PagodaConfig(PretrainedConfig):
    model_type = "pagoda"

    def __init__(self, width=64, **others):
        super().__init__(**others)
        self.width = width
"""
_MODELING = """
from torch import nn
from transformers import PreTrainedModel
from .configuration_pagoda import PagodaConfig
from .parts_pagoda import Tower

class PagodaForCausalLM(PreTrainedModel):
    config_class = PagodaConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(50, config.width)
        self.towers = nn.Sequential(Tower(config.width), Tower(config.width))
        self.lm_head = nn.Linear(config.width, 50)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(std=0.2)

    def forward(self, input_ids):
        return self.lm_head(self.towers(self.embedding(input_ids)))
"""
_AUTO_MAP = {
    "AutoConfig": "configuration_pagoda.PagodaConfig",
    "AutoModelForCausalLM": "modeling_pagoda.PagodaForCausalLM",
}
CODE = {"parts_pagoda.py": _PARTS, "configuration_pagoda.py": _CONFIGURATION, "modeling_pagoda.py": _MODELING}
TOKENS = torch.arange(12).view(2, 6)


@pytest.fixture(autouse=True)
def never_asks(monkeypatch, tmp_path):
    """Code that transformers runs lies in a cache of this test, and nothing is asked at the terminal."""

    def asked(*given):
        raise AssertionError("asked at the terminal")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("transformers_modules", "pagoda_package")):
            del sys.modules[name]


@pytest.fixture
def folder(tmp_path):
    """A folder as they are downloaded: weights, a config that names the code, the code, and a tokenizer of its own."""
    torch.manual_seed(0)
    package = imported(tmp_path)
    package.PagodaForCausalLM(package.PagodaConfig()).save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text()) | {"auto_map": _AUTO_MAP}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    for name, text in CODE.items():
        (tmp_path / "source" / name).write_text(text)
    return tmp_path / "source"


def imported(tmp_path):
    """Import the code as a user does who has copied it into a package."""
    if "pagoda_package" not in sys.modules:
        package = tmp_path / "modules" / "pagoda_package"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        for name, text in CODE.items():
            (package / name).write_text(text)
        importlib.invalidate_caches()
    return importlib.import_module("pagoda_package.modeling_pagoda")


def trusted(folder, build=AutoModelForCausalLM.from_config):
    return empty(build, AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True)


def read_by_transformers(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, device_map="cpu").eval()


@pytest.mark.parametrize("how", ["by an Auto class", "imported"])
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_a_saved_model_has_its_code_beside_it(tmp_path, folder, how, mode):
    if how == "imported":
        package = imported(tmp_path)
        given = empty(package.PagodaForCausalLM, package.PagodaConfig.from_pretrained(folder))
    else:
        given = trusted(folder)
    model = load_and_quantize_model(given, mode, folder, device_map="cpu").eval()
    save_quantized_model(model, tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").glob("*.py")} == CODE.keys()
    theirs = read_by_transformers(tmp_path / "saved")
    assert_same_bits(theirs.state_dict(), model.state_dict())
    assert torch.equal(outputs(theirs, TOKENS), outputs(model, TOKENS))
    ours = load_and_quantize_model(trusted(tmp_path / "saved"), None, tmp_path / "saved", device_map="cpu")
    assert_same_bits(ours.state_dict(), model.state_dict())


def test_no_code_is_copied_for_a_model_of_transformers_own(tmp_path):
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = load_and_quantize_model(transformers.BertModel(config), "nf4", device_map="cpu")
    save_quantized_model(model, tmp_path)
    assert not list(tmp_path.glob("*.py"))


def test_from_files_to_files_takes_the_model_that_the_error_asks_for(tmp_path, folder):
    with pytest.raises(CheckpointError, match=r"modeling_pagoda\.PagodaForCausalLM.*AutoModelForCausalLM") as error:
        quantize_checkpoint(folder, tmp_path / "made", "nf4", device="cpu")
    assert "trust_remote_code" not in str(error.value)
    assert not (tmp_path / "made").exists()
    # The remedies that it names.
    quantize_checkpoint(folder, tmp_path / "made", "nf4", model=trusted(folder), device="cpu")
    model = load_and_quantize_model(trusted(folder), "nf4", folder, device_map="cpu")
    assert_same_bits(read_by_transformers(tmp_path / "made").state_dict(), model.state_dict())


@pytest.mark.parametrize(
    "command", [["load", "{}"], ["plan", "{}"], ["plan", "{}/config.json"], ["quantize", "{}", "{}2"]]
)
def test_command_line_says_so_without_asking(folder, capsys, command):
    assert main([word.format(folder) for word in command]) == 1
    message = capsys.readouterr().err
    assert "which bigload does not run" in message
    assert "trust_remote_code" not in message


def test_code_for_a_model_that_transformers_has_is_not_needed(tmp_path, capsys):
    """Many repositories keep code from before transformers had the class."""
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=40
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "source")
    said = json.loads((tmp_path / "source" / "config.json").read_text())
    said["auto_map"] = {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}
    (tmp_path / "source" / "config.json").write_text(json.dumps(said))
    assert main(["load", str(tmp_path / "source"), "--device-map", "cpu"]) == 0
    # But not its class of another name.
    said["architectures"] = ["LlamaForPoetry"]
    (tmp_path / "source" / "config.json").write_text(json.dumps(said))
    assert main(["load", str(tmp_path / "source"), "--device-map", "cpu"]) == 1
    assert "which bigload does not run" in capsys.readouterr().err


def test_a_tokenizer_made_by_code_is_refused_without_asking(tmp_path, capsys):
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=40
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    said = {"tokenizer_class": "PagodaTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_pagoda.Tokens", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    assert main(["load", str(tmp_path), "--device-map", "cpu", "--prompt", "a"]) == 1
    message = capsys.readouterr().err
    assert "tokenizer" in message
    assert "--prompt" in message
    assert "trust_remote_code" not in message
    assert main(["load", str(tmp_path), "--device-map", "cpu"]) == 0  # the remedy
