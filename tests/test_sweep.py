"""The sweep over classes: it finds what is equal and what is not, and goes on after what crashes or hangs."""

import json
import os
import time
from pathlib import Path

import pytest
from torch import nn

import bigload


def test_two_classes_by_the_command_line(tmp_path, programs):
    command = ["sweep", "GPT2LMHeadModel", "ViTForImageClassification"]
    command += ["--libraries", "transformers", "--out", str(tmp_path / "sweep.json")]
    printed = programs.run(f"from benchmarks.__main__ import main; main({command})", tmp_path)
    assert "| transformers | nf4 | 2 | 2 | none |" in printed
    result = json.loads((tmp_path / "sweep.json").read_text())
    found = {(row["class"], row["mode"]): row for row in result["rows"]}
    assert len(found) == 4
    assert {row["outcome"] for row in found.values()} == {"equal"}
    gpt2 = found["GPT2LMHeadModel", "nf4"]
    assert (gpt2["quantized"], gpt2["left"], gpt2["left_names"]) == (8, {"Linear": 1}, ["lm_head"])
    assert gpt2["error_in_training"] <= result["exact"]


def test_a_class_of_diffusers(tmp_path):
    pytest.importorskip("diffusers")
    from benchmarks.sweep import sweep_class

    rows = sweep_class("diffusers", "SD3Transformer2DModel", tmp_path)
    assert [(row["mode"], row["outcome"]) for row in rows] == [("nf4", "equal"), ("int8", "equal")]


def test_a_model_that_computes_something_else_differs(tmp_path, monkeypatch):
    from benchmarks.sweep import summary, sweep_class

    dequantize = bigload.dequantize_model

    def slightly_wrong(model):
        model = dequantize(model)
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.data *= 1.01
        return model

    monkeypatch.setattr(bigload, "dequantize_model", slightly_wrong)
    rows = sweep_class("transformers", "BertForMaskedLM", tmp_path)
    assert rows[0]["outcome"] == "differs"
    assert "BertForMaskedLM, nf4: differs" in summary(
        [{"library": "transformers", "class": "BertForMaskedLM"} | row for row in rows]
    )


@pytest.mark.parametrize(
    ("problem", "outcome"), [(lambda: os._exit(3), "crash"), (lambda: time.sleep(60), "timeout")], ids=["crash", "hang"]
)
def test_a_class_that_ends_or_hangs_its_process_is_a_row(monkeypatch, problem, outcome):
    from benchmarks import sweep

    def sweep_class(library, name, folder):
        if name == "Bad":
            problem()
        return [{"mode": "nf4", "outcome": "equal"}]

    monkeypatch.setattr(sweep, "sweep_class", sweep_class)
    found = [row for rows in sweep.sweep(["transformers"], ["Good", "Bad", "Fine"], timeout_s=5) for row in rows]
    assert {row["class"]: row["outcome"] for row in found} == {"Good": "equal", "Bad": outcome, "Fine": "equal"}


def test_a_class_without_linears_is_none_of_those_that_are_wrong(tmp_path):
    from benchmarks.sweep import summary, sweep_class

    rows = sweep_class("transformers", "MobileNetV2ForImageClassification", tmp_path)
    assert {row["outcome"] for row in rows} == {"nothing to quantize"}
    assert "MobileNet" not in summary([{"library": "transformers", "class": "MobileNetV2"} | row for row in rows])


def test_classes_without_a_small_model_say_why(tmp_path):
    from benchmarks.sweep import sweep_class

    (row,) = sweep_class("transformers", "LayoutLMv2Model", tmp_path)
    assert row["outcome"] == "not built"
    assert row["why"]


def test_the_committed_result_covers_what_is_promised():
    path = Path(__file__).parent.parent / "benchmarks" / "results" / "sweep-cpu2.json"
    rows = [row for row in json.loads(path.read_text())["rows"] if row["mode"]]
    for mode in ("nf4", "int8"):
        for library, least in (("transformers", 100), ("diffusers", 20)):
            equal = {
                row["class"]
                for row in rows
                if (row["library"], row["mode"], row["outcome"]) == (library, mode, "equal")
            }
            assert len(equal) >= least
    assert not [row for row in rows if row["outcome"] == "differs"]


def test_coverage_tells_what_4_bit_takes_and_why_not_the_rest(tmp_path, programs):
    command = ["coverage", "MixtralForCausalLM", "JetMoeForCausalLM", "NoSuchModel"]
    command += ["--out", str(tmp_path / "coverage.json")]
    printed = programs.run(f"from benchmarks.__main__ import main; main({command})", tmp_path)
    mixtral, other, missing = json.loads((tmp_path / "coverage.json").read_text())
    assert mixtral["share"] > 0.99
    assert any("a way of its own" in each.get("why", "") for each in other["left"])
    assert "error" in missing
    assert "MixtralForCausalLM: 99.4% of 46,702,792,704 in 4 bit" in printed
