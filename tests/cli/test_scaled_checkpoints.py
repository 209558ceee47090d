"""The command line on checkpoints in fp8 and mxfp4."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from scaled import in_fp8, in_mxfp4

from bigload.cli import main

SIZES = {"vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
QWEN3 = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}
GPT_OSS = {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64}
FP8, MXFP4 = "fp8 by blocks of 128 x 128: 14 tensors, 983,040 values", "mxfp4, blocks of 32: 4 tensors, 98,304 values"


@pytest.fixture(params=["fp8", "mxfp4"])
def line(request, tmp_path, monkeypatch):
    """Make a checkpoint in the folder "model", and its config.json alone in "config". Returns how it is described."""
    monkeypatch.chdir(tmp_path)
    family, fields = ("Qwen3", QWEN3) if request.param == "fp8" else ("GptOss", GPT_OSS)
    config = getattr(transformers, f"{family}Config")(**SIZES, **fields, dtype="bfloat16")
    getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16).save_pretrained("model")
    (in_fp8 if request.param == "fp8" else in_mxfp4)(tmp_path / "model")
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.json").write_text((tmp_path / "model/config.json").read_text())
    return FP8 if request.param == "fp8" else MXFP4


def said(capsys, *words):
    """Run a command, which must succeed. Returns what it prints."""
    capsys.readouterr()
    assert main(list(words)) == 0
    return capsys.readouterr().out


def test_show_says_how_they_are_stored(line, capsys):
    assert f"  {line}" in said(capsys, "show", "model")


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "int8", "none"])
def test_plan_is_the_same_from_the_config_alone(line, mode, capsys):
    plans = [
        json.loads(said(capsys, "plan", folder, "--quant", mode, "--json", "--max-memory", "0=24GiB"))
        for folder in ("model", "config")
    ]
    places = [{place["place"]: (place["weights"], place["quant_state"]) for place in plan["places"]} for plan in plans]
    assert places[0] == places[1]
    # What the values are computed in is known once the weights are there.
    assert plans[0]["places"][0]["reserve"] > plans[1]["places"][0]["reserve"]


def test_load_takes_any_mode_and_none_is_16_bit(line, capsys):
    read = {mode: said(capsys, "load", "model", "--quant", mode, "--device-map", "cpu") for mode in ("nf4", "none")}
    assert "on cpu as nf4" in read["nf4"]
    assert re.search(r"into [\d.]+ .iB on cpu(,|$)", read["none"])
    assert "on cpu as" in said(capsys, "load", "model", "--device-map", "cpu")  # nf4 is the default


def test_quantize_makes_4_bit_and_16_bit_of_them(line, capsys):
    assert "as nf4, blocks of 64" in said(capsys, "quantize", "model", "model-nf4")
    assert "on cpu as nf4" in said(capsys, "load", "model-nf4", "--device-map", "cpu")
    made = said(capsys, "quantize", "model", "model-16", "--quant", "none")
    assert re.search(r"bfloat16: \d+ tensors", made)
    assert "fp8" not in made
    assert "mxfp4" not in made
    assert "quantization_config" not in json.loads(Path("model-16/config.json").read_text())
    assert "on cpu as nf4" in said(capsys, "load", "model-16", "--device-map", "cpu")
