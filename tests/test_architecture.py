"""The house is as docs/design.md says: imports run one way, between wings and between files, and it stays small."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "bigload"
MOST_ENTRIES, MOST_FILES, MOST_LINES, MOST_LINES_OF_A_FUNCTION = 22, 16, 400, 60


def wings():
    """Return the wings in the order of docs/design.md: each imports only from those before it, and the shared files."""
    return re.findall(r"^\| `(\w+)/` \|", (ROOT / "docs/design.md").read_text(), re.MULTILINE)


def verbs():
    """Return the files and folders beside the wings that import from them, which the wings do not import from."""
    (row,) = re.findall(r"^\| (`loading\.py`.*?) \|", (ROOT / "docs/design.md").read_text(), re.MULTILINE)
    return re.findall(r"`(\w+)(?:\.py|/)`", row)


def files(package):
    return {
        ".".join(path.relative_to(package).with_suffix("").parts): path
        for path in sorted(package.rglob("*.py"))
        if path.name != "__init__.py"
    }


def imported(path, package, known):
    """Return what a file imports of the package: at its top, in its functions, and for type checkers alone."""
    here = path.relative_to(package.parent).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            target = [*base, *(node.module.split(".") if node.module else [])]
            if target[:1] == [package.name]:
                inner = ".".join(target[1:])
                found |= {".".join([*target[1:], alias.name]) for alias in node.names} & known
                found |= {inner} & known
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names} & known
    return found


def graph(package):
    known = files(package)
    return {name: imported(path, package, set(known)) for name, path in known.items()}


def imports_against_the_order(imports, wings, verbs):
    rank = {wing: number for number, wing in enumerate(wings, 1)} | dict.fromkeys(verbs, len(wings) + 1)

    def rank_of(name):
        return rank.get(name.partition(".")[0], 0)  # 0: shared by all

    edges = [(name, other) for name, others in imports.items() for other in others]
    return sorted(f"{name} imports {other}" for name, other in edges if rank_of(other) > rank_of(name))


def circle(imports):
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def importers_of(library, package):
    found = set()
    for name, path in files(package).items():
        for node in ast.walk(ast.parse(path.read_text())):
            named = []
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                named = [node.module]
            elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                called = ast.unparse(node.func)
                if called.endswith(("import_optional", "import_module", "__import__")):
                    named = [str(node.args[0].value)]
            if any(each.split(".")[0] == library for each in named):
                found.add(name)
    return sorted(found)


def too_large(package):
    folders = [package, *(path for path in package.iterdir() if path.is_dir() and path.name != "__pycache__")]
    for folder in folders:
        entries = [path for path in folder.iterdir() if path.name != "__pycache__"]
        most = MOST_ENTRIES if folder == package else MOST_FILES
        if len(entries) > most:
            yield f"{folder.name}: {len(entries)} entries"
    for name, path in files(package).items():
        text = path.read_text()
        if text.count("\n") > MOST_LINES:
            yield f"{name}: {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                if ast.get_docstring(node):
                    lines -= node.body[0].end_lineno - node.body[0].lineno + 1
                if lines > MOST_LINES_OF_A_FUNCTION:
                    yield f"{name}.{node.name}: {lines} lines"


def test_every_file_is_in_a_wing_or_named_in_the_design():
    design = (ROOT / "docs/design.md").read_text()
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {*wings(), "cli"}
    assert "cli" in verbs()
    for name in files(PACKAGE):
        assert f"`{name.rpartition('.')[2]}" in design, f"docs/design.md does not say what {name} is for"


def test_imports_run_one_way():
    imports = graph(PACKAGE)
    assert imports_against_the_order(imports, wings(), verbs()) == []
    assert circle(imports) == []


def test_one_file_imports_bitsandbytes():
    assert importers_of("bitsandbytes", PACKAGE) == ["quantization.bnb"]


def test_nothing_has_grown_too_large():
    assert list(too_large(PACKAGE)) == []


def made(folder, **contents):
    """Make a package with two wings, `low` and `high`, and a verb."""
    package = folder / "house"
    for name, text in {"low/a": "", "high/b": "from ..low.a import x", "loading": "from .high.b import x"}.items():
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(contents.get(name.replace("/", "_"), text))
    return package


BREACHES = {
    "at the top": "from ..high.b import x",
    "the file itself": "from ..high import b",
    "in a function": "def f():\n    from ..high.b import x\n",
    "for type checkers": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..high.b import x\n",
    "by its full name": "import house.high.b",
    "of a verb": "from ..loading import x",
}


@pytest.mark.parametrize("how", BREACHES)
def test_an_import_against_the_order_is_seen(tmp_path, how):
    package = made(tmp_path, low_a=BREACHES[how])
    other = "loading" if how == "of a verb" else "high.b"
    assert imports_against_the_order(graph(package), ["low", "high"], ["loading"]) == [f"low.a imports {other}"]
    assert imports_against_the_order(graph(made(tmp_path, low_a="")), ["low", "high"], ["loading"]) == []


def test_a_circle_of_files_is_seen(tmp_path):
    assert circle(graph(made(tmp_path))) == []
    package = made(tmp_path, low_a="def f():\n    from ..loading import x\n")
    assert set(circle(graph(package))) == {"low.a", "high.b", "loading"}


@pytest.mark.parametrize(
    "how", ["import bitsandbytes.nn as nn", "from bitsandbytes import nn", "import_optional('bitsandbytes', '')"]
)
def test_a_second_importer_of_bitsandbytes_is_seen(tmp_path, how):
    assert importers_of("bitsandbytes", made(tmp_path, high_b=how)) == ["high.b"]


def test_what_has_grown_too_large_is_seen(tmp_path):
    long = "def f():\n" + "    x = 1\n" * (MOST_LINES_OF_A_FUNCTION + 1) + "\n" * MOST_LINES
    package = made(tmp_path, high_b=long)
    for number in range(MOST_FILES):
        (package / "low" / f"c{number}.py").write_text("")
    for number in range(MOST_ENTRIES):
        (package / f"d{number}.py").write_text("")
    assert [each.partition(":")[0] for each in too_large(package)] == ["house", "low", "high.b", "high.b.f"]
