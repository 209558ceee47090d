"""PEFT's methods on loaded models, for each mode and place: as the table in docs/fine-tuning.md says."""

import re

import adapter_cells
import pytest
import torch
from adapter_cells import FAMILIES, METHODS, MODES, PLACES, ROUNDED_AGAIN, Cell, is_computed_at_rest, refusal
from checkpoints import save_checkpoint, stored
from comparisons import equal, relative_error
from mixtures import mixture
from models import llama

from bigload import QuantizationError, dequantize_model

pytest.importorskip("peft")
pytestmark = [pytest.mark.usefixtures("small_parts_stream"), pytest.mark.filterwarnings("ignore")]

# What is rounded to 4 bit again is as far off as the rounding.
NEAR_IN_4_BIT, NEAR_ROUNDED_AGAIN = 1e-3, 0.6


def near_of(method, mode, device, name):
    """Return how far a value may be from that of the plain model: int8 rounds its input too.

    Only on a GPU it does so in training as well. There a gradient is a sum of rounded values with different signs.
    """
    if mode == "none":
        return 0.0
    if mode == "int8":
        return 0.15 if device.type == "cuda" and name.startswith("gradient") else 0.05
    return NEAR_ROUNDED_AGAIN if method in ROUNDED_AGAIN else NEAR_IN_4_BIT


def without_signs(name, value):
    """Return a value as it is whatever signs a decomposition gives to a row of one factor and a column of the other."""
    return value.abs() if name.startswith("gradient") else value


class Plain(Cell):
    """The model as its class and `load_state_dict` make it."""

    def load(self):
        model = FAMILIES[PLACES[self.place]]()
        model.load_state_dict(stored(self.source))
        return model.to(self.device).eval()


class Dequantized(Cell):
    """The model made of the values that the quantized layers compute with."""

    def load(self):
        return dequantize_model(super().load())


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A checkpoint of each family, in float32."""
    torch.manual_seed(0)
    models = {"llama": FAMILIES["llama"](), "qwen3_moe": mixture("qwen3_moe").float()}
    return {name: save_checkpoint(model, tmp_path_factory.mktemp(name)) for name, model in models.items()}


@pytest.fixture(scope="module")
def of_resident():
    """What a method does with the resident model, by method, mode and device."""
    return {}


@pytest.fixture
def found(sources, tmp_path, of_resident):
    """Return a function that does what a method does in a cell."""

    def run(kind, method, place, mode, device):
        if (kind, place) != (Cell, "resident"):
            return begun(kind, method, place, mode, device)
        key = method, mode, torch.device(device)
        if key not in of_resident:
            of_resident[key] = begun(kind, method, place, mode, device)
        return of_resident[key]

    def begun(kind, method, place, mode, device):
        folder = tmp_path / f"{kind.__name__}-{place}"
        folder.mkdir()
        cell = kind(place, mode, torch.device(device), sources[PLACES[place]], folder)
        return METHODS[method](cell, cell.load())

    return run


def assert_refused(found, *cell):
    """Say whether the table calls a cell refused; if so, it is, in these words."""
    reason = refusal(*cell[:3], torch.device(cell[3]).type)
    if reason is not None:
        with pytest.raises((QuantizationError, TypeError, RuntimeError), match=reason[0]):
            found(Cell, *cell)
    return reason is not None


def cells(*places):
    """Return each method in each place unquantized, in int8 and in one of the modes of 4 bit, in turn.

    Between them the places have a method in all of these modes, which differ in how they store values alone.
    """
    every, four_bit = ("resident", "disk", "experts", "cpu", "two"), ("nf4", "nf4-dq", "fp4")
    return [
        (method, place, mode)
        for number, method in enumerate(METHODS)
        for place in places
        for mode in ("none", "int8", four_bit[(number + every.index(place)) % 3])
    ]


@pytest.mark.parametrize(("method", "place", "mode"), cells("resident", "experts"))
def test_resident_model_gives_what_a_plain_model_of_the_same_values_gives(found, device, method, mode, place):
    if assert_refused(found, method, place, mode, device):
        return
    expected = found(Plain if mode == "none" else Dequantized, method, place, mode, device)
    made = found(Cell, method, place, mode, device)
    assert made.keys() == expected.keys()
    for name, value in expected.items():
        near = near_of(method, mode, device, name)
        if not near:
            assert equal(made[name], value), name
        elif value.any():
            assert relative_error(made[name], value) <= near, name
        else:
            assert not made[name].any(), name


ELSEWHERE = [
    *[("cpu", *cell) for cell in cells("disk")],
    *[pytest.param("cuda:0", *cell, marks=pytest.mark.cuda) for cell in cells("disk", "cpu")],
    *[pytest.param("cuda:0", *cell, marks=[pytest.mark.cuda, pytest.mark.multi_gpu]) for cell in cells("two")],
]


@pytest.mark.parametrize(("kind", "method", "place", "mode"), ELSEWHERE)
def test_model_elsewhere_gives_what_the_resident_one_gives(found, kind, method, mode, place):
    if assert_refused(found, method, place, mode, kind):
        return
    expected, made = found(Cell, method, "resident", mode, kind), found(Cell, method, place, mode, kind)
    assert made.keys() == expected.keys()
    if is_computed_at_rest(method, place, mode, torch.device(kind).type):
        near = 0.05 if mode == "int8" else 0.01  # one that lost its adapter is off by more
        for name, value in expected.items():
            assert relative_error(without_signs(name, made[name]), without_signs(name, value)) <= near, name
    else:
        assert not [name for name, value in expected.items() if not equal(made[name].cpu(), value.cpu())]


@pytest.mark.parametrize("mode", MODES[1:])
def test_a_merge_that_lost_the_adapter_would_be_further_off(found, mode, device):
    made = found(Cell, "`merge_and_unload`", "resident", mode, device)
    lost = relative_error(made["without"], made["unmerged"])
    assert relative_error(made["merged"], made["unmerged"]) < lost / 3
    assert lost > 0.4


def test_table_in_the_docs_is_the_one_that_is_tested():
    page = adapter_cells.PAGE.read_text()
    assert adapter_cells.table() in page, "run: python tests/helpers/adapter_cells.py"
    for letter in "abcdefghi":
        assert f"\n- ({letter}) " in page


def test_code_on_the_page_runs_as_pasted(tmp_path, monkeypatch):
    llama().save_pretrained(tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = re.findall(r"```python\n(.*?)\n```", adapter_cells.PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 5
    for code in blocks:
        exec(code, names)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not [module for module in names["merged"].modules() if type(module).__module__.startswith("peft.")]
    assert names["loss"].isfinite()
