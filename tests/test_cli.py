"""The command line does what the README says, and says what is wrong without a traceback."""

import configparser
import json
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from models import llama, save_tokenizer
from transformers import BertConfig, BertModel

from bigload import ConfigError
from bigload.cli import main
from bigload.cli.demo import SENTENCES


@pytest.fixture
def folder(tmp_path):
    llama(False, eos_token_id=None).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def never_loaded(monkeypatch):
    """Fail where the weights would be loaded."""

    def load(*args, **kwargs):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("bigload.loading.load_and_quantize_model", load)


def message_of(arguments, capsys):
    """Run the command line, which must fail with one message and status 1."""
    capsys.readouterr()  # what saving the model wrote
    assert main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bigload: ")
    assert "Traceback" not in captured.err
    return captured.err


def test_demo_prints_each_mode_close_to_fp32(capsys, usual_threads):
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
    save_tokenizer(folder)
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


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize("count", ["0", "-3", "x", "1.5", "", "\u00b2"])
def test_count_of_new_tokens_that_is_none_is_refused_by_the_parser(folder, capsys, count):
    with pytest.raises(SystemExit) as caught:
        main(["load", str(folder), "--prompt", "w1", f"--max-new-tokens={count}"])
    assert caught.value.code == 2
    assert "--max-new-tokens" in capsys.readouterr().err


def test_guard_of_these_tests_does_fail_where_the_weights_are_loaded(folder, never_loaded, monkeypatch):
    monkeypatch.setenv("BIGLOAD_TRACEBACK", "1")
    save_tokenizer(folder)
    with pytest.raises(AssertionError, match="the weights were loaded"):
        main(["load", str(folder), "--prompt", "w1"])


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize("prompt", ["", "  "])
def test_prompt_without_tokens_is_refused_before_the_load(folder, capsys, prompt):
    save_tokenizer(folder)
    assert "--prompt" in message_of(["load", folder, "--prompt", prompt], capsys)


@pytest.mark.usefixtures("never_loaded")
def test_prompt_without_a_tokenizer_is_refused_before_the_load(folder, capsys):
    assert "tokenizer" in message_of(["load", folder, "--prompt", "w1"], capsys)


@pytest.mark.usefixtures("never_loaded")
def test_prompt_for_a_model_that_cannot_generate_is_refused_before_the_load(tmp_path, capsys):
    sizes = {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    BertModel(BertConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    message = message_of(["load", tmp_path, "--prompt", "w1"], capsys)
    assert "BertModel" in message
    assert "--prompt" in message


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize("device_map", ["{", '{"model": }', " {model: 0}", "{'model': 'cpu'}"])
def test_device_map_that_is_no_json_is_refused_before_the_load(folder, capsys, device_map):
    assert "--device-map" in message_of(["load", folder, "--device-map", device_map], capsys)


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"max_new_tokens": "many"}'])
@pytest.mark.usefixtures("never_loaded")
def test_broken_generation_config_is_one_message(folder, capsys, text):
    (folder / "generation_config.json").write_text(text)
    assert str(folder) in message_of(["load", folder], capsys)


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": "64"},
        {"num_hidden_layers": None},
        {"vocab_size": -1},
        {"num_attention_heads": 0},
        {"model_type": "no_such_model"},
        {"rope_parameters": "fast"},
        {"architectures": 3},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_config_with_a_wrong_value_is_one_message(folder, capsys, fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    assert str(folder) in message_of(["load", folder], capsys)


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize("text", ["[]", "3", "null", ""])
def test_config_that_is_no_object_is_one_message(folder, capsys, text):
    (folder / "config.json").write_text(text)
    assert str(folder) in message_of(["load", folder], capsys)


def test_interrupt_is_status_130(folder, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("bigload.loading.execute", interrupted)
    assert main(["load", str(folder), "--device-map", "cpu"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_module_and_console_script_are_the_same_program():
    done = subprocess.run([sys.executable, "-m", "bigload", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("bigload ")
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parent.parent / "setup.cfg")
    name, target = setup["options.entry_points"]["console_scripts"].strip().split(" = ")
    assert name == "bigload"
    assert EntryPoint(name, target, "console_scripts").load() is main


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["quantize", "--help"], ["load"]])
def test_what_needs_no_model_imports_no_torch(arguments):
    code = """
import sys
from bigload import ConfigError
from bigload.cli import main
try:
    main(sys.argv[1:])
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == (2 if arguments == ["load"] else 0), done.stderr
    assert "bigload" in (done.stderr if done.returncode else done.stdout)


def test_importing_the_loader_imports_neither_bitsandbytes_nor_transformers():
    code = "import sys, bigload.loading; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"bitsandbytes", "transformers", "torch"} & set(done.stdout.split()) == {"torch"}


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("25%", 0.25), ("0.5", 0.5), ("1", 1.0), ("0", 0.0), ("2GiB", "2GiB"), ("300000", "300000"), (None, None)],
)
def test_cache_of_experts_is_a_share_or_a_size(typed, meant, folder, monkeypatch):
    asked = []

    def load(*args, offload, **kwargs):
        asked.append(offload.expert_cache)
        raise ConfigError("far enough")

    monkeypatch.setattr("bigload.loading.load_and_quantize_model", load)
    options = [] if typed is None else ["--expert-cache", typed]
    assert main(["load", str(folder), "--device-map", "cpu", *options]) == 1
    assert asked == [meant]


@pytest.mark.parametrize("captured", [False, True])
def test_load_says_how_fast_it_generated_and_captures_steps_where_there_are_graphs(
    folder, capsys, monkeypatch, captured
):
    from recorded_graphs import RecordedGraphs

    save_tokenizer(folder)
    arguments = ["load", str(folder), "--device-map", "cpu", "--prompt", "w3 w4 w5", "--max-new-tokens", "6"]
    assert main(arguments) == 0
    text = capsys.readouterr().out.splitlines()[-1]
    if captured:
        for room in ("capture", "obstacles"):
            monkeypatch.setattr(f"bigload.decoding.{room}.graphs_on", lambda device: RecordedGraphs())
        assert main(arguments) == 0
    else:
        assert main(arguments) == 0
    rate, again = capsys.readouterr().out.splitlines()[-2:]
    assert again == text
    assert re.fullmatch(
        r"6 tokens generated in \d+\.\d\d s, \d+\.\d tokens/s"
        + (r", \d+\.\d\d s of it to capture decode steps" if captured else ""),
        rate,
    )
