"""Calls that not all processes make, or that are not the same: they are refused, and later ones are not mixed up."""

import pytest
from worlds import DEVICES, TIMEOUTS_S, run_world


@pytest.mark.parametrize("device", DEVICES)
def test_calls_that_only_some_make_are_refused_and_later_ones_work(programs, tmp_path, device):
    ranks = 3 if device == "cpu" else 2
    found = run_world(programs, "world_calls.calls_of_some", ranks, tmp_path, device, TIMEOUTS_S[device])
    for what in ("loads", "saves"):
        alone = found[0][f"the first {what}"]
        assert (alone["error"], alone["ranks"]) == ("DistributedError", list(range(1, ranks)))
        alone = found[1][f"the second {what}"]
        assert (alone["error"], alone["ranks"]) == ("DistributedError", [0])
        assert "let all ranks make the same calls, in the same order" in alone["said"]
    for seen in found:
        for one in ("the first", "the second"):
            assert seen[f"{one} loads, then all"]["error"] is None
            assert seen[f"{one} saves, then all"] is True


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_wrong_is_told_without_waiting(programs, tmp_path, device):
    """A process that waits for the timeout is ended with its world, long before."""
    first, *others = run_world(programs, "world_calls.wrong_at_once", 2, tmp_path, device, timeout_s=1800)
    assert "nowhere" in first["first fails"]["said"]
    for seen in others:
        assert "rank 0 failed in 'plan': CheckpointError: " in seen["first fails"]["said"]
        assert "rank 0 is in save_quantized_model, and rank 1 in load_and_quantize" in seen["first saves"]["said"]
        assert "rank 0 is in load_and_quantize_model, and rank 1 in save_quantized" in seen["first loads"]["said"]
    for seen in (first, *others):
        for wrong in ("first saves", "first loads", "other folders", "other sizes", "other ways"):
            assert seen[wrong]["error"] == "DistributedError", wrong
        assert "do not have the same files to save (weights, max_shard_size)" in seen["other sizes"]["said"]
        assert "do not have the same folder to save into" in seen["other folders"]["said"]
        assert "do not have the same arguments (replicate" in seen["other ways"]["said"]
        assert seen["nothing is written"]
        assert seen["then all"]["error"] is None
