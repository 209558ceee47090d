"""What a plan says of sizes is what a load takes, to the byte."""

import gc
import json
from pathlib import Path

import pytest
import torch
from checkpoints import empty, save_checkpoint
from models import GPT, Attended, Blocks, Layers, llama
from torch import nn

from bigload import BnbQuantizationConfig, load_and_quantize_model, plan_device_map
from bigload.cli import main
from bigload.planning.plan import plan_table, step_seconds
from bigload.planning.report import plan_json
from bigload.quantization.layers import quantized_layers

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def tensors_held(model):
    """Every tensor of a loaded model, quant states too."""
    held = [*model.parameters(), *model.buffers()]
    for layer in quantized_layers(model).values():
        weight = layer.weight
        state = getattr(weight, "quant_state", None)
        held += [weight.SCB] if getattr(weight, "SCB", None) is not None else []
        held += [value for value in vars(state).values() if isinstance(value, torch.Tensor)] if state else []
        if state is not None and state.state2 is not None:
            held += [value for value in vars(state.state2).values() if isinstance(value, torch.Tensor)]
    return held


def bytes_held(model):
    """Bytes of the distinct storages of a model."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_held(model)}.values())


def families():
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        MixtralConfig,
        MixtralForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    small = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {
        "llama": lambda: llama(tied=False),
        "llama tied": lambda: llama(tied=True),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=32, n_embd=64, n_layer=2, n_head=2)),
        "t5": lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=96, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2)
        ),
        "mixtral": lambda: MixtralForCausalLM(
            MixtralConfig(**small, intermediate_size=128, num_key_value_heads=2, num_local_experts=4)
        ),
        "bert": lambda: BertForSequenceClassification(BertConfig(**small, intermediate_size=128)),
        "gpt": GPT,
        "layers": Layers,
        "attended": Attended,
        "blocks": Blocks,
    }


MODES = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
    "mixed": {
        "load_in_4bit": True,
        "bnb_4bit_blocksize": 128,
        "skip_modules": ["*.0", "*dense*"],
        "keep_in_fp32_modules": ["*norm*", "*.1"],
    },
    "nothing": {"load_in_4bit": True, "skip_modules": ["*"]},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", families())
def test_planned_bytes_are_those_that_the_loaded_model_holds(tmp_path, device, name, mode):
    build = families()[name]
    config = BnbQuantizationConfig(**MODES[mode], torch_dtype="bf16")
    folder = save_checkpoint(build().bfloat16(), tmp_path)
    plan = plan_device_map(empty(build), config, folder, device_map=device)
    for primed in ("nf4-dq", "fp4"):  # tables that are kept
        every = BnbQuantizationConfig.from_mode(primed, skip_modules=[])
        load_and_quantize_model(nn.Sequential(nn.Linear(64, 64)), every, device_map=device)
    gc.collect()  # other tests' models: bitsandbytes' layers refer to themselves
    before = torch.cuda.memory_stats(device)["requested_bytes.all.current"] if device.type == "cuda" else 0
    allocated = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    model = load_and_quantize_model(empty(build), config, folder, device_map=device)
    assert sum(plan.device_bytes.values()) == bytes_held(model)
    (account,) = plan.accounts
    if device.type == "cpu":
        assert account.weights + account.quant_state == bytes_held(model)
    else:
        assert torch.cuda.memory_stats(device)["requested_bytes.all.current"] - before == bytes_held(model)
        assert torch.cuda.memory_allocated(device) - allocated == account.weights + account.quant_state


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "int8", "nothing"])
def test_plan_from_the_model_alone_is_that_of_its_checkpoint(tmp_path, mode):
    for build in families().values():
        folder = save_checkpoint(build().bfloat16(), tmp_path / build().__class__.__name__ / str(id(build)))
        config = BnbQuantizationConfig(**MODES[mode], torch_dtype="bf16")
        alone, with_files = (
            plan_device_map(empty(build), config, location, device_map="cpu") for location in (None, folder)
        )
        assert alone.accounts == with_files.accounts
        assert {p.tensor.names: p.format for p in alone.tensors} == {
            p.tensor.names: p.format for p in with_files.tensors
        }


def test_quantized_checkpoint_is_planned_as_it_is_stored(tmp_path):
    from bigload import quantize_checkpoint

    folder = save_checkpoint(GPT().bfloat16(), tmp_path / "source")
    quantize_checkpoint(folder, tmp_path / "made", "nf4-dq", model=empty(GPT), device="cpu")
    plan = plan_device_map(empty(GPT), None, tmp_path / "made", device_map="cpu")
    model = load_and_quantize_model(empty(GPT), None, tmp_path / "made", device_map="cpu")
    assert plan.device_bytes == {CPU: bytes_held(model)}


def test_budget_is_met_to_the_byte(tmp_path):
    folder = save_checkpoint(GPT(), tmp_path)
    needed = plan_device_map(empty(GPT), "nf4", folder, device_map="cpu").accounts[0].needed
    load_and_quantize_model(empty(GPT), "nf4", folder, max_memory={"cpu": needed}, device_map="cpu")
    from bigload import PlacementError

    with pytest.raises(PlacementError, match="1 B too little"):
        load_and_quantize_model(empty(GPT), "nf4", folder, max_memory={"cpu": needed - 1}, device_map="cpu")


def test_plan_is_written_as_a_table_and_as_json(monkeypatch):
    monkeypatch.setattr("bigload.planning.units.RESIDENT_BYTES", 1000)
    budgets = {0: 2**28, "cpu": "1GiB"}
    plan = plan_device_map(empty(GPT, layers=6), "nf4", max_memory=budgets)
    assert "nothing is offloaded" in plan_table(plan)
    places = {f"transformer.h.{n}": "cpu" for n in (1, 3, 5)} | {"": 0}
    plan = plan_device_map(empty(GPT, layers=6), "nf4", device_map=places, max_memory=budgets)
    text = str(plan)
    assert "offloaded: 3 of 6 blocks" in text
    assert "256.00 MiB" in text
    made = json.loads(json.dumps(plan_json(plan, 50)))
    assert [unit["home"] for unit in made["units"] if unit["is_block"]] == ["cuda:0", "cpu"] * 3
    assert sum(unit["streamed_bytes"] for unit in made["units"]) == made["streamed_bytes"] == plan.streamed_bytes > 0
    assert made["step_s"] == step_seconds(plan, 50) == pytest.approx(plan.streamed_bytes / 50e9)
    for place in made["places"]:
        assert place["needed"] == sum(place[part] for part in ("weights", "quant_state", "ring", "reserve"))
        assert place["free"] == place["budget"] - place["needed"]


def test_table_in_the_docs_is_what_is_planned(monkeypatch):
    from benchmarks.plans import plans_table

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert plans_table() in (Path(__file__).parents[2] / "docs" / "plans.md").read_text()


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize("named", ["", "config.json"])
def test_command_plans_from_a_config_alone(tmp_path, capsys, named):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
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
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *arguments]) == 1
    assert arguments[-1].split("=")[0] in capsys.readouterr().err


def test_picture_of_a_plan(tmp_path):
    pytest.importorskip("matplotlib")
    from bigload.planning.report import draw_plan

    draw_plan(plan_device_map(empty(GPT), "nf4", max_memory={0: "1GiB"}), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
