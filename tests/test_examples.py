"""The examples in the docstrings run as they stand, in an empty folder."""

import doctest
import importlib
import inspect

import pytest

import bigload

MODULES = sorted({getattr(bigload, name).__module__ for name in bigload.__all__})


def examples_of(module):
    return [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_say(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for test in examples_of(importlib.import_module(name)):
        failed, _ = doctest.DocTestRunner(verbose=False).run(test)
        assert not failed, capsys.readouterr().out


def test_every_public_function_and_config_has_an_example():
    shown = {test.name for name in MODULES for test in examples_of(importlib.import_module(name))}
    without = []
    for name in bigload.__all__:
        value = getattr(bigload, name)
        is_error = inspect.isclass(value) and issubclass(value, Exception)
        if not is_error and f"{value.__module__}.{value.__name__}" not in shown:
            without.append(name)
    assert without == []
