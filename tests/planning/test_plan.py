"""What a plan says of sizes is what a load takes, to the byte."""

import gc
from pathlib import Path

import pytest
import torch
from checkpoints import empty, save_checkpoint
from models import GPT, Attended, Blocks, Layers, llama
from torch import nn

from bigload import BnbQuantizationConfig, load_and_quantize_model, plan_device_map
from bigload.notation import show
from bigload.quantization.layers import quantized_layers

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def tensors_held(model):
    """Every tensor of a loaded model, quant states too."""
    held = [*model.parameters(), *model.buffers()]
    experts = [weight for module in model.modules() for weight in module._parameters.values() if weight is not None]
    for weight in [*(layer.weight for layer in quantized_layers(model).values()), *experts]:
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
    if device.type == "cuda":  # the allocator counts what else is there
        for primed in ("nf4-dq", "fp4"):  # tables that are kept
            every = BnbQuantizationConfig.from_mode(primed, skip_modules=[])
            load_and_quantize_model(nn.Sequential(nn.Linear(64, 64)), every, device_map=device)
        gc.collect()  # other tests' models: bitsandbytes' layers refer to themselves
        before = torch.cuda.memory_stats(device)["requested_bytes.all.current"]
        allocated = torch.cuda.memory_allocated(device)
    model = load_and_quantize_model(empty(build), config, folder, device_map=device)
    assert sum(plan.device_bytes.values()) == bytes_held(model)
    (account,) = plan.accounts
    if device.type == "cpu":
        assert account.weights + account.quant_state == bytes_held(model)
    else:
        assert torch.cuda.memory_stats(device)["requested_bytes.all.current"] - before == bytes_held(model)
        assert torch.cuda.memory_allocated(device) - allocated == account.weights + account.quant_state


def test_tables_and_picture_in_the_documents_are_what_is_planned(monkeypatch):
    from benchmarks.plans import brief_plans_table, example_plan, plans_table

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    root = Path(__file__).parents[2]
    assert plans_table() in (root / "docs" / "plans.md").read_text()
    made = f"<!-- made by: python -m benchmarks plans --brief -->\n{brief_plans_table()}\n"
    assert made in (root / "README.md").read_text()
    title, plan = example_plan()
    for picture in (root / "docs" / "pictures").glob("plan-*.svg"):
        drawn = picture.read_text()
        assert title in drawn
        for account in plan.accounts:
            for figure in (account.needed, account.budget, account.weights, account.free):
                assert show(figure) in drawn


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


def test_module_without_parameters_is_computed_wherever_its_input_is():
    layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    plan = plan_device_map(layers, "nf4", device_map={"": "cuda:0", "2": "cpu"})
    assert plan.device_of("0") == plan.device_of("2") == torch.device("cuda", 0)
    assert plan.device_of("1") is None
