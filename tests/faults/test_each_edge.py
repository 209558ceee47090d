"""Whatever fails at an edge, all is as it was, and the next run is right. `python tests/faults` tries each call."""

import importlib.util
import json
import random
from pathlib import Path

import late_gpu
import pytest
from injected_faults import DEVICE, EDGES, GPU_JOBS, JOBS, every_try, tries_of

ROOT = Path(__file__).parents[2]
RESULT, ON_GPU = (ROOT / f"benchmarks/results/{name}.json" for name in ("faults", "faults-h200"))


def first_or_another(calls):
    return [random.choice((1, random.randint(1, calls)))] if calls else []


@pytest.mark.parametrize("job", JOBS)
def test_fault_leaves_all_as_it_was_and_the_next_run_is_right(job):
    if job == "load onto a late GPU" and late_gpu.COMPILER is None:
        pytest.skip("needs gcc")
    outcomes = every_try([job], first_or_another)
    assert not outcomes.failures, "\n".join(outcomes.failures)
    assert outcomes.tries > 5


@pytest.mark.cuda
@pytest.mark.parametrize("job", GPU_JOBS)
def test_fault_on_a_gpu_leaves_all_as_it_was_and_the_next_run_is_right(job):
    outcomes = every_try([job], first_or_another)
    assert not outcomes.failures, "\n".join(outcomes.failures)
    assert outcomes.tries > 5


def command():
    spec = importlib.util.spec_from_file_location("faults_command", ROOT / "tests/faults/__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("calls", "most", "chosen"), [(0, 4, []), (3, 4, [1, 2, 3]), (10, 4, [1, 4, 7, 10])])
def test_calls_of_an_edge_are_spread_evenly(calls, most, chosen):
    assert command().chosen(calls, most) == chosen


def test_most_calls_of_an_edge_are_asked_for_on_the_command_line(monkeypatch, tmp_path):
    asked = command()
    monkeypatch.setattr("sys.argv", ["faults", "--job", "save", "--most", "1", "--out", str(tmp_path / "few.json")])
    with pytest.raises(SystemExit) as ended:
        asked.main()
    assert ended.value.code == 0
    few, all_of_them = json.loads((tmp_path / "few.json").read_text()), json.loads(RESULT.read_text())
    rows = {(row["job"], row["edge"], row["error"]): sum(row["outcomes"].values()) for row in few["rows"]}
    assert set(rows.values()) <= {1, 2}  # the first and the last
    known = {(row["job"], row["edge"], row["error"]) for row in all_of_them["rows"] if row["job"] == "save"}
    assert set(rows) == known


def test_table_of_the_docs_is_that_of_the_result():
    results = json.loads(RESULT.read_text())
    page = (ROOT / "docs/reliability.md").read_text()
    assert "\n".join(command().table(results)) in page
    assert results["tries"] == sum(sum(row["outcomes"].values()) for row in results["rows"]) >= 1500
    assert not results["failures"]
    assert f"{results['tries']:,} faults" in page


def test_table_of_a_gpu_is_that_of_its_result():
    results = json.loads(ON_GPU.read_text())
    assert "\n".join(command().table(results)) in (ROOT / "docs/reliability.md").read_text()
    assert results["tries"] == sum(sum(row["outcomes"].values()) for row in results["rows"]) >= 100
    assert not results["failures"]
    assert {row["job"] for row in results["rows"]} == set(GPU_JOBS)
    assert results["device"] != "cpu"


def test_result_is_of_all_jobs_and_edges_that_there_are():
    tried = {(row["job"], row["edge"], row["error"]) for row in json.loads(RESULT.read_text())["rows"]}
    assert {job for job, *_ in tried} == set(JOBS)
    edges = {(edge, error) for edge, said in EDGES.items() for error in said.errors}
    assert {(edge, error) for _, edge, error in tried} == edges | {(name, DEVICE) for name in late_gpu.FUNCTIONS}


def test_a_fault_that_leaves_something_behind_is_seen(monkeypatch):
    from bigload.checkpoint import folders

    monkeypatch.setattr(folders, "remove_folder", lambda path: None)
    with tries_of("save") as tries, pytest.raises(AssertionError, match="saved"):
        tries.run("fsync", "disk full", 1)


def test_a_wrong_bit_is_seen():
    with tries_of("expert fetch") as tries:
        tries.expected["0"][0, 0] += 1
        with pytest.raises(AssertionError):
            tries.run("copy", "Ctrl-C", 1)
