"""QLoRA with transformers' Trainer: a model quantized as it loads, adapters of PEFT, saved and put onto it again.

python examples/qlora_trainer.py, on a GPU or the CPU. The model is small and random, its checkpoint is written here;
give the folder or hub id of a real one instead.
"""

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from bigload import init_empty_weights, load_and_quantize_model

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIG = LlamaConfig(vocab_size=128, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, **SIZES)


def loaded(source: Path) -> torch.nn.Module:
    """Load the checkpoint in 4 bit: over all GPUs, or on the CPU where there is none."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(CONFIG)
    return load_and_quantize_model(model, "nf4-dq", source, device_map="auto")


def main(folder: Path) -> None:
    """Train, save, load again."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(folder / "checkpoint")

    model = prepare_model_for_kbit_training(loaded(folder / "checkpoint"))
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    model.print_trainable_parameters()

    sequences = [{"input_ids": torch.arange(i, i + 16) % 100 + 3} for i in range(32)]
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        optim="adamw_8bit",  # of bitsandbytes
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    examples = [sequence | {"labels": sequence["input_ids"]} for sequence in sequences]
    trainer = Trainer(model=model, args=arguments, train_dataset=examples)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < losses[0]

    model.save_pretrained(folder / "adapter")
    again = PeftModel.from_pretrained(loaded(folder / "checkpoint"), str(folder / "adapter")).eval()
    tokens = torch.arange(3, 19)[None].to(again.device)
    with torch.no_grad():
        print(f"the adapter, loaded again: loss {again(input_ids=tokens, labels=tokens).loss.item():.3f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        main(Path(made))
