"""The benchmark of loads by several processes, in a world of one."""

import pytest
import torch


def test_each_way_has_a_row_and_what_cannot_be_done_says_why(alone, tmp_path, monkeypatch):
    from benchmarks import distributed
    from benchmarks.checkpoints import make_checkpoint

    folder = tmp_path / "tiny"
    make_checkpoint("tiny", folder, 1)
    monkeypatch.setattr(distributed, "_STEPS", 1)
    monkeypatch.setitem(distributed.WAYS, "impossible", lambda *given: 1 / 0)
    ways = list(distributed.WAYS)  # with the peers: transformers, and accelerate's recipe
    *_, result = distributed.measure_distributed(folder, ways, "nf4", torch.device("cpu"), "abc", (1, 16))
    rows = {row["way"]: row["ranks"][0] for row in result["rows"]}
    assert list(rows) == ways
    assert rows["impossible"] == {"error": "ZeroDivisionError: division by zero"}
    assert all(row["load_s"] > 0 for way, row in rows.items() if way != "impossible")
    for way in distributed.TRAINED:  # from the same adapters
        assert rows[way]["losses"] == pytest.approx(
            rows["bigload, shares with adapters"]["losses"], abs=1e-3
        )  # in bfloat16
        assert len(rows[way]["losses"]) == 2
    assert result["ranks"] == 1


def test_without_torchrun_it_says_how_to_start_it(tmp_path):
    from benchmarks.__main__ import main

    with pytest.raises(SystemExit, match="torchrun --nproc_per_node N -m benchmarks distributed"):
        main(["distributed", str(tmp_path)])
