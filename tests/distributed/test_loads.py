"""Models that processes load together: the bits are those of a load by one, and each reads and holds its share."""

import pytest
from worlds import DEVICES, run_world

CELLS = [
    ("plain", "nf4-dq", None),
    ("plain", "fp4", None),
    ("plain", "int8", None),
    ("tied", "nf4", None),
    ("tied", "none", None),
    ("transposed", "nf4-dq", None),
    ("mixture", "nf4-dq", None),
    # Checkpoints that are quantized already.
    ("plain", "nf4", "nf4"),
    ("plain", "int8", "int8"),
    ("mixture", "nf4-dq", "nf4-dq"),
]
WORLDS = [(2, CELLS), (4, [("plain", "nf4-dq", None), ("mixture", "nf4", None)])]


@pytest.mark.parametrize("device", DEVICES)
def test_worlds_load_models_together(programs, tmp_path, device):
    """One test: worlds take seconds, and tests of one file may run in several processes."""
    worlds = {
        ranks: run_world(programs, "world_loads.loads", ranks, tmp_path / f"of {ranks}", device, cells=cells)
        for ranks, cells in WORLDS
        if device == "cpu" or ranks <= _gpus()
    }
    all_bits_are_those_of_a_load_by_one_process(worlds)
    each_process_holds_its_share(worlds)
    the_file_is_read_once_by_all_together(worlds)
    the_reads_of_a_process_are_those_of_its_share(worlds)
    options_of_fully_shard_change_no_bits(worlds)


def _gpus():
    import torch

    return torch.cuda.device_count()


def _all(worlds):
    return [
        (ranks, rank, cell, seen)
        for ranks, by_rank in worlds.items()
        for rank, cells in enumerate(by_rank)
        for cell, seen in cells.items()
        if cell not in ("reads", "options")
    ]


def all_bits_are_those_of_a_load_by_one_process(worlds):
    """Sharded, gathered again after a forward, and as replicas; and what they compute."""
    wrong = [(ranks, rank, cell, seen["alike"]) for ranks, rank, cell, seen in _all(worlds)]
    assert [each for each in wrong if not all(each[3].values())] == []


def each_process_holds_its_share(worlds):
    for ranks, _, cell, seen in _all(worlds):
        # Padding: of rows, and of blocks; small beside the weights of a real model.
        assert seen["held"] <= seen["whole"] / ranks * 1.25 + 4096, cell
        assert seen["held"] <= seen["planned"], cell


def the_file_is_read_once_by_all_together(worlds):
    for ranks, _, cell, seen in _all(worlds):
        by_rank = [cells[cell] for cells in worlds[ranks]]
        total = sum(each["read"] for each in by_rank)
        assert total == sum(each["read by replica"] for each in by_rank)
        if "transposed" in cell:
            # Stored by columns: each reads all of such a weight, and quantizes its share.
            assert seen["read by one"] < total <= seen["read by one"] * ranks, cell
        else:
            # Buffers are had by all, and of stored weights the tables, and the scales of scales.
            beside = 1000 * ranks if cell.endswith("None") else 40_000 * ranks
            assert seen["read by one"] <= total <= seen["read by one"] + beside, cell


def the_reads_of_a_process_are_those_of_its_share(worlds):
    for ranks, by_rank in worlds.items():
        for seen in (cells["reads"] for cells in by_rank):
            assert seen["reported"] == pytest.approx(seen["file"] / ranks, rel=0.02)
            # Beside it the header, and samples by which the files of the processes are compared.
            assert seen["reported"] <= seen["read"] <= seen["reported"] + 200_000


def options_of_fully_shard_change_no_bits(worlds):
    """Gathered weights are kept, mixed precision leaves packed bytes alone, shares may lie in host memory.

    Nor do meshes of two dimensions, and weights that are in memory already.
    """
    for by_rank in worlds.values():
        for cells in by_rank:
            assert all(cells["options"].values()), cells["options"]
    tried = worlds[2][0]["options"].keys()
    assert {"at rest on the host", "stored as bfloat16", "own weights", "other weights are refused"} <= tried


TRAINED = [("tied", "nf4-dq", True, None), ("plain", "int8", False, ["lm_head"]), ("mixture", "nf4", False, None)]


@pytest.mark.parametrize("device", DEVICES)
def test_adapters_are_trained_as_by_one_process(programs, tmp_path, device):
    """Both processes have the same tokens, so that the mean of their gradients is exact.

    Parameters are counted as by one process too.
    """
    for rank, cells in enumerate(run_world(programs, "world_loads.trains", 2, tmp_path, device, cells=TRAINED)):
        for cell, seen in cells.items():
            assert seen["sharded"][-1] < seen["sharded"][0], cell
            assert seen.get("same again", True), cell
            assert seen.get("same by checkpoint", True), cell
            if rank == 0:
                assert seen.get("counted") == seen.get("counted by one"), cell
                # On a GPU gradients are added up in an order of their own.
                off = 0 if device == "cpu" else 1e-3
                assert seen["sharded"] == pytest.approx(seen["losses"], rel=off), cell
                assert seen["off"] <= off, cell
