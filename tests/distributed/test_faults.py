"""A process that fails in a load: all others end with an error that names it, and with the model as it was."""

import re

import pytest
from worlds import DEVICES, TIMEOUTS_S, run_world


@pytest.mark.parametrize("device", DEVICES)
def test_a_rank_that_fails_is_named(programs, tmp_path, device):
    """Three processes, or two with GPUs, of which the second fails in one way after the other, and dies.

    One test: worlds take seconds, and tests of one file may run in several processes.
    """
    given = {"device": device, "timeout_s": TIMEOUTS_S[device], "slow_s": 1.5 * TIMEOUTS_S[device]}
    faults = run_world(programs, "world_faults.faults", 3 if device == "cpu" else 2, tmp_path, **given)
    a_rank_whose_file_differs_is_named(faults)
    a_rank_with_another_mode_is_named(faults)
    a_rank_without_the_file_is_named(faults)
    a_rank_with_a_wrong_argument_is_named(faults)
    a_rank_that_fails_while_it_loads_is_named(faults)
    a_rank_that_fails_at_the_end_is_named(faults)
    a_rank_that_is_too_slow_is_named(faults)
    a_rank_that_dies_while_it_loads_is_named(faults)


def of_the_others(faults, fault):
    others = [seen[fault] for rank, seen in enumerate(faults) if rank != 1]  # on two GPUs, one
    for seen in others:
        assert seen["error"] == "DistributedError"
        assert seen["ranks"] == [1]
        assert seen["as it was"]
    (said,) = {seen["said"].partition("\n")[0] for seen in others}  # without the context
    return said


def a_rank_whose_file_differs_is_named(faults):
    """All have the same names and shapes; afterwards they load the same files."""
    said = of_the_others(faults, "differs")
    assert "rank 1 and rank 0 do not have the same files (their values): let all ranks make the same calls" in said


def a_rank_with_another_mode_is_named(faults):
    assert "rank 1 and rank 0 do not have the same plan (model, config)" in of_the_others(faults, "other mode")


def a_rank_without_the_file_is_named(faults):
    assert "rank 1 failed in 'plan': CheckpointError: " in of_the_others(faults, "no file")


def a_rank_with_a_wrong_argument_is_named(faults):
    assert "rank 1 failed in 'plan': ConfigError: 'device_map': with a mesh" in of_the_others(faults, "argument")


def a_rank_that_fails_while_it_loads_is_named(faults):
    assert "rank 1 failed in 'load': CheckpointError: the file ended too early" in of_the_others(faults, "fails")


def a_rank_that_fails_at_the_end_is_named(faults):
    assert "rank 1 failed in 'commit': TypeError: " in of_the_others(faults, "at the end")


def a_rank_that_is_too_slow_is_named(faults):
    """Later it finds all of them again: the load that follows is one."""
    said = of_the_others(faults, "slow")
    assert re.search(r"rank 1 did not come to the end of 'load' within (4|20) s", said)
    assert "pass a longer timeout" in said
    assert faults[0]["afterwards"]["error"] is None


def a_rank_that_dies_while_it_loads_is_named(faults):
    assert "rank 1 did not come to the end of 'load'" in of_the_others(faults, "dies")
    assert faults[1] is None  # it has died, and no other has


def test_a_rank_that_dies_in_a_collective_is_named(programs, tmp_path):
    first, dead = run_world(programs, "world_faults.dies_in_a_collective", 2, tmp_path, timeout_s=TIMEOUTS_S["cpu"])
    assert dead is None
    assert (first["error"], first["ranks"], first["as it was"]) == ("DistributedError", [1], True)
    assert "rank 1 did not come to the end of 'share'" in first["said"]
