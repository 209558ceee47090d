"""Each example runs as it stands, in an empty folder: the scripts as programs, the notebook cell by cell."""

import ast
import json
import re
import runpy
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from models import llama, save_tokenizer
from worlds import ALONE

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
# Trainers and pipelines leave seeds, hooks and loggers behind: they get a process of their own, which takes seconds.
OF_THEIR_OWN = (
    "diffusers_flux",
    "lightning_fabric",
    "lightning_trainer",
    "optimizers",
    "qlora_fsdp2",
    "qlora_trainer",
    "qlora_trl",
)
# What comes before an example: it is started by torchrun; and what it should not use is an error.
SETTINGS = {
    "qlora_fsdp2": f"import os, warnings; os.environ.update({ALONE}); "
    "warnings.filterwarnings('error', message='.*gradient_checkpointing_enable')\n",
}
LAST_WORDS = {"qlora_fsdp2": "1 ranks", "diffusers_flux": "the same from the saved folder"}
MOST_LINES = 60


def here(script, *arguments):
    """Run a script in this process, as if it were the program."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *arguments])
        runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_script_runs(script, tmp_path, monkeypatch, capsys, request):
    monkeypatch.chdir(tmp_path)
    if script.stem in OF_THEIR_OWN:
        printed = request.getfixturevalue("programs").run(SETTINGS.get(script.stem, "") + script.read_text(), tmp_path)
    else:
        here(script)
        printed = capsys.readouterr().out
    assert printed.strip(), "an example shows what it did"
    assert "False" not in printed, printed
    assert LAST_WORDS.get(script.stem, "") in printed
    assert list(tmp_path.iterdir()) == [], "an example leaves nothing behind"


@pytest.mark.parametrize("is_told", [True, False])
def test_processes_find_each_other_whoever_starts_them(programs, tmp_path, is_told):
    """Without torchrun, by the variables that it sets; without these they do not train a model each."""
    launched = f"""
import multiprocessing, os, runpy, socket, sys
import peft, torch, transformers, bigload.distributed.joint_load
torch.cuda.is_available = lambda: False  # of which there may be one
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
def run(rank):
    given = {ALONE} | {{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port)}}
    os.environ.update(given if {is_told} else {{}})
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    runpy.run_path({str(ROOT / "examples/qlora_fsdp2.py")!r}, run_name="__main__")
processes = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(2)]
for process in processes:
    process.start()
for process in processes:
    process.join()
sys.exit(max(abs(process.exitcode) for process in processes))
"""
    ended = programs.ended(launched, tmp_path)
    if is_told:
        assert ended.status == 0, ended.said
        assert ended.printed.startswith("2 ranks: loss")
    else:
        assert ended.status != 0
        assert "RANK" in ended.said
        assert not ended.printed


def test_generate_takes_a_real_model_by_its_folder(tmp_path, capsys):
    llama(False, eos_token_id=None).to(torch.bfloat16).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    here(ROOT / "examples/generate.py", str(tmp_path))
    printed = capsys.readouterr().out
    assert "nothing is offloaded" in printed
    assert re.search(r"\bw\d+\b", printed)


def run_cell(code, names):
    """Run a cell, and return what it prints and what its last line evaluates to."""
    tree, value = ast.parse(code), None
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with redirect_stdout(StringIO()) as printed:
        exec(compile(tree, "<cell>", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
    return printed.getvalue(), value


def without_figures(text):
    """Leave out what differs between machines: times, peaks of memory, and devices."""
    text = re.sub(r", peak [^)\n]*", "", text)
    return re.sub(r"\d+(\.\d+)?", "#", re.sub(r"\b(cpu|cuda:\d)\b", "DEVICE", text))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_cells_of_a_notebook_give_what_is_saved_with_them(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert any(cell["outputs"] for cell in cells)
    for cell in cells:
        printed, value = run_cell("".join(cell["source"]), names)
        said = "".join(text for output in cell["outputs"] for text in output.get("text", []))
        shown = [output["data"] for output in cell["outputs"] if output["output_type"] == "execute_result"]
        assert not [output for output in cell["outputs"] if output.get("name") == "stderr"], "nothing to warn of"
        assert without_figures(printed) == without_figures(said)
        assert len(shown) == (value is not None)
        for saved in shown:
            assert without_figures(repr(value)) == without_figures("".join(saved["text/plain"]))
            assert ("text/html" in saved) == hasattr(value, "_repr_html_")


def test_there_are_examples_and_the_index_names_each_with_what_it_shows():
    index = (ROOT / "examples/README.md").read_text()
    files = [*SCRIPTS, *NOTEBOOKS]
    assert len(SCRIPTS) >= 12
    assert NOTEBOOKS
    assert sorted(re.findall(r"^\| \[`?([\w.]+)`?\]\(\1\) \|", index, re.MULTILINE)) == sorted(f.name for f in files)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_says_at_its_head_what_it_shows(script):
    head = ast.get_docstring(ast.parse(script.read_text()))
    assert head
    assert len(head.split("\n\n")) == 2, "what it shows, and how to use it with a real model"
    if script.stem not in OF_THEIR_OWN:
        assert script.read_text().count("\n") < MOST_LINES
