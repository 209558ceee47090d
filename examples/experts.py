"""A mixture of experts in 4 bit that leaves its experts off the GPU, and keeps those that were used last on it.

The model is small and random; for a real one (Qwen3-30B-A3B, Mixtral, GPT-OSS ...) build it from its config and name
its folder or hub id. On a machine without a GPU the CPU computes, and the experts come to it from the disk.
"""

import tempfile
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import bigload

SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"moe_intermediate_size": 512, "num_experts": 16, "num_experts_per_tok": 2}


def build() -> Qwen3MoeForCausalLM:
    """Build the model."""
    config = Qwen3MoeConfig(vocab_size=128, head_dim=64, num_key_value_heads=2, eos_token_id=None, **SIZES, **EXPERTS)
    return Qwen3MoeForCausalLM(config).eval()


def main(folder: Path) -> None:
    """Load with the experts elsewhere, and generate."""
    torch.manual_seed(0)
    build().save_pretrained(folder)
    with bigload.init_empty_weights():
        model = build()

    gpu, elsewhere = (0, "cpu") if torch.cuda.is_available() else ("cpu", "disk")
    experts = {f"model.layers.{number}.mlp.experts": elsewhere for number in range(SIZES["num_hidden_layers"])}
    model = bigload.load_and_quantize_model(
        model,
        "nf4",
        folder,
        device_map={"": gpu, **experts},  # "auto" does the same with a mixture that does not fit
        offload_folder=folder / "offload",
        offload=bigload.OffloadConfig(expert_cache=0.5),  # half of them; or bytes, such as "2GiB"
    )
    print(model.load_report)
    print(model.offload)

    tokens = torch.arange(8)[None].to(model.device)
    made = model.generate(tokens, max_new_tokens=12, do_sample=False)
    stats = model.offload.stats()
    wanted = stats.expert_hits + stats.expert_misses
    print(f"{made.shape[1]} tokens; of {wanted} experts that were wanted {stats.expert_hits} were in the cache")
    assert stats.expert_hits, "the cache was of no use"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        main(Path(made))
