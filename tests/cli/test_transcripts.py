"""What the command line prints, recorded: each file of `transcripts/` holds command lines and what they print.

A line that begins with "$ " is a command line, run as in a shell in a folder with some models; what follows it is what
it prints, errors after the rest, and its exit status if that is not 0. `COLUMNS=60` before a command stands for a
terminal of that width. Figures that differ from run to run are written as #.
`BIGLOAD_RECORD=1 pytest tests/cli/test_transcripts.py` writes the files anew: look at the difference.
"""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from models import LLAMA_8B, QWEN3_30B, llama, save_tokenizer
from printed import without_figures
from safetensors.torch import save_file

from bigload.cli import main
from bigload.inspection.kv_cache import kv_cache_bytes

TRANSCRIPTS = sorted((Path(__file__).parent / "transcripts").glob("*.txt"))
VARYING = (
    (r"^(w3 w4 w5)( w\d+){4}$", r"\1 # # # #"),  # of random weights
    (r"generated in \S+ s, \S+ tokens/s", "generated in # s, # tokens/s"),
    (r"OSError: .*", "OSError: #"),  # in transformers' words
    (r"(?s:usage: .*?\n\n)", ""),  # wrapped otherwise by each version of Python
    (r"cannot be downloaded: .*?; check", "cannot be downloaded: #; check"),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with models, which no command writes to."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    llama(False, eos_token_id=None).to(torch.bfloat16).save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    llama(False).config.save_pretrained(folder / "no-weights")
    sizes = {"hidden_size": 256, "intermediate_size": 8192, "num_hidden_layers": 3}
    llama(False, **sizes).to(torch.bfloat16).save_pretrained(folder / "streamed")
    in_gptq = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    for name, config in {"large": LLAMA_8B, "mixture": QWEN3_30B, "gptq": LLAMA_8B | in_gptq}.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    (folder / "weights-only").mkdir()
    save_file({"weight": torch.zeros(2, 2)}, folder / "weights-only" / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def counted():
    """What a cache takes, counted once for each model and length: a model is run for it."""
    found = {}

    def count(model, *asked):
        key = model.config.to_json_string(), *asked
        if key not in found:
            found[key] = kv_cache_bytes(model, *asked)
        return found[key]

    return count


@pytest.fixture
def place(models, counted, tmp_path, monkeypatch):
    """Work in a folder with models, without a GPU, a network or a repository of the hub."""
    shutil.copytree(models, tmp_path, copy_function=os.link, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("bigload.planning.placement.free_disk_bytes", lambda folder: 100 * 2**30)
    monkeypatch.setattr("bigload.inspection.kv_cache.kv_cache_bytes", counted)
    return tmp_path


def printed(line, capfd, monkeypatch):
    """Run a command line and return what it prints."""
    words = shlex.split(line)
    monkeypatch.delenv("COLUMNS", raising=False)
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("="))
    assert words.pop(0) == "bigload"
    capfd.readouterr()
    try:
        status = main(words)
    except SystemExit as ended:
        status = ended.code
    captured = capfd.readouterr()
    errors = [line for line in captured.err.splitlines(keepends=True) if line.startswith("bigload")]
    text = captured.out + "".join(errors) + (f"[{status}]\n" if status else "")
    assert "Traceback" not in captured.err
    assert "Path(" not in text
    text = without_figures(text, *VARYING)
    width = os.environ.get("COLUMNS")
    if width and not status:
        too_long = [line for line in text.splitlines() if len(line) > int(width) and " " in line.strip()]
        assert too_long == [], "wider than the terminal"
    return text


@pytest.mark.parametrize("file", TRANSCRIPTS, ids=lambda file: file.stem)
@pytest.mark.usefixtures("place", "usual_threads")
def test_what_is_printed_is_as_recorded(file, capfd, monkeypatch):
    lines = [line for line in file.read_text().splitlines() if line.startswith("$ ")]
    assert lines
    found = "\n".join(f"{line}\n{printed(line[2:], capfd, monkeypatch)}" for line in lines)
    if os.environ.get("BIGLOAD_RECORD"):
        file.write_text(found)
    assert found == file.read_text()


def test_every_command_has_a_transcript_right_and_wrong():
    text = "".join(file.read_text() for file in TRANSCRIPTS)
    for command in ("demo", "load", "plan", "quantize", "show"):
        runs = re.findall(rf"^\$ .*bigload {command}\b.*\n(?:(?!\$ ).*\n)*", text, re.MULTILINE)
        assert any("\n[" not in run for run in runs), command
        assert any("\n[" in run for run in runs), command
