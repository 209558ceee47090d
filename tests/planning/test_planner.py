"""What is kept free beside the weights, and what is refused."""

import json

import pytest
from checkpoints import empty, save_checkpoint
from models import GPT, LLAMA_8B, llama
from plans import planned

from bigload import OffloadConfig, load_and_quantize_model, plan_device_map
from bigload.cli import main
from bigload.errors import ConfigError


def test_largest_layer_that_is_dequantized_is_kept_free_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr("bigload.planning.planner.WINDOW_BYTES", 0)
    largest = 4 * 64 * 64 * 4  # the widest of GPT's layers, in float32
    assert planned(GPT, 0).accounts[0].reserve == 2**27 + largest
    assert planned(GPT, 0, mode="int8").accounts[0].reserve == 2**27
    assert planned(GPT, 0, offload=OffloadConfig(reserve=5)).accounts[0].reserve == 5


def test_reserve_is_kept_free():
    plan = planned(GPT, 0, offload=OffloadConfig(reserve="1GiB"))
    assert plan.accounts[0].reserve == 2**30
    with pytest.raises(ConfigError, match="OffloadConfig"):
        planned(GPT, offload={"reserve": 5})


def test_what_is_stored_quantized_is_not_computed_on_the_cpu_in_fp32(tmp_path):
    from bigload import CheckpointError, quantize_checkpoint

    folder = save_checkpoint(GPT().bfloat16(), tmp_path / "source")
    quantize_checkpoint(folder, tmp_path / "made", "nf4", model=empty(GPT), device="cpu")
    options = {"device_map": {"": 0, "transformer.h.1": "cpu"}, "offload": OffloadConfig(execute="cpu")}
    with pytest.raises(CheckpointError, match=r"transformer\.h\.1.*float32"):
        plan_device_map(empty(GPT), None, tmp_path / "made", **options)


def test_budget_is_met_to_the_byte(tmp_path):
    folder = save_checkpoint(GPT(), tmp_path)
    needed = plan_device_map(empty(GPT), "nf4", folder, device_map="cpu").accounts[0].needed
    load_and_quantize_model(empty(GPT), "nf4", folder, max_memory={"cpu": needed}, device_map="cpu")
    from bigload import PlacementError

    with pytest.raises(PlacementError, match="1 B too little"):
        load_and_quantize_model(empty(GPT), "nf4", folder, max_memory={"cpu": needed - 1}, device_map="cpu")


@pytest.mark.parametrize("named", ["", "config.json"])
def test_command_plans_from_a_config_alone(tmp_path, capsys, named):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    path = str(tmp_path / named)
    assert main(["plan", path, "--quant", "nf4-dq", "--max-memory", "0=5.6GiB"]) == 0
    out = capsys.readouterr().out
    assert "nothing is offloaded" in out
    assert "5.31 GiB in all" in out
    assert main(["plan", path, "--max-memory", "0=4GiB", "cpu=60GiB", "--link-gbps", "50", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["mode"] == "nf4"
    assert made["step_s"] == pytest.approx(made["streamed_bytes"] / 50e9)
    assert [place["place"] for place in made["places"]] == ["cuda:0", "cpu"]
    assert main(["plan", path, "--max-memory", "0=0.5GiB", "cpu=1GiB"]) == 1
    assert "too little" in capsys.readouterr().err


def test_command_plans_what_is_there(tmp_path, capsys):
    folder = save_checkpoint(llama(tied=False), tmp_path)
    llama(tied=False).config.save_pretrained(folder)
    assert main(["plan", str(folder), "--device-map", "cpu"]) == 0
    assert "14 layers as nf4" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["nowhere"], [".", "--max-memory", "0"], [".", "--max-memory", "x=1GiB"]], ids=repr
)
def test_command_refuses_what_it_cannot_plan(tmp_path, monkeypatch, capsys, arguments):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *arguments]) == 1
    assert arguments[-1].split("=")[0] in capsys.readouterr().err
