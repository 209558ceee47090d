"""Random ways to load a model against the plain way: with new seeds each time, and with something made wrong."""

import dataclasses
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import checking
import pytest
import torch
from drawing import ACTS, draw

COMMAND = Path(__file__).parent / "differential"
# The same number on any machine; the seconds end what a machine is too slow for.
CASES, SECONDS = 50, 300


@pytest.mark.slow
@pytest.mark.parametrize(
    "devices",
    [
        "cpu",
        pytest.param("cuda:0", marks=pytest.mark.cuda),
        pytest.param("cuda:0,cuda:1", marks=[pytest.mark.cuda, pytest.mark.multi_gpu]),
    ],
)
def test_new_cases_are_right_or_refused(devices, tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, str(COMMAND), "--cases", str(CASES), "--seconds", str(SECONDS)]
    command += ["--device", devices, "--out", str(out)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}  # other tests run beside it
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 0, done.stdout
    assert json.loads(out.read_text())["outcomes"]["right"] > 0


CPU = [torch.device("cpu")]
CASE = dataclasses.replace(
    draw(0, CPU),
    family="blocks",
    mode="nf4",
    source="safetensors",
    device_map={"": "cpu", "layers.1": "disk"},
    budget=(),
    acts=(),
)


def test_a_case_is_the_same_each_time_it_is_drawn():
    assert [draw(seed, CPU) for seed in range(50)] == [draw(seed, CPU) for seed in range(50)]


@pytest.mark.parametrize("act", ACTS)
def test_what_is_right_passes(tmp_path, act):
    case = dataclasses.replace(CASE, acts=(act,))
    assert checking.check(case, CPU, tmp_path).startswith(("right", "refused at"))


@pytest.mark.parametrize("name", ["layers.1.fc2", "layers.0.norm"])
def test_a_value_that_is_wrong_is_found(tmp_path, monkeypatch, name):
    """One bit of the lowest, in what is loaded as the case says."""
    load = checking._load

    def load_wrongly(*arguments):
        model = load(*arguments)
        model.offload.remove()
        weight = model.get_submodule(name).weight.data.view(-1).view(torch.uint8)
        weight[0] ^= 1
        return model

    monkeypatch.setattr(checking, "_load", load_wrongly)
    with pytest.raises(checking.DifferenceError, match=f"state_dict: {name}|forward: output"):
        checking.check(dataclasses.replace(CASE, acts=("state_dict",)), CPU, tmp_path)


def test_an_error_that_is_not_of_the_package_is_not_a_refusal(tmp_path, monkeypatch):
    def fail(*arguments):
        raise KeyError("layers.1")

    monkeypatch.setattr(checking, "_load", fail)
    with pytest.raises(KeyError):
        checking.check(CASE, CPU, tmp_path)


def test_worker_that_dies_counts_as_an_error_of_its_case(tmp_path):
    command = runpy.run_path(str(COMMAND / "__main__.py"), run_name="command")
    log = tmp_path / "log"
    log.write_text(json.dumps({"seed": 5, "case": "a model"}) + "\n")
    (only,) = command["_read"](log)
    assert command["_is_failure"](only)
    assert only == {"seed": 5, "case": "a model", "outcome": "the process died"}
