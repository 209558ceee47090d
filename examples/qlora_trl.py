"""QLoRA with TRL's SFTTrainer, on text.

python examples/qlora_trl.py, on a GPU or the CPU. The model is small and random, its checkpoint and its tokenizer of
whole words are made here; `AutoTokenizer.from_pretrained` gives that of a real one.
"""

import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from bigload import init_empty_weights, load_and_quantize_model

WORDS = [
    "<pad>", "<eos>", "<unk>", "the", "a", "big", "small", "model", "loads", "trains", "learns", "fast", "slowly", "on",
    "one", "many", "GPUs", "CPUs",
]  # fmt: skip
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIG = LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=64, pad_token_id=0, eos_token_id=1, **SIZES)


def tokenizer() -> PreTrainedTokenizerFast:
    """Make one of whole words."""
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")


def main(folder: Path) -> None:
    """Train on a few sentences."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(folder / "checkpoint")
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(CONFIG)
    model = load_and_quantize_model(model, "nf4", folder / "checkpoint", device_map="auto")

    sentences = ["the big model loads fast on one GPUs", "a small model trains slowly on many CPUs"] * 8
    arguments = SFTConfig(
        output_dir=str(folder / "run"),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        max_length=32,
        bf16=torch.cuda.is_available(),
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"text": sentences}),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < losses[0]
    trainer.save_model(str(folder / "adapter"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        main(Path(made))
