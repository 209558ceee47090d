"""New heads whose weights are computed of others (weight_norm and the like) are as their classes make them."""

import pytest
import torch
from checkpoints import empty, save
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from bigload import CheckpointError, load_and_quantize_model

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")


class Symmetric(nn.Module):
    """Has no right_inverse: the weight itself is the original."""

    def forward(self, x):
        return x.triu() + x.triu(1).mT


def symmetric(layer):
    return parametrize.register_parametrization(layer, "weight", Symmetric())


def both(layer):
    return symmetric(parametrizations.weight_norm(layer))


def rows(layer):
    return nn.utils.weight_norm(layer, dim=1)


def of_bias(layer):
    return parametrizations.weight_norm(layer, "bias", dim=None)


DRESSES = [parametrizations.weight_norm, nn.utils.weight_norm, rows, symmetric, both, of_bias]


class Head(nn.Module):
    def __init__(self, dress, kind):
        super().__init__()
        self.body = nn.Linear(64, 64)
        self.score = nn.ModuleDict({"out": dress(kind())})

    def forward(self, x):
        x = self.body(x)
        return self.score["out"](x if isinstance(self.score["out"], nn.Linear) else x.unflatten(1, (8, 8)))


def linear():
    return nn.Linear(64, 64)


def convolution():
    return nn.Conv1d(8, 8, 7, padding=3)


@pytest.fixture
def stored(tmp_path):
    state = nn.Linear(64, 64).state_dict()
    return save({f"body.{name}": value for name, value in state.items()}, tmp_path / "stored")


MATRICES_ONLY = (symmetric, both)
CASES = [(dress, linear) for dress in DRESSES]
CASES += [(dress, convolution) for dress in DRESSES if dress not in MATRICES_ONLY]


@pytest.mark.parametrize(
    ("dress", "kind"), CASES, ids=lambda made: f"{made.__module__.rpartition('.')[2]}.{made.__name__}"
)
def test_they_are_what_their_classes_make(dress, kind, stored, device):
    torch.manual_seed(3)
    wanted = dress(kind())
    model = empty(lambda: Head(dress, kind))
    before = set(vars(model.score["out"])), type(model.score["out"])
    torch.manual_seed(3)
    loaded = load_and_quantize_model(model, "nf4", stored, device_map=device, initialize_missing=["score"])
    assert (set(vars(loaded.score["out"])), type(loaded.score["out"])) == before
    expected, found = wanted.state_dict(), loaded.score["out"].state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name].cpu(), value) for name, value in expected.items())
    assert all(parameter.requires_grad for parameter in loaded.score.parameters())
    assert type(loaded.body).__name__ == "Linear4bit"
    x = torch.randn(3, 64, device=device)
    with torch.no_grad():
        hidden = loaded.body(x)
        hidden = hidden if kind is linear else hidden.unflatten(1, (8, 8))
        assert torch.allclose(loaded(x), wanted.to(device)(hidden), atol=1e-6)
    loaded(x).sum().backward()


def test_only_what_is_missing_of_them_is_made(device, tmp_path):
    torch.manual_seed(0)
    source = nn.ModuleDict({"out": parametrizations.weight_norm(nn.Linear(64, 64)), "body": nn.Linear(64, 64)})
    state = {name: value for name, value in source.state_dict().items() if not name.endswith("original0")}
    folder = save(state, tmp_path / "stored")

    def build():
        return nn.ModuleDict({"out": parametrizations.weight_norm(nn.Linear(64, 64)), "body": nn.Linear(64, 64)})

    model = load_and_quantize_model(empty(build), "nf4", folder, device_map=device, initialize_missing=["out"])
    originals = model["out"].parametrizations["weight"]
    assert torch.equal(originals.original1.cpu(), source["out"].parametrizations["weight"].original1)
    assert originals.original0.isfinite().all()
    assert torch.equal(model["out"].bias.cpu(), source["out"].bias)


@pytest.mark.parametrize(
    ("dress", "match"),
    [
        (parametrizations.spectral_norm, "of a parametrization by _SpectralNorm"),
        (nn.utils.spectral_norm, "computed by SpectralNorm"),
    ],
    ids=["new", "old"],
)
def test_what_only_a_constructor_makes_is_refused_and_the_remedy_works(dress, match, stored, device):
    make = lambda: Head(dress, linear)  # noqa: E731
    with pytest.raises(CheckpointError, match=rf"score\.out.*{match}.*outside of init_empty_weights"):
        load_and_quantize_model(empty(make), "nf4", stored, device_map=device, initialize_missing=["score"])
    model = empty(make)
    model.score["out"] = dress(linear())
    own = {name: value.clone() for name, value in model.score.state_dict().items()}
    loaded = load_and_quantize_model(model, "nf4", stored, device_map=device).eval()
    assert all(torch.equal(value.cpu(), own[name]) for name, value in loaded.score.state_dict().items())
    assert loaded(torch.randn(2, 64, device=device)).isfinite().all()
