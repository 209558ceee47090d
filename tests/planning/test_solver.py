"""Where units go: properties that hold for whatever units and budgets there are."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigload.planning.placing.solver import DoesNotFitError, Item, Rules, solve_placement

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


@st.composite
def items(draw):
    """Units of which part may leave: blocks, an embedding that leaves for nothing, buffers that belong first."""
    made = []
    for kind in draw(st.lists(st.sampled_from("bbbbrsef"), min_size=1, max_size=12)):
        staying, leaving = draw(st.integers(0, 20)), draw(st.integers(1, 100))
        if kind == "b":
            made.append(Item(staying + leaving, staying, leaving, leaving))
        elif kind == "r":
            made.append(Item(staying, staying, 0, 0))
        elif kind == "s":
            made.append(Item(staying + leaving, staying, leaving, leaving, is_block=False))
        elif kind == "e":
            made.append(Item(staying + leaving, staying, leaving, 0, is_block=False))
        else:
            made.append(Item(staying, staying, 0, 0, is_block=False, is_first=True))
    return made


BUDGETS = st.lists(st.integers(0, 600), min_size=1, max_size=3)
RULES = st.builds(Rules, st.sampled_from(STRATEGIES), st.integers(1, 3), st.booleans())
HOMES = st.fixed_dictionaries({}, optional={"cpu": st.integers(0, 800), "disk": st.integers(0, 800)})


def attempt(units, devices, homes, rules):
    try:
        return solve_placement(units, devices, dict(homes), rules)
    except DoesNotFitError:
        return None


def refusal(units, devices, homes, rules):
    try:
        solve_placement(units, devices, dict(homes), rules)
    except DoesNotFitError as error:
        return error


def used(units, placed, devices, rules):
    """Add up what a placement takes of each device and home."""
    groups = [[] for _ in devices]
    for unit, place in zip(units, placed, strict=True):
        if place.away and unit.streamed:
            groups[place.device].append(unit.streamed)
    on_device = [min(rules.slots, len(group)) * max(group, default=0) for group in groups]
    homes = {"cpu": 0, "disk": 0}
    for unit, place in zip(units, placed, strict=True):
        on_device[place.device] += unit.staying if place.away else unit.resident
        if place.away:
            homes[place.away] += unit.away
    return on_device, homes


def streamed(units, placed):
    return sum(unit.streamed for unit, place in zip(units, placed, strict=True) if place.away)


def fits_in_order(units, devices):
    """Try every division of the units, in their order, over the devices."""
    first = sum(unit.resident for unit in units if unit.is_first)
    sizes = [unit.resident for unit in units if not unit.is_first]
    for ends in itertools.combinations_with_replacement(range(len(sizes) + 1), len(devices) - 1):
        bounds = [0, *ends, len(sizes)]
        loads = [sum(sizes[a:b]) for a, b in itertools.pairwise(bounds)]
        loads[0] += first
        if all(load <= device for load, device in zip(loads, devices, strict=True)):
            return True
    return False


@settings(max_examples=100, deadline=None)
@given(items(), BUDGETS, HOMES, RULES)
def test_no_place_holds_more_than_it_may(units, devices, homes, rules):
    placed = attempt(units, devices, homes, rules)
    if placed is not None:
        assert len(placed) == len(units)
        on_device, at_home = used(units, placed, devices, rules)
        assert all(count <= device for count, device in zip(on_device, devices, strict=True))
        assert all(count <= homes.get(home, 0) for home, count in at_home.items())


@settings(max_examples=100, deadline=None)
@given(items(), BUDGETS, HOMES, RULES)
def test_nothing_is_offloaded_that_could_stay_and_the_order_is_kept(units, devices, homes, rules):
    placed = attempt(units, devices, homes, rules)
    if fits_in_order(units, devices):
        assert placed is not None
        assert not any(place.away for place in placed)
        assert order_of(units, placed) == sorted(order_of(units, placed))
    elif placed is not None and not any(place.away for place in placed):
        # In another order all fit, which is better than to offload.
        assert order_of(units, placed) != sorted(order_of(units, placed))


def order_of(units, placed):
    return [place.device for unit, place in zip(units, placed, strict=True) if not unit.is_first]


@settings(max_examples=100, deadline=None)
@given(items(), BUDGETS, HOMES, RULES)
def test_the_same_gives_the_same(units, devices, homes, rules):
    assert attempt(units, devices, homes, rules) == attempt(list(units), list(devices), dict(homes), rules)


@settings(max_examples=100, deadline=None)
@given(items(), BUDGETS, RULES, st.data())
def test_more_memory_never_means_more_streaming(units, devices, rules, data):
    homes = {"cpu": 10**6}
    less = attempt(units, devices, homes, rules)
    more = [device + data.draw(st.integers(0, 300)) for device in devices]
    if less is not None:
        richer = attempt(units, more, homes, rules)
        assert richer is not None
        assert streamed(units, richer) <= streamed(units, less)


@settings(max_examples=100, deadline=None)
@given(items(), BUDGETS, HOMES, RULES)
def test_what_does_not_fit_is_told_in_numbers(units, devices, homes, rules):
    error = refusal(units, devices, homes, rules)
    if error is not None:
        assert isinstance(error.place, int) or error.place in ("cpu", "disk")
        assert error.needed >= 0
        assert error.item is None or units[error.item].resident > max(devices)
        assert error.needed > error.allowed


def blocks(count, size=100, staying=4):
    return [Item(size, staying, size - staying, size - staying) for _ in range(count)]


@pytest.mark.parametrize("resident", range(1, 30))
def test_resident_and_streamed_blocks_are_interleaved_evenly(resident):
    units, rules = blocks(32), Rules(slots=2)
    budget = 2 * 96 + 32 * 4 + resident * 96
    placed = solve_placement(units, [budget], {"cpu": 10**6}, rules)
    away = [index for index, place in enumerate(placed) if place.away]
    assert len(away) == 32 - resident
    # In every stretch of the model as many are streamed as its share of them, give or take one.
    for begin, end in itertools.combinations(range(33), 2):
        count = sum(begin <= index < end for index in away)
        assert abs(count - (end - begin) * len(away) / 32) < 1.01


def test_offloaded_blocks_take_turns_on_the_links():
    units = blocks(16)
    placed = solve_placement(units, [500, 500], {"cpu": 10**6}, Rules(slots=1))
    devices = [place.device for place in placed if place.away]
    assert devices == [index % 2 for index in range(len(devices))]


def test_blocks_that_the_cpu_computes_are_the_last():
    units = [Item(100, 0, 200, 0) for _ in range(8)]
    placed = solve_placement(units, [500], {"cpu": 10**6}, Rules(from_end=True))
    assert [place.away for place in placed] == [None] * 5 + ["cpu"] * 3


def test_an_embedding_goes_before_any_block_is_streamed():
    units = [Item(300, 0, 300, 0, is_block=False), *blocks(4)]
    placed = solve_placement(units, [500], {"cpu": 10**6}, Rules())
    assert [place.away for place in placed] == ["cpu", None, None, None, None]


def test_the_disk_takes_what_the_cpu_cannot_hold():
    units = blocks(10)
    placed = solve_placement(units, [500], {"cpu": 3 * 96, "disk": 10**6}, Rules(slots=1))
    homes = [place.away for place in placed if place.away]
    assert homes.count("cpu") == 3
    assert homes.count("disk") == len(homes) - 3
    assert "disk" in homes[: len(homes) // 2]  # spread over the depth


def test_balanced_is_even_and_low_0_leaves_the_first_empty():
    units = blocks(12, staying=0)
    count = {
        strategy: [
            sum(place.device == n for place in solve_placement(units, [2000] * 3, {}, Rules(strategy)))
            for n in range(3)
        ]
        for strategy in STRATEGIES
    }
    assert count == {"auto": [4, 4, 4], "balanced": [4, 4, 4], "balanced_low_0": [0, 6, 6], "sequential": [12, 0, 0]}


def test_low_0_gives_the_first_only_what_the_others_cannot_hold():
    placed = solve_placement(blocks(12, staying=0), [2000, 400, 400], {}, Rules("balanced_low_0"))
    assert [sum(place.device == n for place in placed) for n in range(3)] == [4, 4, 4]


@pytest.mark.parametrize("devices", [[30_000], [20_000, 20_000], [120_000], [2_000]])
def test_a_thousand_blocks_of_different_sizes(devices):
    units = [Item(101 + index % 7, 4, 97 + index % 7, 97 + index % 7) for index in range(1000)]
    homes = {"cpu": 60_000, "disk": 10**6}
    placed = attempt(units, devices, homes, Rules())
    assert (placed is None) == (devices == [2_000])
    if placed is not None:
        on_device, at_home = used(units, placed, devices, Rules())
        assert all(count <= device for count, device in zip(on_device, devices, strict=True))
        assert at_home["cpu"] <= homes["cpu"]


def test_a_home_too_small_for_the_first_choice_does_not_end_the_search():
    units = [Item(1000, 0, 1000, 0, is_block=False), *(Item(100, 0, 100, 100) for _ in range(10))]
    placed = solve_placement(units, [1995], {"cpu": 300}, Rules())
    assert placed[0].away is None
    assert any(place.away for place in placed)


def test_homes_are_divided_unevenly_where_no_even_division_fits():
    placed = solve_placement([Item(1, 0, 1, 1), Item(10, 0, 10, 10)], [10], {"cpu": 1, "disk": 10}, Rules(slots=1))
    assert [place.away for place in placed] == ["cpu", "disk"]


def test_a_disk_that_is_too_small_is_named():
    units = [Item(1, 0, 1, 1), *(Item(10, 0, 10, 10) for _ in range(4))]
    error = refusal(units, [11], {"cpu": 10, "disk": 10}, Rules(slots=1))
    assert (error.place, error.needed, error.allowed) == ("disk", 40, 10)
    assert refusal(units, [11], {"cpu": 10, "disk": 40}, Rules(slots=1)) is None


@pytest.mark.parametrize("strategy", ["balanced", "balanced_low_0", "sequential"])
def test_what_fits_in_another_order_alone_is_placed(strategy):
    sizes = [48, 32]  # the first fits onto the second device only, which has no room for both
    items = [Item(size, 0, size, size, is_block=True) for size in sizes]
    placed = solve_placement(items, [40, 79], {}, Rules(strategy, 2))
    assert [one.device for one in placed] == [1, 0]
    assert not any(one.away for one in placed)
