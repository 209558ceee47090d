"""The examples in the docstrings run as they stand, in an empty folder; every public name has one, for `help()`."""

import doctest
import importlib
import inspect
from functools import cached_property

import pytest

import bigload

# What users hold in their hands without having made it: `plan`, `model.load_report`, `model.offload` and their parts.
RETURNED = {
    "bigload.planning.plan": ("Plan",),
    "bigload.planning.placing.accounts": ("Account", "PlacedUnit"),
    "bigload.pipeline.report": ("LoadReport",),
    "bigload.offload.handle": ("Offload",),
    "bigload.offload.on_device.slot_pool": ("StreamStats",),
    "bigload.decoding.capture": ("DecodeCapture",),
    "bigload.decoding.decode_steps": ("DecodeStats",),
    "bigload.lightning.plugin": ("BitsandbytesPrecision",),
}
MODULES = sorted({getattr(bigload, name).__module__ for name in bigload.__all__} | RETURNED.keys())
# Lightning calls the methods of its plugin; users do not.
CALLED_BY_USERS = {"BitsandbytesPrecision": ("config", "convert_module")}


def examples_of(module):
    return [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]


def public_names():
    made = [(getattr(bigload, name).__module__, name) for name in bigload.__all__]
    return [*made, *((module, name) for module, names in RETURNED.items() for name in names)]


def public_members(cls):
    """Return the methods that a class defines, and its properties."""
    kinds = (property, cached_property, classmethod, staticmethod)
    members = {name: m for name, m in vars(cls).items() if not name.startswith("_")}
    names = [name for name, m in members.items() if inspect.isfunction(m) or isinstance(m, kinds)]
    names = [name for name in names if name in CALLED_BY_USERS.get(cls.__name__, names)]
    shown = [name for name in names if isinstance(members[name], (property, cached_property))]
    return [name for name in names if name not in shown], shown


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_say(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for test in examples_of(importlib.import_module(name)):
        runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
        failed, tried = runner.run(test)
        assert not failed, capsys.readouterr().out
        assert tried == len(test.examples), "an example is skipped"


@pytest.mark.parametrize(("module", "name"), public_names())
def test_every_public_name_has_an_example(module, name):
    examples = {test.name: test for test in examples_of(importlib.import_module(module))}
    path = f"{module}.{name}"
    assert path in examples
    value = getattr(importlib.import_module(module), name)
    if inspect.isclass(value):
        methods, properties = public_members(value)
        assert [method for method in methods if f"{path}.{method}" not in examples] == []
        shown = "".join(line.source for test in examples.values() for line in test.examples)
        assert [each for each in properties if f".{each}" not in shown] == []
