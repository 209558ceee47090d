"""The README holds: its code runs as pasted, its figures are those of the result files, its links lead somewhere."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from models import llama, save_tokenizer
from printed import without_figures

from bigload.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULT = json.loads((ROOT / "benchmarks/results/load-8b-h200.json").read_text())
PICTURES = sorted((ROOT / "docs/pictures").iterdir())


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)\n```", README, re.DOTALL)


def test_it_gives_the_two_commands_and_ci_runs_the_second():
    assert "pip install '.[demo]' && bigload demo" in blocks("sh")
    assert "pip install '.[test]' && pytest" in blocks("sh")
    assert re.search(r"grep .*pip install .*pytest.* README\.md", (ROOT / ".ci" / "run").read_text())


@pytest.mark.usefixtures("usual_threads")
def test_its_python_runs_as_pasted_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parts = re.findall(r"```(python|text)\n(.*?)\n```", README, re.DOTALL)
    assert [kind for kind, _ in parts] == ["python", "text", "python", "text", "python"]
    names, printed = {}, ""
    for kind, part in parts:
        if kind == "python":
            exec(part, names)
            printed = capsys.readouterr().out
        else:
            assert without_figures(printed).strip() == without_figures(part).strip()
    assert type(names["net"].blocks[0][0]).__name__ == "Linear4bit"


def test_its_commands_run_as_pasted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    llama(False, eos_token_id=None).save_pretrained("llama")
    save_tokenizer("llama", ["<unk>", "The", "capital", "of", "France", "is"])
    ran = []
    for line in "\n".join(blocks("sh")).splitlines():
        if line.startswith("bigload "):
            assert not main(shlex.split(line)[1:]), capsys.readouterr().err
            ran.append(line.split()[1])
            assert capsys.readouterr().out
    assert ran == ["plan", "load", "quantize", "show"]


def test_its_imports_take_the_place_of_accelerates():
    (change,) = blocks("diff")
    for sign in "-+":
        names = {}
        exec("\n".join(line[1:] for line in change.splitlines() if line.startswith(sign)), names)
        assert {"init_empty_weights", "BnbQuantizationConfig", "load_and_quantize_model"} <= set(names)


def test_links_in_the_documents_lead_somewhere():
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    assert len(documents) >= 3
    for document in documents:
        text = document.read_text()
        targets = re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text) + re.findall(r'src(?:set)?="([^"]+)"', text)
        for target in targets:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_what_a_command_has_made_is_what_it_makes(capsys):
    """Tables of plans, which take longer, are held by tests/planning/test_plan.py."""
    from benchmarks.__main__ import main

    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = document.read_text()
        made = re.findall(r"^<!-- made by: python -m benchmarks (.*) -->\n", text, re.MULTILINE)
        assert len(made) >= 3 or document.name != "README.md"
        for command in made:
            if command.startswith("report"):
                files = [str(ROOT / word) if word.endswith(".json") else word for word in shlex.split(command)]
                main(files)
                assert f"<!-- made by: python -m benchmarks {command} -->\n{capsys.readouterr().out}" in text


def test_the_number_of_cores_is_that_of_the_result():
    assert f"with {RESULT['cores']} cores" in README


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.stem)
def test_pictures_are_small_and_for_light_and_dark_pages(picture):
    assert picture.stat().st_size < 100_000
    assert {picture.stem.partition("-")[0] + suffix for suffix in ("-light.svg", "-dark.svg")} <= {
        other.name for other in PICTURES
    }


@pytest.mark.parametrize("colour", ["light", "dark"])
def test_the_picture_of_load_times_has_the_figures_of_the_result(colour):
    from benchmarks.pictures import MODES

    text = (ROOT / f"docs/pictures/load-{colour}.svg").read_text()
    drawn = [row for row in RESULT["rows"] if row["mode"] in MODES]
    assert text.count("the first load") == len(drawn) == 11
    for row in drawn:
        assert f"{row['second_s']:.2f} s (the first load {row['first_s']:.2f} s)" in text
    assert f"the floor, {RESULT['rows'][0]['floor_s']:.2f} s" in text


@pytest.mark.parametrize("colour", ["light", "dark"])
def test_the_picture_of_a_load_has_its_stages(colour):
    text = (ROOT / f"docs/pictures/timeline-{colour}.svg").read_text()
    assert all(stage in text for stage in ("all-MiniLM-L6-v2", ">plan  0.", ">read  0.", ">quantize  0.", "as nf4"))
