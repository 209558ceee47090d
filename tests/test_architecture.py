"""The house is as docs/design.md says: every room is in its list, and imports only from rooms above."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def rooms():
    rows = re.findall(r"^\| (`\w+\.py`[^|]*) \|", (ROOT / "docs/design.md").read_text(), re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`(\w+)\.py`", row)]


def imported(name):
    """Give the rooms that a room imports whenever it is imported itself."""
    text = (ROOT / f"bigload/{name}.py").read_text()
    return re.findall(r"^from \.(\w+) import", text, re.MULTILINE) + [
        each for names in re.findall(r"^from \. import (.*)$", text, re.MULTILINE) for each in names.split(", ")
    ]


def test_every_room_is_listed_once():
    assert sorted(rooms()) == sorted({path.stem for path in ROOT.glob("bigload/*.py")} - {"__init__"})


def test_imports_run_one_way():
    above = []
    for name in rooms():
        assert set(imported(name)) - {"__version__"} <= set(above), name
        above.append(name)
