"""The walk over a model gives what torch's own does."""

import torch
from models import GPT, Attended, llama
from torch import nn

from bigload.model.tree import first_paths, leaves, modules_by_path, paths_above
from bigload.model.view import ModelView, view_of


class Shared(nn.Module):
    """One module under two names, one parameter under two, a child and a buffer that are None."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.second = self.first
        self.tied = nn.Linear(2, 3)
        self.tied.weight = self.first[0].weight
        self.nothing = None
        self.register_module("absent", None)
        self.register_buffer("no_buffer", None)
        self.scale = nn.Parameter(torch.ones(()))


def test_modules_parameters_and_buffers_are_torchs_own_in_its_order():
    for model in (Shared(), GPT(tied=True), Attended(), llama(True), nn.Linear(2, 3)):
        modules = modules_by_path(model)
        assert [(path, module) for module, path in first_paths(model).items()] == list(model.named_modules())
        assert list(modules.items()) == list(model.named_modules(remove_duplicate=False))
        for kind, expected in (("_parameters", model.named_parameters), ("_buffers", model.named_buffers)):
            found, named = leaves(modules, kind), dict(expected(remove_duplicate=False))
            assert list(found) == list(named)
            assert all(found[name] is named[name] for name in named)


def test_view_is_of_the_moment_it_was_made():
    model = Shared()
    view = ModelView(model)
    assert view_of(view) is view
    model.added = nn.Linear(1, 1)
    assert "added" not in view.modules
    assert "added" in view_of(model).modules
    assert view.first_paths == {module: path for module, path in first_paths(model).items() if path != "added"}
    assert {name: view.owner(name) for name in view.parameters} == {
        name: model.get_submodule(name.rpartition(".")[0]) for name in view.parameters
    }


def test_paths_above_are_those_of_the_modules_that_it_is_in():
    model = GPT()
    assert paths_above("lm_head") == [""]
    above = paths_above("transformer.h.0.attn.c_attn")
    assert above == ["", "transformer", "transformer.h", "transformer.h.0", "transformer.h.0.attn"]
    inner = model.get_submodule("transformer.h.0.attn.c_attn")
    assert all(inner in model.get_submodule(path).modules() for path in above)
