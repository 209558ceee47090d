"""Tensors are cut into extents that hold each value once, in order, within the room, aligned, and as few as can be."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigload.io.extents import ReadTask, cut
from bigload.io.tensors import StoredTensor

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
# What one call of preadv takes on Linux: IOV_MAX.
MOST_BUFFERS = 1024


def task(numel, dtype=torch.float32, offset=0, file="a", device=CPU, direct=False, values_per_scale=1):
    nbytes = numel * dtype.itemsize
    tensor = StoredTensor(f"{file}@{offset}", Path(file), dtype, (numel,), offset, nbytes)
    home = torch.empty(nbytes, dtype=torch.uint8) if direct else None
    return ReadTask(tensor, device, take=lambda values, begin: None, home=home, values_per_scale=values_per_scale)


def in_a_row(numels, **options):
    """Deliveries whose bytes follow each other in one file."""
    itemsize = options.get("dtype", torch.float32).itemsize
    offsets = itertools.accumulate((numel * itemsize for numel in numels), initial=0)
    return [task(numel, offset=offset, **options) for numel, offset in zip(numels, offsets, strict=False)]


def is_direct(one):
    return one.home is not None and one.device.type == "cpu"


def numel(one):
    return one.tensor.shape[0]


def check_every_value_comes_once_and_in_order(tasks, extents):
    parts = [part for extent in extents for part in extent.parts]
    assert all(part.count > 0 for part in parts)
    cut_up = [(part.task, part.begin + i) for part in parts for i in range(part.count)]
    assert cut_up == [(one, i) for one in tasks for i in range(numel(one))]


def check_extent_is_one_run_of_its_file(extent, room):
    at = 0
    for part in extent.parts:
        one = part.task
        assert part.at == at
        assert part.nbytes == part.count * one.tensor.dtype.itemsize
        assert one.tensor.offset + part.begin * one.tensor.dtype.itemsize == extent.offset + at
        assert (one.tensor.file, one.device, is_direct(one)) == (extent.file, extent.device, extent.is_direct)
        at += part.nbytes
    assert 0 < extent.nbytes == at <= room
    assert len(extent.parts) <= MOST_BUFFERS


def check_values_stay_together(extent):
    for part in extent.parts:
        end = part.begin + part.count
        assert part.begin % part.task.values_per_scale == 0
        assert end % part.task.values_per_scale == 0 or end == numel(part.task)


def check_slots_are_aligned(extent):
    if not extent.is_direct:
        assert all(part.at % part.task.tensor.dtype.itemsize == 0 for part in extent.parts)


def check_extent_ends_only_where_it_must(extent, following, room):
    first = following.parts[0]
    one, itemsize = first.task, first.task.tensor.dtype.itemsize
    is_neighbour = (following.file, following.offset) == (extent.file, extent.offset + extent.nbytes)
    is_alike = (following.device, following.is_direct) == (extent.device, extent.is_direct)
    is_aligned = extent.is_direct or extent.nbytes % itemsize == 0
    fits = extent.nbytes + min(one.values_per_scale, numel(one) - first.begin) * itemsize <= room
    assert not (is_neighbour and is_alike and is_aligned and fits)


@st.composite
def arrangements(draw):
    """Tasks in file order, with gaps between some, and a room that holds the values of a scale of each."""
    tasks, offset, file = [], draw(st.integers(0, 9)), 0
    for _ in range(draw(st.integers(1, 12))):
        if draw(st.integers(0, 5)) == 0:
            file, offset = file + 1, draw(st.integers(0, 9))
        offset += draw(st.sampled_from([0, 0, 0, 1, 8]))
        dtype = draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.float64]))
        made = task(
            draw(st.integers(0, 60)),
            dtype,
            offset,
            str(file),
            draw(st.sampled_from([CPU, CPU, GPU])),
            draw(st.booleans()),
            draw(st.sampled_from([1, 1, 2, 5, 8])),
        )
        tasks.append(made)
        offset += made.tensor.nbytes
    return tasks, draw(st.integers(64, 300))


@settings(max_examples=300, deadline=None)
@given(arrangements())
def test_any_arrangement_is_cut_right(arrangement):
    tasks, room = arrangement
    extents = cut(tasks, room)
    check_every_value_comes_once_and_in_order(tasks, extents)
    for extent in extents:
        check_extent_is_one_run_of_its_file(extent, room)
        check_values_stay_together(extent)
        check_slots_are_aligned(extent)
    for extent, following in itertools.pairwise(extents):
        check_extent_ends_only_where_it_must(extent, following, room)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_a_thousand_tiny_neighbours_are_one_extent(direct, device):
    extents = cut(in_a_row([3] * 1000, direct=direct, device=device), 2**20)
    assert len(extents) == 1
    assert extents[0].nbytes == 12_000


def test_more_tiny_neighbours_than_one_call_reads_are_few_extents_that_it_can():
    extents = cut(in_a_row([1] * 5000, direct=True), 2**20)
    assert len(extents) == 5
    assert max(len(extent.parts) for extent in extents) <= MOST_BUFFERS


@pytest.mark.parametrize("numel", [1, 127, 128, 129, 256, 1000])
def test_a_large_tensor_fills_its_extents_to_the_last(numel):
    extents = cut([task(numel)], 512)
    assert [extent.nbytes for extent in extents[:-1]] == [512] * (-(-numel // 128) - 1)
    assert sum(extent.nbytes for extent in extents) == 4 * numel


def test_a_tensor_begins_in_the_extent_that_the_one_before_it_ends_in():
    first, second = in_a_row([100, 60])
    extents = cut([first, second], 512)
    assert [[(part.task, part.begin, part.count) for part in extent.parts] for extent in extents] == [
        [(first, 0, 100), (second, 0, 28)],
        [(second, 28, 32)],
    ]


def test_extents_of_a_tensor_without_memory_of_its_own_cost_nothing():
    """100 GiB: only counted."""
    numel = 50 * 2**30
    extents = cut([task(numel, torch.bfloat16, values_per_scale=64)], 32 * 2**20)
    assert len(extents) == 3200
    assert sum(part.count for extent in extents for part in extent.parts) == numel


def test_values_of_a_scale_that_fill_the_room_go_alone():
    extents = cut(in_a_row([3, 300], values_per_scale=128), 512)
    assert [[part.count for part in extent.parts] for extent in extents] == [[3], [128], [128], [44]]


def test_values_of_a_scale_that_do_not_fit_what_is_left_are_not_divided():
    """Room for 128 values: 100 are taken, a scale's 64 are not begun."""
    extents = cut([*in_a_row([100]), task(70, offset=400, values_per_scale=64)], 512)
    assert [[part.count for part in extent.parts] for extent in extents] == [[100], [70]]


def test_rest_shorter_than_a_scales_values_fits_where_it_fits():
    extents = cut([*in_a_row([100]), task(20, offset=400, values_per_scale=64)], 512)
    assert [[part.count for part in extent.parts] for extent in extents] == [[100, 20]]


@pytest.mark.parametrize(
    "second",
    [
        {"file": "b"},
        {"offset": 44},
        {"offset": 36},
        {"offset": 0},
        {"device": GPU},
        {"direct": True},
    ],
    ids=["file", "gap", "overlap", "again", "device", "directness"],
)
def test_a_change_of_file_place_or_way_begins_a_new_extent(second):
    assert len(cut([task(10), task(10, offset=40)], 512)) == 1
    assert len(cut([task(10), task(10, **({"offset": 40} | second))], 512)) == 2


def test_misaligned_neighbours_share_an_extent_only_past_the_slots():
    """Seen in a slot, a float64 at byte 3 would be no float64; in its own home it is."""
    for direct, expected in ((False, 2), (True, 1)):
        neighbours = [
            task(3, torch.uint8, 0, direct=direct),
            task(2, torch.float64, 3, direct=direct),
        ]
        assert len(cut(neighbours, 512)) == expected


def test_misaligned_in_the_file_is_aligned_in_its_extent():
    extents = cut([task(3, torch.uint8, 1), task(2, torch.float64, 4), task(1, torch.float64, 20)], 512)
    assert [extent.offset for extent in extents] == [1, 4]
    assert [part.at for part in extents[1].parts] == [0, 16]


def test_a_home_on_a_gpu_is_not_read_into():
    extents = cut([task(10, device=GPU, direct=True)], 512)
    assert not extents[0].is_direct
    assert extents[0].parts[0].home is not None


def test_empty_tensors_make_no_extent_and_part_none():
    assert cut([], 512) == []
    assert cut([task(0)], 512) == []
    extents = cut([task(10), task(0, offset=40, file="b"), task(10, offset=40)], 512)
    assert [[part.count for part in extent.parts] for extent in extents] == [[10, 10]]


def test_parts_are_views_of_the_home_and_of_what_landed():
    first, second = in_a_row([20, 7], dtype=torch.float64, direct=True)
    values = torch.arange(27, dtype=torch.float64)
    stored = values.view(torch.uint8)
    seen = []
    for extent in cut([first, second], 64):
        loaded = stored[extent.offset : extent.offset + extent.nbytes]
        for part in extent.parts:
            part.home.copy_(part.bytes_in(loaded))
            seen.append(part.values_in(loaded))
    assert torch.equal(torch.cat([first.home, second.home]), stored)
    assert torch.equal(torch.cat(seen), values)
