"""transformers' Trainer takes a loaded model as it takes one of transformers' own loader."""

import pytest
import torch
from comparisons import state_of
from models import llama
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from bigload import BnbQuantizationConfig, load_and_quantize_model

peft = pytest.importorskip("peft")

MODES = ("nf4", "nf4-dq", "int8")
SEQUENCES = [{"input_ids": torch.arange(i, i + 8), "labels": torch.arange(i, i + 8)} for i in range(6)]


def arguments(folder):
    return TrainingArguments(
        output_dir=folder,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )


def adapted(model):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("mode", MODES)
def test_trainer_trains_a_lora_on_a_loaded_llama(tmp_path, mode):
    model = adapted(load_and_quantize_model(llama(False), mode, device_map="cpu"))
    before = state_of(model)
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=SEQUENCES)
    assert trainer.train().global_step == 3
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert losses[2] < losses[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "lora_" in name}


@pytest.mark.parametrize("mode", MODES)
def test_trainer_refuses_a_model_without_adapters_as_it_refuses_transformers_own(tmp_path, mode):
    full = llama(False)
    full.save_pretrained(tmp_path / "full")
    quantization = BnbQuantizationConfig.from_mode(mode).to_transformers()
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "full", quantization_config=quantization, device_map={"": "cpu"}
    )
    messages = []
    for model in (load_and_quantize_model(full, mode, device_map="cpu"), theirs):
        with pytest.raises(ValueError, match="purely quantized models") as caught:
            Trainer(model=model, args=arguments(tmp_path), train_dataset=SEQUENCES)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_trainer_takes_a_model_of_which_nothing_was_quantized(tmp_path):
    config = BnbQuantizationConfig.from_mode("nf4", skip_modules=["*"])
    model = load_and_quantize_model(llama(False), config, device_map="cpu")
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=SEQUENCES)
    assert trainer.train().global_step == 3
