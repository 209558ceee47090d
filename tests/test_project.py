"""What the README and the packaging promise."""

import json
import re
from importlib.metadata import metadata, requires
from pathlib import Path

import bigload

ROOT = Path(__file__).parent.parent


def test_readme_gives_the_two_commands_and_ci_runs_the_readmes():
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)\n```", readme, re.DOTALL)
    assert "pip install '.[demo]' && bigload demo" in blocks
    assert "pip install '.[test]' && pytest" in blocks
    assert re.search(r"grep .*pip install .*pytest.* README\.md", (ROOT / ".ci" / "run").read_text())


def test_links_in_the_documents_lead_somewhere():
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert len(documents) >= 3
    for document in documents:
        for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_figures_of_the_readme_are_those_of_the_result_file(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.report import brief

    readme = (ROOT / "README.md").read_text()
    names = re.findall(r"<!-- made by: python -m benchmarks report --brief (\S+) -->", readme)
    assert len(names) == 2
    for name in names:
        assert brief(json.loads((ROOT / name).read_text())) in readme


def test_public_names_are_the_ones_in_all_and_have_docstrings():
    for name in bigload.__all__:
        assert getattr(bigload, name).__doc__, name


def test_package_is_typed_and_versioned():
    assert (Path(bigload.__file__).parent / "py.typed").exists()
    assert metadata("bigload")["Version"] == bigload.__version__
    needed = {
        re.split(r"[>=;\[ ]", requirement)[0] for requirement in requires("bigload") if "extra" not in requirement
    }
    assert needed == {"torch", "bitsandbytes", "accelerate", "safetensors", "psutil", "tqdm"}


def test_python_blocks_of_the_readme_run_as_pasted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for code in blocks:
        exec(code, names)
        assert type(names["model"].blocks[0].up).__name__ == "Linear4bit"
    assert "torch.Size([1, 3, 1000]) Linear4bit" in capsys.readouterr().out
    assert (tmp_path / "net-nf4" / "bigload.json").is_file()
