"""Ctrl-C is raised at points, at the end, or at once where that is asked for; the handler of before always returns."""

import math
import signal
import sys
import threading

import pytest

from bigload.hardware import interrupts
from bigload.hardware.interrupts import check_interrupt, deferred_interrupts, immediate_interrupts, interruptible


@pytest.fixture(autouse=True)
def handler():
    """Have Ctrl-C raise, also where the tests' own process ignores it; check that it does so at the end."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert interrupts._active is None
    signal.signal(signal.SIGINT, before)


def press():
    signal.raise_signal(signal.SIGINT)


def interrupted(act):
    """Return how far a function came that Ctrl-C ends."""
    steps = []
    with pytest.raises(KeyboardInterrupt):
        act(steps.append)
    return steps


def test_it_is_raised_at_the_next_point():
    @deferred_interrupts()
    def act(step):
        check_interrupt()
        press()
        step("pressed")
        check_interrupt()
        step("not reached")

    assert interrupted(act) == ["pressed"]
    assert interrupted(act) == ["pressed"]  # each call has a state of its own


def test_without_a_point_it_is_raised_at_the_end():
    @deferred_interrupts()
    def act(step):
        press()
        step("done")

    assert interrupted(act) == ["done"]


def test_at_the_end_it_replaces_an_error():
    @deferred_interrupts()
    def act(step):
        press()
        raise ValueError("of the step")

    with pytest.raises(KeyboardInterrupt) as raised:
        act(None)
    assert isinstance(raised.value.__context__, ValueError)


def test_a_block_within_another_leaves_it_to_that_one():
    @deferred_interrupts()
    def act(step):
        with deferred_interrupts():
            press()
        step("inner ended")
        check_interrupt()

    assert interrupted(act) == ["inner ended"]


def test_what_is_undone_is_undone_without_another():
    @deferred_interrupts()
    def act(step):
        press()
        try:
            check_interrupt()
        finally:
            press()
            press()
            step("undone")

    assert interrupted(act) == ["undone"]


@pytest.mark.parametrize(("patience", "expected"), [(math.inf, ["first", "second"]), (-1, ["first"])])
def test_another_is_raised_at_once_if_the_first_has_waited_for_long(monkeypatch, patience, expected):
    monkeypatch.setattr(interrupts, "PATIENCE_S", patience)

    @deferred_interrupts()
    def act(step):
        press()
        step("first")
        press()
        step("second")

    assert interrupted(act) == expected


def test_in_an_immediate_block_it_is_raised_at_once_and_undone_without_another():
    @deferred_interrupts()
    def act(step):
        with immediate_interrupts():
            step("entered")
        press()
        step("deferred again")
        try:
            with immediate_interrupts():  # is a point, too
                step("not reached")
        except KeyboardInterrupt:
            step("raised")
        with immediate_interrupts():
            try:
                press()
                step("not reached")
            finally:
                press()
                step("undone")

    assert interrupted(act) == ["entered", "deferred again", "raised", "undone"]


def test_the_handler_returns_if_it_comes_as_an_immediate_block_ends_and_the_traceback_is_kept():
    """Once the end was part of a generator, which set its handler when the traceback went: Ctrl-C did nothing more."""

    def at_the_end(frame, event, arg):
        if event == "call" and frame.f_code is immediate_interrupts.__exit__.__code__:
            sys.settrace(None)
            press()

    traced = sys.gettrace()
    try:
        with pytest.raises(KeyboardInterrupt) as kept, deferred_interrupts(), immediate_interrupts():
            sys.settrace(at_the_end)
    finally:
        sys.settrace(traced)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    del kept
    with pytest.raises(KeyboardInterrupt):
        press()


def test_what_the_program_does_at_ctrl_c_is_done_once_and_all_goes_on():
    seen = []
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    with deferred_interrupts():
        press()
        assert not seen
        check_interrupt()
        check_interrupt()
        with immediate_interrupts():
            press()
            press()
        assert seen == [signal.SIGINT] * 3
    assert seen == [signal.SIGINT] * 3
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("ignored", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_handler_that_is_not_pythons_is_left_alone(ignored):
    signal.signal(signal.SIGINT, ignored)
    with deferred_interrupts(), immediate_interrupts():
        assert signal.getsignal(signal.SIGINT) is ignored
        check_interrupt()
    assert signal.getsignal(signal.SIGINT) is ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_many_short_steps_have_points_among_them_and_none_is_lost():
    assert list(interruptible(iter(range(1000)))) == list(range(1000))
    assert list(interruptible([])) == []

    @deferred_interrupts()
    def act(step):
        for number in interruptible(range(1000)):
            step(number)
            if number == 100:
                press()

    assert interrupted(act) == list(range(interrupts._STEPS * (100 // interrupts._STEPS + 1)))


def test_other_threads_are_not_interrupted():
    errors = []

    def work():
        try:
            with deferred_interrupts(), immediate_interrupts():
                check_interrupt()
        except BaseException as error:
            errors.append(error)

    @deferred_interrupts()
    def act(step):
        press()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        step(len(errors))

    assert interrupted(act) == [0]
