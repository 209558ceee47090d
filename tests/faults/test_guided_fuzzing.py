"""What atheris drives by hand (`python tests/fuzzing --guided`): the targets, what it found, and the command.

atheris is not needed here: random damage stands for its own, and a module of its name for itself.
"""

import json
from pathlib import Path

import pytest
from hostile_bytes import TARGETS, attempt_bytes, good_bytes, mutated
from hostile_files import damaged_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
# The command, in a process that has imported torch.
COMMAND = """
import sys, runpy
{first}
sys.argv = ["tests/fuzzing", "--guided", *{options}]
runpy.run_path({folder!r}, run_name="__main__")
"""

# What it found before it was mended.
GROUPS = '{"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"group_0": %s}}}'
FOUND = [
    ("config.json of fp8 in rows", GROUPS % '"U8"'),
    ("config.json of fp8 in rows", GROUPS % "null"),
]

# Drives a target with seven inputs, at the first of which a reader is broken; then the time is up.
STAND_IN = """
import contextlib
import math
import time

import hostile_files

def instrument_imports(include):
    return contextlib.nullcontext()

def Mutate(raw, most):
    return raw[::-1]

def Setup(options, attempt, custom_mutator):
    global drive
    own, good = hostile_files.open_checkpoint, open(options[-1] + "/good", "rb").read()

    def broken(folder):
        hostile_files.open_checkpoint = own
        raise KeyError("of a reader")

    def drive():
        hostile_files.open_checkpoint = broken
        attempt(good)
        attempt(good)
        for seed in range(5):
            attempt(custom_mutator(good, 4 * len(good), seed))
        time.monotonic = lambda: math.inf
        attempt(good)

def Fuzz():
    drive()
"""


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", TARGETS)
def test_target_is_good_as_it_is_and_else_refused_or_harmless(name, tmp_path_factory):
    good = good_bytes(name, tmp_path_factory.mktemp("good"))
    assert attempt_bytes(name, good, tmp_path_factory.mktemp("same")) == []

    @settings(max_examples=10)
    @given(rng=st.randoms(use_true_random=False))
    def attempts(rng):
        raw = mutated(good, rng, lambda some: damaged_bytes(some, rng))
        attempt_bytes(name, raw, tmp_path_factory.mktemp("damaged"))

    attempts()


@pytest.mark.parametrize(("name", "text"), FOUND)
def test_what_was_found_is_refused_or_harmless(name, text, tmp_path):
    attempt_bytes(name, text.encode(), tmp_path)


@pytest.fixture
def guided(programs, tmp_path):
    """Return a function that runs the command, with the stand-in for atheris unless something else is done first."""
    (tmp_path / "atheris.py").write_text(STAND_IN)

    def run(*options, first=f"sys.path.insert(0, {str(tmp_path)!r})"):
        code = COMMAND.format(first=first, options=options, folder=str(ROOT / "tests/fuzzing"))
        return programs.ended(code, tmp_path)

    return run


def test_without_atheris_the_command_says_what_to_install(guided):
    ended = guided(first="sys.modules['atheris'] = None")
    assert ended.status == 1
    assert "pip install atheris" in ended.said
    assert "Traceback" not in ended.said


def test_command_counts_what_came_of_a_target_and_keeps_what_failed(guided, tmp_path):
    out = tmp_path / "out.json"
    ended = guided("--target", "index", "--seconds", "1000000", "--seed", "1", "--out", str(out))
    assert ended.status == 1, ended.said
    assert "of a reader" in ended.printed
    result = json.loads(out.read_text())
    found = result["targets"]["index"]
    assert sum(found["outcomes"].values()) == found["executions"] == result["executions"] == 7
    assert found["outcomes"]["failed"] == 1
    assert found["outcomes"]["loaded"] >= 1
    (failure,) = found["failures"]
    # The same bytes do no harm to a reader that is not broken.
    again = guided("--case", "index", failure["bytes"])
    assert again.printed.strip() == "[]", again.said


def test_target_that_is_not_there_is_named(guided):
    ended = guided("--target", "indices")
    assert ended.status == 1
    assert "no target 'indices'" in ended.said


def test_counts_in_the_docs_are_those_of_the_result():
    result = json.loads((ROOT / "benchmarks/results/fuzzing-guided.json").read_text())
    page = (ROOT / "docs/reliability.md").read_text()
    assert f"{result['executions']:,} in {result['seconds']} seconds" in page
    assert set(result["targets"]) == set(TARGETS)
    assert result["executions"] == sum(found["executions"] for found in result["targets"].values())
    assert not [failure for found in result["targets"].values() for failure in found["failures"]]
