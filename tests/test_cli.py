"""The command line does what the README says, and says what is wrong without a traceback."""

import json
import subprocess
import sys

import pytest
from models import llama

from bigload.cli import main
from bigload.demo import SENTENCES


@pytest.fixture
def folder(tmp_path):
    llama(False, eos_token_id=None).save_pretrained(tmp_path)
    return tmp_path


def test_demo_prints_each_mode_close_to_fp32(capsys):
    assert main(["demo"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.endswith(SENTENCES)}
    assert list(rows) == ["fp32", "int8", "nf4", "nf4-dq"]
    cosine = {mode: float(row.split("   ")[-2].split()[-1]) for mode, row in rows.items()}
    assert cosine["fp32"] == 1
    assert cosine["int8"] >= 0.99
    assert cosine["nf4"] >= 0.95
    assert cosine["nf4-dq"] >= 0.95
    assert all(row.endswith(SENTENCES[0]) for row in rows.values())
    sizes = {mode: float(row.split()[1]) for mode, row in rows.items()}
    assert sizes["fp32"] > sizes["int8"] > sizes["nf4"] > sizes["nf4-dq"]


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_load_prints_its_summary(folder, capsys, mode):
    assert main(["load", str(folder), "--quant", mode, "--device-map", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("read ")
    assert f"on cpu as {mode}" in out


def test_load_takes_a_map_as_json(folder, capsys):
    device_map = json.dumps({"model": "cpu", "lm_head": "cpu"})
    assert main(["load", str(folder), "--device-map", device_map]) == 0
    assert main(["load", str(folder), "--device-map", "{model: cpu}"]) == 1
    assert "--device-map" in capsys.readouterr().err


def test_load_generates_a_continuation(folder, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(127)} | {"<unk>": 127}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    arguments = ["load", str(folder), "--device-map", "cpu", "--prompt", "w3 w4 w5", "--max-new-tokens", "6"]
    assert main(arguments) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("w3 w4 w5 w")
    assert len(last.split()) == 9


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["load", "nowhere"], "nowhere"),
        (["load", "{folder}", "--device-map", "cuda:99"], "cuda:99"),
        (["load", "{folder}", "--prompt", "hello"], "tokenizer"),
    ],
)
def test_what_is_wrong_is_one_message_and_status_1(folder, capsys, arguments, word):
    assert main([argument.format(folder=folder) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("bigload: ")
    assert word in error


def test_unreadable_config_is_one_message(folder, capsys):
    (folder / "config.json").write_text("{")
    assert main(["load", str(folder)]) == 1
    assert "config.json" in capsys.readouterr().err


def test_interrupt_is_status_130(folder, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("bigload.loading.execute", interrupted)
    assert main(["load", str(folder), "--device-map", "cpu"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_module_and_console_script_are_the_same_program():
    for command in ([sys.executable, "-m", "bigload"], ["bigload"]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("bigload ")


def test_importing_bigload_imports_neither_bitsandbytes_nor_transformers():
    code = "import sys, bigload; print([m for m in ('bitsandbytes', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
