"""Text from a transformers model that is larger than its memory budget: "auto" streams the blocks that do not fit.

Without an argument the model is small and random; `python examples/generate.py Qwen/Qwen3-8B` takes a real one, by its
hub id or its folder, and all the memory that is free.
"""

import string
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import bigload

PROMPT = "Large models on small GPUs"


def write_tiny_model(folder: str) -> None:
    """Write a random Llama of four blocks, and a tokenizer that takes each character for a token."""
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=100, bos_token_id=None, eos_token_id=None, dtype="bfloat16", **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    letters = {letter: number for number, letter in enumerate(string.printable)}
    tokenizer = Tokenizer(models.BPE(letters, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def main(source: str, max_memory: dict | None, offload_folder: Path) -> None:
    """Load a model, and generate."""
    config = AutoConfig.from_pretrained(source)
    with bigload.init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    model = bigload.load_and_quantize_model(
        model, "nf4", source, device_map="auto", max_memory=max_memory, offload_folder=offload_folder
    ).eval()
    print(model.load_report)
    print(getattr(model, "offload", "everything fits: nothing is offloaded"))

    tokenizer = AutoTokenizer.from_pretrained(source)
    tokens = tokenizer(PROMPT, return_tensors="pt").to(model.device)  # the device that computes
    made = model.generate(**tokens, max_new_tokens=16, do_sample=False)
    print(tokenizer.decode(made[0], skip_special_tokens=True))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        if len(sys.argv) > 1:
            main(sys.argv[1], None, Path(folder, "offload"))
        else:
            torch.manual_seed(0)
            write_tiny_model(folder)
            # Too small for the model. A GPU needs 144 MiB more, which the load itself passes through.
            tight = {0: "156MiB", "cpu": "1GiB"} if torch.cuda.is_available() else {"cpu": "12MiB", "disk": "1GiB"}
            main(folder, tight, Path(folder, "offload"))
