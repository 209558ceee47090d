"""Optimizers of bitsandbytes on what a quantized model trains: adapters, and the main weights of int8 training.

python examples/optimizers.py, on a GPU or the CPU, with a small random model.
"""

from collections.abc import Callable

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from bigload import load_and_quantize_model

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIG = LlamaConfig(vocab_size=128, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, **SIZES)
# The states of parameters with fewer than 4096 values stay in 32 bit by default.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    name: getattr(bnb.optim, name) for name in ("AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit", "Lion8bit")
}


def adapters() -> torch.nn.Module:
    """Quantize a model to 4 bit and add adapters, which are trained."""
    model = load_and_quantize_model(LlamaForCausalLM(CONFIG), "nf4")
    return get_peft_model(model, LoraConfig(r=64, target_modules="all-linear"))


def main_weights() -> torch.nn.Module:
    """Keep trainable weights in float16, which each forward quantizes to int8."""
    return load_and_quantize_model(LlamaForCausalLM(CONFIG), "int8-training")


def main() -> None:
    """Train each with each."""
    for build in (adapters, main_weights):
        for name, make in OPTIMIZERS.items():
            torch.manual_seed(0)
            model = build().train()
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = make(trained, lr=1e-3)
            tokens = torch.arange(3, 35).view(2, 16).to(trained[0].device)
            losses = []
            for _ in range(6):
                loss = model(input_ids=tokens, labels=tokens).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            print(f"{build.__name__:12} {name:16} loss {losses[0]:.3f} -> {losses[-1]:.3f}")
            assert losses[-1] < losses[0]


if __name__ == "__main__":
    main()
