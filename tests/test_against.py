"""`python -m benchmarks against`: two checkouts, here one and the same, are timed in turn."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_both_checkouts_are_timed_in_each_round(tmp_path, capsys):
    from benchmarks.__main__ import main
    from benchmarks.against import Case
    from benchmarks.checkpoints import make_checkpoint

    folder, out = make_checkpoint("many-20", tmp_path / "many-20"), tmp_path / "out.json"
    cases = f"{folder}:none", f"{folder}:nf4"
    main(["against", str(ROOT), *cases, "--device", "cpu", "--rounds", "1", "--out", str(out)])
    result = json.loads(out.read_text())
    row, other = result["rows"]
    assert other["case"] == "many-20 nf4: a load"
    assert len(other["ours_s"]) == len(other["other_s"]) == 6
    assert row["case"] == "many-20 none: a load"
    assert len(row["ours_s"]) == len(row["other_s"]) == 6  # of the loads of a process the first does not count
    assert row["ratio"] == pytest.approx(row["ours_median_s"] / row["other_median_s"], rel=0.1)
    assert row["case"] in capsys.readouterr().err
    assert Case(Path("8b"), "nf4", 32).name == "8b nf4: a token with 32 blocks offloaded"
    main(["report", str(out)])
    assert (
        f"| many-20 none: a load | {row['other_median_s']:.4f} | {row['ours_median_s']:.4f} |"
        in capsys.readouterr().out
    )
