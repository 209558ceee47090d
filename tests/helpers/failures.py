"""Functions that fail, or do something of the test's own, when they are called."""

import itertools


def raising(error):
    """Return a function that raises, whatever it is given."""

    def act(*args, **kwargs):
        raise error

    return act


def raising_at(call, error):
    """Return a function that raises at its n-th call."""
    calls = itertools.count(1)

    def act(*args, **kwargs):
        if next(calls) == call:
            raise error

    return act


def act_at(monkeypatch, owner, name, call, act):
    """Call `act` before the n-th call of a function, in whatever thread that comes."""
    original, calls = getattr(owner, name), itertools.count(1)

    def counted(*args, **kwargs):
        if next(calls) == call:
            act()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


def fail_at(monkeypatch, owner, name, call, error):
    """Let the n-th call of a function raise."""
    act_at(monkeypatch, owner, name, call, raising(error))
