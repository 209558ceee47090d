"""PEFT's methods on loaded models, for each mode and place: as the table in docs/fine-tuning.md says."""

import re

import adapter_cells
import pytest
import torch
from adapter_cells import FAMILIES, METHODS, MODES, PLACES, ROUNDED_AGAIN, Cell, refusal
from checkpoints import save_checkpoint, stored
from comparisons import equal, relative_error
from mixtures import mixture
from models import llama

from bigload import QuantizationError, dequantize_model

pytest.importorskip("peft")
pytestmark = [pytest.mark.usefixtures("small_parts_stream"), pytest.mark.filterwarnings("ignore")]

# int8 rounds its input too. What is rounded to 4 bit again is as far off as the rounding.
NEAR = {"none": 0.0, "int8": 0.05}
NEAR_IN_4_BIT, NEAR_ROUNDED_AGAIN = 1e-3, 0.6


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


@pytest.fixture
def found(sources, tmp_path):
    """Return a function that does what a method does in a cell."""

    def run(kind, method, place, mode, device):
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


@pytest.mark.parametrize("place", ["resident", "experts"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", METHODS)
def test_resident_model_gives_what_a_plain_model_of_the_same_values_gives(found, device, method, mode, place):
    if assert_refused(found, method, place, mode, device):
        return
    expected = found(Plain if mode == "none" else Dequantized, method, place, mode, device)
    made = found(Cell, method, place, mode, device)
    assert made.keys() == expected.keys()
    near = NEAR.get(mode, NEAR_ROUNDED_AGAIN if method in ROUNDED_AGAIN else NEAR_IN_4_BIT)
    for name, value in expected.items():
        if not near:
            assert equal(made[name], value), name
        elif value.any():
            assert relative_error(made[name], value) <= near, name
        else:
            assert not made[name].any(), name


ON_A_GPU = [pytest.param("cuda:0", place, marks=pytest.mark.cuda) for place in ("disk", "cpu")]
ON_A_GPU += [pytest.param("cuda:0", "two", marks=[pytest.mark.cuda, pytest.mark.multi_gpu])]


@pytest.mark.parametrize(("kind", "place"), [("cpu", "disk"), *ON_A_GPU])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", METHODS)
def test_model_elsewhere_gives_what_the_resident_one_gives(found, kind, method, mode, place):
    if assert_refused(found, method, place, mode, kind):
        return
    expected, made = found(Cell, method, "resident", mode, kind), found(Cell, method, place, mode, kind)
    assert made.keys() == expected.keys()
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
    for letter in "abcdefgh":
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
