"""The exceptions: what they can be caught as, what they carry, and how they read."""

import pickle

import pytest

from bigload.errors import (
    BigloadError,
    CheckpointError,
    ConfigError,
    MissingDependencyError,
    OffloadError,
    PlacementError,
    QuantizationError,
    listed,
)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (ConfigError, ValueError),
        (CheckpointError, RuntimeError),
        (PlacementError, ValueError),
        (QuantizationError, RuntimeError),
        (OffloadError, RuntimeError),
        (MissingDependencyError, ImportError),
    ],
)
def test_each_error_is_caught_as_bigloads_own_and_as_the_builtin(error, builtin):
    assert issubclass(error, BigloadError)
    assert issubclass(error, builtin)


def test_context_stands_after_the_message_and_only_when_it_was_added():
    error = ConfigError("bad field")
    assert str(error) == "bad field"
    error.context = "loading 'x' as nf4"
    first, second = str(error).splitlines()
    assert first == "bad field"
    assert "loading 'x' as nf4" in second


def test_context_of_one_error_does_not_leak_into_the_next():
    ConfigError("first").context = "somewhere"
    assert str(ConfigError("second")) == "second"


def test_checkpoint_error_carries_nothing_unless_told():
    error = CheckpointError("truncated")
    assert (error.missing_keys, error.unexpected_keys, error.mismatched_shapes) == ([], [], {})


def test_checkpoint_error_keeps_its_own_copies_of_the_findings():
    missing, wrong = ["a"], {"w": ((1,), (2,))}
    error = CheckpointError("does not fit", missing_keys=missing, unexpected_keys=("b",), mismatched_shapes=wrong)
    missing.clear()
    wrong.clear()
    assert error.missing_keys == ["a"]
    assert error.unexpected_keys == ["b"]
    assert error.mismatched_shapes == {"w": ((1,), (2,))}


def test_checkpoint_error_survives_the_way_between_processes():
    error = CheckpointError("does not fit", missing_keys=["a"], mismatched_shapes={"w": ((1,), (2,))})
    error.context = "loading"
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error)
    assert copy.missing_keys == ["a"]
    assert copy.mismatched_shapes == {"w": ((1,), (2,))}


def test_listed_quotes_every_name_up_to_the_limit():
    assert listed(["a", "b"]) == "'a', 'b'"
    assert listed(iter(["a", "b", "c"]), limit=3) == "'a', 'b', 'c'"


def test_listed_counts_the_names_beyond_the_limit():
    assert listed(["a", "b", "c", "d"], limit=2) == "'a', 'b' and 2 more"
