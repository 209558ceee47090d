"""A model on GPU, CPU and disk by a device map of your own: planned first, then loaded, run and measured.

The model is small and random; for a real one put your model and checkpoint in the place of `build` and `folder`. On a
machine without a GPU the CPU computes, and blocks are streamed to it from the disk.
"""

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import bigload

SIZES = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 8}


def build() -> LlamaForCausalLM:
    """Build the model."""
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **SIZES)).eval()


@torch.no_grad()
def main(folder: Path) -> None:
    """Plan, load, run, and bring all weights back to the device that computes."""
    torch.manual_seed(0)
    build().save_pretrained(folder)
    gpu = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    # The longest matching path counts: two blocks are stored elsewhere, and "" is all the rest.
    device_map = {"": gpu, "model.layers.1": "cpu", "model.layers.3": "disk"}
    options = {"device_map": device_map, "offload_folder": folder / "offload"}

    with bigload.init_empty_weights():
        model = build()
    plan = bigload.plan_device_map(model, "nf4", folder, **options)
    print(plan)  # before a weight is read: the bytes on each device, and those that each forward streams

    model = bigload.load_and_quantize_model(model, "nf4", folder, **options)
    tokens = torch.arange(16)[None]
    streamed = model(tokens).logits
    stats = model.offload.stats()
    print(f"\none forward streamed {stats.nbytes / 2**20:.2f} MiB; copies: {stats.fetches}")

    block = model.model.layers[3]
    with model.offload.materialize(block):  # to read weights outside of the forward
        print("on the device that computes:", block.mlp.up_proj.weight.device == gpu)

    model.offload.remove()
    # The same bits on a GPU. Some CPUs have a kernel for resident 4-bit layers, which rounds to bfloat16.
    difference = (model(tokens).logits - streamed).abs().max().item()
    print(f"the logits of the resident model differ by at most {difference:.1g}")
    assert difference < 0.1


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        main(Path(made))
