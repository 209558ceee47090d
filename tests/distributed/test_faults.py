"""A process that fails in a load: all others end with an error that names it, and with the model as it was."""

import pytest
from worlds import run_world

TIMEOUT_S = 4


@pytest.fixture(scope="module")
def faults(programs, tmp_path_factory):
    """What three processes have found; the second failed in one way after the other, and then died."""
    folder = tmp_path_factory.mktemp("faults")
    return run_world(programs, "world_faults.faults", 3, folder, timeout_s=TIMEOUT_S, slow_s=1.5 * TIMEOUT_S)


def of_the_others(faults, fault):
    others = [faults[0][fault], faults[2][fault]]
    for seen in others:
        assert seen["error"] == "DistributedError"
        assert seen["ranks"] == [1]
        assert seen["as it was"]
    first, second = (seen["said"].partition("\n")[0] for seen in others)  # without the context
    assert first == second
    return first


def test_a_rank_whose_file_differs_is_named(faults):
    """All have the same names and shapes; afterwards they load the same files."""
    said = of_the_others(faults, "differs")
    assert "rank 1 and rank 0 do not have the same files (their values): let all ranks load the same files" in said
    assert [seen["differs"]["as it was"] for seen in faults if seen] == [True, True]


def test_a_rank_with_another_mode_is_named(faults):
    assert "rank 1 and rank 0 do not have the same plan (model, config)" in of_the_others(faults, "other mode")


def test_a_rank_without_the_file_is_named(faults):
    assert "rank 1 failed in 'plan': CheckpointError: " in of_the_others(faults, "no file")


def test_a_rank_that_fails_while_it_loads_is_named(faults):
    assert "rank 1 failed in 'load': CheckpointError: the file ended too early" in of_the_others(faults, "fails")


def test_a_rank_that_fails_at_the_end_is_named(faults):
    assert "rank 1 failed in 'commit': TypeError: " in of_the_others(faults, "at the end")


def test_a_rank_that_is_too_slow_is_named(faults):
    """A longer time would have been enough: the load that follows, with all of them, is one."""
    said = of_the_others(faults, "slow")
    assert f"rank 1 did not come to the end of 'load' within {TIMEOUT_S} s" in said
    assert "pass a longer timeout" in said
    assert faults[0]["afterwards"]["error"] is None


def test_a_rank_that_dies_while_it_loads_is_named(faults):
    assert "rank 1 did not come to the end of 'load'" in of_the_others(faults, "dies")


def test_a_rank_that_dies_in_a_collective_is_named(programs, tmp_path):
    first, dead = run_world(programs, "world_faults.dies_in_a_collective", 2, tmp_path, timeout_s=TIMEOUT_S)
    assert dead is None
    assert (first["error"], first["ranks"], first["as it was"]) == ("DistributedError", [1], True)
    assert "rank 1 did not come to the end of 'share'" in first["said"]
